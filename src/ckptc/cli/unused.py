"""Options that a command has and that mean nothing to the kind of plan it is given: refused, never passed over."""

from __future__ import annotations

import argparse

from ckptc.diagnostics import fail

# (command, kind of plan) -> option, what it is where nobody gave it, why it means nothing there.
_CONVERSION, _EXPORT = "it goes with exports", "an export does not have it"
UNUSED: dict[tuple[str, str], tuple[tuple[str, object, str], ...]] = {
    ("run", "export"): (
        ("verify", False, _EXPORT),
        ("restart", False, "an export keeps nothing of an unfinished run"),
        ("check_source", None, _EXPORT),
        ("mapping", None, _EXPORT),
    ),
    ("run", "import"): (("config_from", None, _CONVERSION), ("fill_from", None, _CONVERSION)),
    ("compile", "export"): (("shards", 16, _EXPORT), ("compression", "none", _EXPORT)),
    ("compile", "import"): (
        ("config_from", None, _CONVERSION),
        ("fill_from", None, _CONVERSION),
        ("max_shard_size", 5 * 10**9, _CONVERSION),
    ),
}


def refuse_unused(args: argparse.Namespace, kind: str) -> None:
    """Raises `unused-option` for an option that means nothing to plans of a kind: `import` or `export`."""
    for name, default, why in UNUSED.get((args.command, kind), ()):
        if getattr(args, name) != default:
            option, what = name.replace("_", "-"), "an export" if kind == "export" else "a conversion"
            raise fail("unused-option", f"--{option} means nothing to {what}: {why}", help="leave it out")

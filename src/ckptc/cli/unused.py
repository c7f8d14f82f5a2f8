"""Options that a command has and that mean nothing to the kind of plan it is given: refused, never passed over."""

from __future__ import annotations

import argparse

from ckptc.diagnostics import fail

# (command, kind of plan) -> option, why it means nothing there. Where nobody gave it, it is None or False.
_CONVERSION, _EXPORT = "it goes with exports", "an export does not have it"
UNUSED: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("run", "export"): (
        ("verify", _EXPORT),
        ("check_source", _EXPORT),
        ("mapping", _EXPORT),
    ),
    ("run", "import"): (("config_from", _CONVERSION), ("fill_from", _CONVERSION)),
    ("compile", "export"): (("shards", _EXPORT), ("compression", _EXPORT)),
    ("compile", "import"): (
        ("config_from", _CONVERSION),
        ("fill_from", _CONVERSION),
        ("max_shard_size", _CONVERSION),
    ),
}


def refuse_unused(args: argparse.Namespace, kind: str) -> None:
    """Raises `unused-option` for an option that means nothing to plans of a kind: `import` or `export`."""
    for name, why in UNUSED.get((args.command, kind), ()):
        if getattr(args, name) not in (None, False):
            option, what = name.replace("_", "-"), "an export" if kind == "export" else "a conversion"
            raise fail("unused-option", f"--{option} means nothing to {what}: {why}", help="leave it out")
    if args.command == "run" and args.mapping is not None and not args.verify:
        message = "--mapping says which mapping --verify compares with, and a plan holds its own"
        raise fail("unused-option", message, help="give --verify too, or leave it out")


def refuse_scan_axis(args: argparse.Namespace) -> None:
    """Raises `unused-option` for an axis of stacked layers where a conversion stacks none."""
    if args.scan is False and args.param_scan_axis is not None and not args.pipeline:
        message = "--param-scan-axis is the axis that stacked layers are, and --no-scan stacks none"
        raise fail("unused-option", message, help="leave out one of them")

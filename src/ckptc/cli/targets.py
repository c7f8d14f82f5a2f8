"""`ckptc targets`: what each target holds; of a block the tree, its axes and its conventions."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ckptc.cli import render
from ckptc.diagnostics import did_you_mean, fail

if TYPE_CHECKING:
    from ckptc.spec.halves.contract import Contract


def add_targets(commands: Any) -> None:
    parser = commands.add_parser(
        "targets",
        help="list what can be written, or show a block of it",
        description="Every target; with NAME its blocks, which are trees that it has; with BLOCK the tree: paths, axes "
        "and conventions, as mappings are held to them.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a target")
    parser.add_argument("block", nargs="?", metavar="BLOCK", help="one of its blocks")
    parser.add_argument("--json", action="store_true", help="print JSON")


def targets(args: argparse.Namespace) -> None:
    from ckptc.spec.halves.contract import contract, contracts, titled
    from ckptc.spec.mapping import TARGETS

    if args.name is None:
        rows: list[dict[str, Any]] = [{"target": name, "blocks": list(titled(name))} for name in TARGETS]
        shown = render.table([("TARGET", "BLOCKS"), *((r["target"], ", ".join(r["blocks"])) for r in rows)])
        print(json.dumps(rows, indent=1) if args.json else shown)
        return
    if args.name not in TARGETS:
        help = did_you_mean(args.name, TARGETS) or f"there is {', '.join(TARGETS)}"
        raise fail("unknown-part", f"there is no target `{args.name}`", help=help)
    if args.block is None:
        blocks = [{"block": c.name, "title": c.title} for c in contracts(args.name)]
        shown = render.table([("BLOCK", "TITLE"), *((b["block"], b["title"]) for b in blocks)])
        print(json.dumps(blocks, indent=1) if args.json else shown)
        return
    found = contract(args.name, args.block)
    arrays = _rows(found)
    if args.json:
        print(json.dumps({"target": args.name, "block": found.name, "title": found.title, "arrays": arrays}, indent=1))
        return
    heading = ("LAYOUT", "PATH", "AXES", "HOLDS", "CONVENTIONS")
    said = (", ".join(f"{w} {v}" for w, v in r["conventions"].items()) for r in arrays)
    lines = [(r["layout"], r["path"], r["axes"], r["holds"], s) for r, s in zip(arrays, said, strict=True)]
    print(f"{found.name}: {found.title}\n")
    print(render.table([heading, *lines]))


def _rows(found: Contract) -> list[dict[str, Any]]:
    """One for each array and layout, in the order of the block."""
    return [
        {
            "layout": a.layout,
            "path": a.path,
            "axes": str(a.holding.get("as")),
            "holds": a.holding.title,
            "conventions": dict(a.says),
        }
        for a in found.arrays
    ]

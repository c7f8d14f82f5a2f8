"""`ckptc plan show` and `ckptc plan diff`: a plan as text or as a page to explore, and what two plans differ in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckptc.cli import arguments, render
from ckptc.diagnostics import fail

SHOWN = 40  # differences


def add_plan(commands: Any) -> None:
    """The parser of `plan`."""
    parser = commands.add_parser(
        "plan",
        help="show a plan, or what two plans differ in",
        description="Reads plans that `ckptc compile -o` wrote.",
    )
    actions = parser.add_subparsers(dest="action", metavar="show|diff", required=True)
    show = actions.add_parser("show", help="print a plan's summary, or write a page to explore it")
    show.add_argument("plan", metavar="PLAN", help="a file that `ckptc compile -o` wrote")
    show.add_argument("--html", metavar="FILE", help="write one self-contained page for a browser")
    show.add_argument("--force", action="store_true", help="let --html replace a file")
    show.add_argument("--json", action="store_true", help="print the summary as JSON")
    diff = actions.add_parser("diff", help="print what two plans differ in; exit code 1 where they do")
    diff.add_argument("first", metavar="PLAN")
    diff.add_argument("second", metavar="PLAN")
    diff.add_argument("--json", action="store_true", help="print JSON")


def plan(args: argparse.Namespace) -> int:
    return diff(args) if args.action == "diff" else show(args)


def show(args: argparse.Namespace) -> int:
    from ckptc.cli import export
    from ckptc.cli.plan_page import page
    from ckptc.plan.model import Safetensors
    from ckptc.plan.on_disk import read_plan

    plan, _ = read_plan(Path(args.plan))
    way_back = isinstance(plan.layout, Safetensors)
    if args.html:
        file = Path(args.html)
        if file.exists() and not args.force:
            raise fail("output-exists", f"{file} exists", help="choose another name, or use --force")
        try:
            file.write_text(page(plan), encoding="utf-8")
        except OSError as error:
            raise fail("unwritable-output", f"cannot write {file}: {error.strerror}") from None
        print(f"written to {file}: open it in a browser")
    elif args.json:
        print(json.dumps(export.summary_record(plan) if way_back else render.summary_record(plan), indent=1))
    else:
        print(export.summary(plan) if way_back else render.summary(plan))
    return 0


def diff(args: argparse.Namespace) -> int:
    from ckptc.plan.on_disk import read_plan

    first, second = (read_plan(Path(name))[0] for name in (args.first, args.second))
    found = list(differences(first, second))
    if args.json:
        print(json.dumps([{"what": what, "first": a, "second": b} for what, a, b in found], indent=1))
    else:
        lines = [f"{what}: {a} | {b}" for what, a, b in found[:SHOWN]]
        lines += [f"and {len(found) - SHOWN} differences more; --json has all"] if len(found) > SHOWN else []
        print("\n".join(lines) if found else "the plans do the same")
    return 1 if found else 0


def differences(first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    """What differs, and what each plan has there; None where it has nothing. Digests and versions are no difference."""
    from msgspec import to_builtins

    for section in ("choices", "totals"):
        a, b = (to_builtins(getattr(p, section)) for p in (first, second))
        a, b = ({**x, **{f"dims.{k}": v for k, v in x.pop("dims", {}).items()}} for x in (a, b))
        for key in dict.fromkeys((*a, *b)):
            if a.get(key) != b.get(key):
                yield f"{section}.{key}", a.get(key), b.get(key)
    arrays = [{a.name: a for a in p.arrays} for p in (first, second)]
    for name in dict.fromkeys((*arrays[0], *arrays[1])):
        one, other = (found.get(name) for found in arrays)
        if one is None or other is None:
            a, b = (None if x is None else f"{x.dtype}{list(x.shape)}" for x in (one, other))
            yield name, a, b
            continue
        for what, a, b in (
            ("shape", list(one.shape), list(other.shape)),
            ("dtype", one.dtype, other.dtype),
            ("ops", "; ".join(one.ops), "; ".join(other.ops)),
            ("chunk", list(one.chunk), list(other.chunk)),
        ):
            if a != b:
                yield f"{name}, {what}", a, b
        reads = [[p.tensors[n].name for s in x.sources for n in s.tensors] for p, x in ((first, one), (second, other))]
        if reads[0] != reads[1]:
            a, b = (f"{len(r)} tensors, {r[0] if r else ''}" for r in reads)
            yield f"{name}, tensors", a, b
        elif one.ops == other.ops and one.shape == other.shape and one.parts != other.parts:
            yield f"{name}, elements", "other elements of the same tensors", ""


def explained(parser: argparse.ArgumentParser) -> None:
    """What `explain MODEL TENSOR` takes, besides."""
    parser.add_argument("--source", metavar="DIR|hf://…", help="of a tensor: the checkpoint (default: shipped numbers)")
    parser.add_argument("--mapping", metavar="FILE", help="of a tensor: a mapping that is not among the shipped ones")
    parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True, help="of a tensor: the layout")
    parser.add_argument("--multimodal", action="store_true", help="of a tensor: the towers too")
    parser.add_argument(
        "--set", action="append", default=[], type=arguments.setting, metavar="DIM=VALUE", help="of a tensor: a dim"
    )

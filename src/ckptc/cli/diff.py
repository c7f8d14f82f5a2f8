"""`ckptc diff`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ckptc.cli import arguments, render

if TYPE_CHECKING:
    from ckptc.run.diff import Comparison, Difference

SHOWN = 40  # differences that are printed; --json has all


def add_diff(commands: Any) -> None:
    """The parser of `diff`."""
    parser = commands.add_parser(
        "diff",
        help="compare two checkpoints",
        description="Compares trees and values of the parameters of two checkpoints, each safetensors or Orbax. Exit "
        "code 1 if they differ.",
    )
    parser.add_argument("first", metavar="A", help="a checkpoint: safetensors, or an output, a run or a step of Orbax")
    parser.add_argument("second", metavar="B", help="another")
    parser.add_argument(
        "--all",
        action="store_true",
        help="compare the rest of a training state, too: optimizer, counters, random numbers",
    )
    parser.add_argument("--json", action="store_true", help="print everything that differs as JSON")
    parser.add_argument(
        "--memory", type=arguments.memory, default=256 * arguments.MIB, metavar="SIZE", help="budget for buffers"
    )


def diff(args: argparse.Namespace) -> int:
    """Exit code 0 where both are the same, 1 where they differ."""
    from ckptc import api

    found = api.diff(args.first, args.second, memory=args.memory, all=args.all, on_step=render.say_step)
    for given, summed in zip((args.first, args.second), found.checksums, strict=True):
        if summed is not None and summed < found.arrays:
            which = f"{found.arrays - summed} of {found.arrays} arrays have" if summed else "the checkpoint has"
            print(f"note: {given}: {which} no checksums to compare", file=sys.stderr)
    if args.json:
        # JSON has no infinity: a difference to one, or to what is no number, is null.
        text = json.dumps(asdict(found)).replace("Infinity", "null")
        print(text)
    else:
        print(differences(found))
    return 1 if found.differences else 0


def differences(found: Comparison) -> str:
    lines = [_difference(d) for d in found.differences[:SHOWN]]
    if len(found.differences) > SHOWN:
        lines.append(f"… and {len(found.differences) - SHOWN} more; --json has all")
    count = len(found.differences)
    equal = f"{found.equal} of {found.arrays} arrays that both have are equal bit for bit"
    ending = f"; {count} difference{'s' if count != 1 else ''}" if count else ""
    lines.append(f"{equal}, {render.size(found.bytes)} compared{ending}")
    return "\n".join(lines)


def _difference(d: Difference) -> str:
    match d.kind:
        case "missing":
            return f"missing  {d.name}: {d.first}, not in the second"
        case "extra":
            return f"extra    {d.name}: {d.second}, not in the first"
        case "shape":
            return f"shape    {d.name}: {d.first}, {d.second}"
    types = f" {d.first}, {d.second}:" if d.kind == "dtype" else ""
    if not d.elements:
        return f"{d.kind:<8} {d.name}:{types} the same numbers"
    most = f"by at most {d.absolute:.3g}, {d.relative:.3g} of the larger"
    return f"{d.kind:<8} {d.name}:{types} {d.elements} elements differ, {most}"

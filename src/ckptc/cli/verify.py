"""`ckptc verify`: a checkpoint against its source, or against the checksums noted while it was written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ckptc.cli import render
from ckptc.cli.progress import show_progress
from ckptc.diagnostics import fail

if TYPE_CHECKING:
    from ckptc.run.verify import Verified

SHOWN = 20  # names of linked arrays


def verify(args: argparse.Namespace) -> None:
    from ckptc import api

    target, proved = Path(args.target), ""
    with show_progress(enabled=not args.quiet and not args.json) as on_progress:
        if target.is_dir() or not (target.exists() or target.suffix == ".json"):  # a plan's name, most likely
            _refuse_options(args)
            against = "checksums"
            verified = api.verify(target, jobs=args.jobs, on_progress=on_progress, on_step=render.say_step)
        else:
            plan, against = api.Plan.load(target), "source"
            if args.output is None:
                raise fail(
                    "no-output",
                    "the checkpoint to verify is not named",
                    help=f"`ckptc verify {target} --output DIR`, with the directory that `ckptc run` was given",
                )
            verified = api.verify(
                args.output,
                plan,
                source=args.source,
                mapping=args.mapping,
                jobs=args.jobs,
                on_progress=on_progress,
                on_step=render.say_step,
            )
            proved = _meaning(plan.made.model, args.mapping)
    record: dict[str, object] = {"arrays": verified.arrays, "bytes": verified.bytes, "against": against}
    if verified.linked:
        record |= {"linked_arrays": verified.linked, "linked_bytes": verified.linked_bytes}
    if proved:
        record["proved"] = proved
    print(json.dumps(record) if args.json else line(verified, against) + (f"\n{proved}" if proved else ""))


def _meaning(model: str, mapping: str | None) -> str:
    from ckptc.prove.record import said
    from ckptc.spec.mapping import find_model, load_mapping

    path = Path(mapping) if mapping else None
    return said(*find_model(model, (load_mapping(path),) if path else None), path)


def line(verified: Verified, against: str) -> str:
    """What was found, for people."""
    right = "each bit is what the source gives" if against == "source" else "each has the checksum it was written with"
    summed, count = verified.arrays - len(verified.linked), verified.bytes - verified.linked_bytes
    lines = [f"verified {summed} arrays, {render.size(count)}: {right}"]
    if verified.linked:
        size, number = render.size(verified.linked_bytes), len(verified.linked)
        lines += [
            f"linked, without checksums: {number} arrays, {size}; their files have the size and the time of change that "
            "they had, and `ckptc verify PLAN --output DIR` compares the values:",
            *(f"  {name}" for name in verified.linked[:SHOWN]),
        ]
        lines += [f"  and {number - SHOWN} more, which --json lists"] if number > SHOWN else []
    return "\n".join(lines)


def _refuse_options(args: argparse.Namespace) -> None:
    given = [option for option in ("output", "source", "mapping") if getattr(args, option) is not None]
    if given:
        raise fail(
            "unused-option",
            f"--{given[0]} goes with a plan, and {args.target} is a directory",
            help="`ckptc verify PLAN --output DIR` compares with the source; `ckptc verify DIR` checks the checksums",
        )

"""`ckptc verify`: a checkpoint against its source, or against the checksums noted while it was written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ckptc.cli import render
from ckptc.cli.progress import show_progress
from ckptc.diagnostics import fail
from ckptc.plan.model import Orbax, Plan

if TYPE_CHECKING:
    from ckptc.run.verify import Verified
    from ckptc.run.work import Progress
    from ckptc.storage.source.base import Source

SHOWN = 20  # names of linked arrays


def verify(args: argparse.Namespace) -> None:
    target = Path(args.target)
    with show_progress(enabled=not args.quiet and not args.json) as on_progress:
        if target.is_dir() or not (target.exists() or target.suffix == ".json"):  # a plan's name, most likely
            _refuse_options(args)
            verified, against = _sums(_found(target), on_progress), "checksums"
        else:
            from ckptc.cli.commands import read_plan
            from ckptc.storage.source.base import opened

            plan, _ = read_plan(target)
            if args.output is None:
                raise fail(
                    "no-output",
                    "the checkpoint to verify is not named",
                    help=f"`ckptc verify {target} --output DIR`, with the directory that `ckptc run` was given",
                )
            step = _found(Path(args.output))
            source = opened(args.source) if args.source else None
            verified, against = against_source(plan, step, source, args.mapping, on_progress), "source"
    record: dict[str, object] = {"arrays": verified.arrays, "bytes": verified.bytes, "against": against}
    if verified.linked:
        record |= {"linked_arrays": verified.linked, "linked_bytes": verified.linked_bytes}
    print(json.dumps(record) if args.json else line(verified, against))


def _found(given: Path) -> Path:
    """The items of the checkpoint that was named; says which of several steps that is."""
    from ckptc.storage.checkpoint.steps import find_step

    step = find_step(given)
    render.say_step(given, step.said)
    return step.items


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


def against_source(
    plan: Plan, step: Path, source: Source | Path | None, mapping: str | None, on_progress: Callable[[Progress], None]
) -> Verified:
    """Compares the checkpoint in `step` with the plan's source, through ops of the plan's mapping (`mapping`: its file,
    where it is not a shipped one). Raises InputError for what differs, and for a mapping or source that is another one.
    """
    from ckptc.compile.recompile import recompiled_graph
    from ckptc.ir.source import SourceFile
    from ckptc.run.preflight import check_source
    from ckptc.run.runner import find_source
    from ckptc.run.verify import compare
    from ckptc.run.work import Progress
    from ckptc.spec.mapping import find_model, load_mapping
    from ckptc.storage.checkpoint.safetensors import open_checkpoint

    if not isinstance(plan.layout, Orbax):
        raise fail("not-verified", "only conversions to Orbax are verified against their source")
    found = find_source(plan, source)
    check_source(plan, found, [SourceFile(f.name, f.size, f.header, f.content) for f in plan.sources[0].files])
    mappings = (load_mapping(Path(mapping)),) if mapping else None
    graph = recompiled_graph(plan, *find_model(plan.made.model, mappings), open_checkpoint(found))
    names = [f.name for f in plan.sources[0].files]
    return compare(graph, names, found, step, lambda done, total, name: on_progress(Progress(done, total, name)))


def _sums(step: Path, on_progress: Callable[[Progress], None]) -> Verified:
    from ckptc.run.verify import check_sums
    from ckptc.run.work import Progress

    return check_sums(step, lambda done, total, name: on_progress(Progress(done, total, name)))


def _refuse_options(args: argparse.Namespace) -> None:
    given = [option for option in ("output", "source", "mapping") if getattr(args, option) is not None]
    if given:
        raise fail(
            "unused-option",
            f"--{given[0]} goes with a plan, and {args.target} is a directory",
            help="`ckptc verify PLAN --output DIR` compares with the source; `ckptc verify DIR` checks the checksums",
        )

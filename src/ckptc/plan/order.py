"""The order of work: units sorted by where their first element lies, so that sources are read forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from ckptc.ops.nest import Part, restrict_part
from ckptc.ops.types import itemsize
from ckptc.plan import links
from ckptc.plan.model import Box, Kind, Output, Plan


class Unit(NamedTuple):
    """What is read at once: the same box of each of some outputs of a kind."""

    outputs: tuple[int, ...]  # positions in `Plan.outputs`
    box: Box


def units(plan: Plan) -> Iterator[Unit]:
    """Every unit of the plan that is made."""
    for batch in plan.batches or ((n,) for n in range(len(plan.outputs))):
        for box in links.made(plan.kinds[plan.outputs[batch[0]].kind]):
            yield Unit(batch, box)


def kind_of(plan: Plan, unit: Unit) -> Kind:
    return plan.kinds[plan.outputs[unit.outputs[0]].kind]


def written(plan: Plan, unit: Unit) -> int:
    """Bytes that a unit makes."""
    size = prod(high - low for low, high in unit.box) * itemsize(kind_of(plan, unit).dtype)
    return size * len(unit.outputs)


def forwards(plan: Plan) -> list[Unit]:
    """Every unit of the plan that is made. Tensors are numbered as they lie in the files, so a tensor's number and an
    offset order reads."""
    found = []
    mains = [_main(kind.parts) for kind in plan.kinds]
    offsets = [_offsets(kind) for kind in plan.kinds]
    for unit in units(plan):
        first = plan.outputs[unit.outputs[0]]
        main = mains[first.kind]
        inside = restrict_part(main, unit.box) if main else []
        where = (len(plan.tensors), 0)
        if main is not None and main.source is not None and (inside or plan.batches):
            part = inside[0] if inside else main
            where = _place(first, main.source, part, offsets[first.kind])
        found.append((*where, unit))
    found.sort()
    return [unit for *_, unit in found]


def _place(output: Output, source: int, part: Part, offsets: Sequence[int]) -> tuple[int, int]:
    begin = output.begins[source] if output.begins else 0
    return output.tensors[offsets[source] + part.first], part.base + begin


def _offsets(kind: Kind) -> list[int]:
    """Where each source's tensors begin in an output's list."""
    out, at = [], 0
    for source in kind.sources:
        out.append(at)
        at += source.rows
    return out


def _main(parts: Sequence[Part]) -> Part | None:
    """The largest part that reads."""
    return max((p for p in parts if p.source is not None), key=lambda p: p.size, default=None)

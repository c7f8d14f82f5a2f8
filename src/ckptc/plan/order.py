"""The order of work: units sorted by where their first byte lies, so that files are read forwards."""

from __future__ import annotations

from typing import NamedTuple

from ckptc.ops.nest import restrict_part
from ckptc.plan import links
from ckptc.plan.model import Box, Plan


class Unit(NamedTuple):
    array: int  # position in Plan.arrays
    box: Box


def forwards(plan: Plan) -> list[Unit]:
    """Every unit of the plan that is made. Tensors are numbered as they lie in the files, so a tensor's number and an offset order reads."""
    keyed = []
    for number, array in enumerate(plan.arrays):
        main = max((p for p in array.parts if p.source is not None), key=lambda p: p.size, default=None)
        for box in links.made(array):
            found = restrict_part(main, box) if main else []
            if main is not None and found:
                source = array.sources[main.source or 0]
                keyed.append((source.tensors[found[0].first], found[0].base, number, box))
            else:
                keyed.append((len(plan.tensors), 0, number, box))
    keyed.sort()
    return [Unit(number, box) for _, _, number, box in keyed]

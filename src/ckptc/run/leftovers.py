"""What no output has a place for, looked at once all are made: padding that training has changed is counted, and where
sources hold an output twice, the second is compared with the one that was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from ckptc.ops.nest import restrict_part
from ckptc.ops.types import itemsize
from ckptc.plan.model import Array, Box, Kind, Padding, Plan
from ckptc.plan.regions import Region, indices, padding_region
from ckptc.run.worker import Values, Worker, target_loops

SLAB = 64 << 20  # bytes of padding looked at at once

ReadBack = Callable[[str, Box, Values], None]  # an output's name, a box of it, and where it goes as it was written


def twin_differs(plan: Plan, number: int, worker: Worker, read_back: ReadBack) -> bool:
    """Whether a source says other things of an output than the one that was taken."""
    twin = plan.twins[number]
    kind = plan.kinds[twin.kind]
    array = Array.of(kind, twin)
    for box in kind.units():
        for piece, values in worker.pieces(array, box):
            taken = np.empty_like(values)
            read_back(twin.name, piece, taken)
            covered = _covered(kind, piece)
            if not np.array_equal(values[covered], taken[covered], equal_nan=True):
                return True
    return False


def trained_rows(plan: Plan, number: int, worker: Worker) -> int:
    """How many rows of a padding have other values than padding has."""
    padding = plan.padding[number]
    most = min(plan.choices.memory // 4, SLAB)
    return sum(_trained_rows(padding, worker, *slab) for slab in _slabs(padding, most))


def _trained_rows(padding: Padding, worker: Worker, low: int, high: int) -> int:
    """How many of the rows from `low` up to `high` are not what padding is."""
    axes = list(padding_region(padding).axes)
    at = [indices(a) - a.start for a in padding.axes]
    if axes:
        axes[padding.axis] = (low, 1, high - low)
        own = indices(padding.axes[padding.axis])
        at[padding.axis] = own[(own >= low) & (own < high)] - low
    region = Region(tuple(axes))
    values = worker.stored_box(padding.tensor, padding.array, region)
    if any(len(own) < n for own, n in zip(at, region.shape, strict=True)):
        values = values[np.ix_(*at)]  # padding between other rows
    wrong = values != np.asarray(padding.value).astype(values.dtype)
    others = tuple(a for a in range(wrong.ndim) if a != padding.axis)
    return int(np.count_nonzero(wrong.any(axis=others))) if wrong.ndim else int(wrong)


def _slabs(padding: Padding, most: int) -> Iterator[tuple[int, int]]:
    """Rows of the array that hold all of the padding's, in slabs of at most `most` bytes or a row."""
    if not padding.axes:
        yield 0, 1
        return
    region = padding_region(padding)
    low, _, count = region.axes[padding.axis]
    row = region.size // count * itemsize(padding.array.dtype)
    step = max(1, most // row)
    for at in range(low, low + count, step):
        yield at, min(at + step, low + count)


def _covered(kind: Kind, box: Box) -> npt.NDArray[np.bool_]:
    """Which elements of a box the kind's parts speak of."""
    shape = tuple(high - low for low, high in box)
    out: npt.NDArray[Any] = np.zeros(prod(shape), dtype=np.bool_)
    for part in kind.parts:
        for inside in restrict_part(part, box):
            loops, at = target_loops(replace(inside, base=0), shape)
            places = np.array([at])
            for loop in loops:
                places = (places[:, None] + np.arange(loop.size) * loop.target).ravel()
            out[places] = True
    return out.reshape(shape)

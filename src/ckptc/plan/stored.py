"""Large chunks, which are made and written piece by piece: how a piece lies in its chunk, and where each chunk lies.

An array with `stored` has chunks of that shape in the checkpoint, each made of pieces of the shape `chunk`. A chunk's axes
are stored in an order in which every piece is a run of bytes: first the axes that are cut, with the one of which a piece
has more than one index behind those of which it has one; then the axes that are not cut.

All large chunks of a checkpoint lie in one file, at places that follow from the plan alone. So any worker of any process
writes any piece, in any order, and what an interrupted run has written is where the next one expects it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ckptc.ops.types import itemsize
from ckptc.plan.model import Array, Plan

ALIGN = 4096  # bytes: every chunk begins with a page, or a block of the disk


def axis_order(chunk: Sequence[int], stored: Sequence[int]) -> tuple[int, ...] | None:
    """The axes, slowest first, in the order in which a large chunk is stored; None where that is their own.

    Raises ValueError where pieces are no runs of bytes in any such order.
    """

    def rank(axis: int) -> int:
        return 2 if chunk[axis] == stored[axis] else 1 if chunk[axis] > 1 else 0

    if sum(rank(a) == 1 for a in range(len(chunk))) > 1:
        raise ValueError(f"pieces {list(chunk)} are no runs of bytes in chunks {list(stored)}")
    order = sorted(range(len(chunk)), key=rank)
    moving = [a for a in order if stored[a] > 1]  # axes of one index may be anywhere
    return None if moving == sorted(moving) else tuple(order)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the large chunks of one array lie in the file."""

    begin: int  # bytes from the file's start to the first chunk
    step: int  # bytes from one chunk to the next, row-major in the grid
    grid: tuple[int, ...]  # of stored chunks
    ratio: tuple[int, ...]  # pieces in a chunk, along each axis
    weights: tuple[int, ...]  # of each axis, bytes from one piece to the next in a chunk

    def at(self, index: Sequence[int]) -> int:
        """Where a piece begins; `index`: its place in the grid of pieces."""
        cell = offset = 0
        for i, n, r, w in zip(index, self.grid, self.ratio, self.weights, strict=True):
            cell, offset = cell * n + i // r, offset + i % r * w
        return self.begin + cell * self.step + offset

    @property
    def end(self) -> int:
        return self.begin + prod(self.grid) * self.step


def places(plan: Plan) -> dict[int, Places]:
    """Of each array that has large chunks, by its position in the plan, where they lie."""
    out: dict[int, Places] = {}
    at = 0
    for number, array in enumerate(plan.arrays):
        if array.stored:
            found = out[number] = _places(array, at)
            at = found.end
    return out


def _places(array: Array, begin: int) -> Places:
    chunk, stored = array.chunk, array.stored
    order = axis_order(chunk, stored) or range(len(chunk))
    weights, weight = [0] * len(chunk), itemsize(array.dtype)
    for axis in reversed(order):
        weights[axis] = weight * chunk[axis]
        weight *= stored[axis]
    grid = tuple(-(-n // s) for n, s in zip(array.shape, stored, strict=True))
    ratio = tuple(-(-s // c) for s, c in zip(stored, chunk, strict=True))
    return Places(begin, -(-weight // ALIGN) * ALIGN, grid, ratio, tuple(weights))


def file_bytes(plan: Plan) -> int:
    """The size of the file that holds all large chunks; 0 where there are none."""
    return max((p.end for p in places(plan).values()), default=0)

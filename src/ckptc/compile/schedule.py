"""schedule: how each array is stored and in which units it is made, so that memory is a number and not luck.

Before: an array [embed=4096, layer=32, mlp=14336] of parts. After: unit [4096, 1, 1024], chunk [256, 1, 1024]: one unit
is a slab of whole rows of one source tensor, read in one piece and written as 16 whole chunks, one per shard.

The rule: grow the unit along the target's axes in the order in which the source stores them, fastest first and stacked
tensors last, until the budget is reached. So a unit reads contiguous bytes, each byte of the source is read by one
unit, and chunks never straddle units. A decoded source is decoded by whole rows, so axes that lie within its rows are
never cut: each row is decoded once. Where the largest unit still needs more than the budget (it meets several parts, or
rows it takes little of), units get smaller.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import isqrt, prod
from typing import NamedTuple

from ckptc.ops.nest import AxisMap, Part, restrict_part
from ckptc.ops.types import itemsize
from ckptc.plan import links
from ckptc.plan.model import Box, Content, Kind
from ckptc.plan.reads import in_order, need, plan_read, tensors_of

UNIT_SHARE = 3  # a worker uses at most this fraction of the memory budget, so that several can be at work
UNIT_MOST = 72 << 20  # and at most this many bytes, two reads of 32 MiB and two chunks: larger reads gain nothing
UNITS_MOST = 1 << 14  # units that an array is cut into for the budget's sake, beyond what its size asks for
ACCOUNTED_MOST = 50_000  # units of an array that are gone through, one by one; stacked tensors count once


def shard_counts(shape: tuple[int, ...], shards: int) -> tuple[int, ...]:
    """Shards along each axis: all on the first axis they divide, else the second, else none. As MaxText chooses."""
    for axis in range(min(2, len(shape))):
        if shape[axis] % shards == 0:
            return tuple(shards if i == axis else 1 for i in range(len(shape)))
    return (1,) * len(shape)


class TooManyUnitsError(ValueError):
    """The units of an array are so many that going through them takes minutes."""


def unit_budget(memory: int, compressed: bool = False) -> int:
    """Bytes of buffers that a worker may use under a memory budget: for the unit that is made, and the next one's reads.

    A chunk that is compressed is held twice more, encoded: that is at most what the unit itself uses.
    """
    most = min(memory // UNIT_SHARE, UNIT_MOST)
    return most // 2 if compressed else most


def stored_bytes(kind: Kind, compressed: bool) -> int:
    """Bytes of buffers in which a chunk gets the form that it is stored in: compressed (two), filled up where it reaches
    past the array's edge, in the order of axes that links have."""
    copies = 1 if kind.link is not None else 2 if compressed else 0
    copies += any(n % c for n, c in zip(kind.shape, kind.chunk, strict=True))
    return copies * prod(kind.chunk) * itemsize(kind.dtype)


@lru_cache(maxsize=4096)
def fit(
    content: Content, shards: tuple[int, ...], budget: int, whole: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The chunk and the unit of an array: no unit takes more than `budget` bytes of buffers, if a row fits.

    `whole`: shards are made of whole chunks, however small that makes them. Every axis is then divided by its shards.
    """
    shape, parts = content.shape, content.parts
    main, cost, row = main_part(parts), 2 * itemsize(content.dtype), 0
    if main is not None and main.source is not None:  # chunks are small then, as far as is known here
        needed = need(main, content.sources[main.source])
        cost = 2 * -(-(needed.read + needed.decoded_bytes) // main.size)
        row = needed.rows.layout.length if needed.rows else 0
    limit = max(1, budget // cost)
    best = last = _choose(shape, parts, shards, limit, row, whole)
    least = peak = _account(content, *last).buffers
    while least > budget and limit > 1:
        limit = max(1, min(limit * 9 // 10, limit * budget // peak))
        smaller = _choose(shape, parts, shards, limit, row, whole)
        if smaller[1] == last[1]:
            continue
        last = smaller
        if prod(-(-n // u) for n, u in zip(shape, last[1], strict=True)) > UNITS_MOST:
            break
        peak = _account(content, *last).buffers
        if peak < 0.95 * least:  # else it only reads the same more often
            best, least = last, peak
    return best


def choose(
    shape: tuple[int, ...], parts: tuple[Part, ...], shards: tuple[int, ...], element_cost: int, budget: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The chunk and the unit of an array. `element_cost` is bytes of buffers per element, `budget` bytes per unit."""
    return _choose(shape, parts, shards, max(1, budget // element_cost), 0, False)


def _choose(
    shape: tuple[int, ...], parts: tuple[Part, ...], shards: tuple[int, ...], limit: int, row: int, whole: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A chunk and a unit of at most `limit` elements, or of one row of `row` elements of the largest part's source."""
    main = main_part(parts)
    unit, chunk = [1] * len(shape), [1] * len(shape)
    for axis in fastest_first(shape, main, row):
        size, room = shape[axis], limit // prod(unit)
        share = size // shards[axis]
        if room >= size or (main is not None and _within_row(main.axes[axis], row)):
            unit[axis], chunk[axis] = size, share
        elif whole and room >= share:
            unit[axis], chunk[axis] = share * _portion(shards[axis], room // share), share
        else:
            # Cut where chunks stay equal: within a shard.
            unit[axis] = chunk[axis] = _portion(share, room, whole and shards[axis] > 1)
    return tuple(chunk), tuple(unit)


def _within_row(axis: AxisMap, row: int) -> bool:
    """Whether all of an axis lies within rows of `row` elements."""
    return bool(axis.factors) and all(f.tensor == 0 and f.step < row for f in axis.factors)


def _portion(size: int, room: int, whole: bool = False) -> int:
    """How much of an axis fits in `room`: its largest divisor that does, unless that wastes most of the room; with
    `whole`, even then."""
    if size <= room:
        return size
    room = max(1, room)
    if whole:
        pairs = ((k, size // k) for k in range(1, isqrt(size) + 1) if size % k == 0)
        return max(n for pair in pairs for n in pair if n <= room)
    even = -(-size // -(-size // room))  # nearly equal portions, the last one smaller
    fewest = -(-size // room)
    enough = range(fewest, min(2 * size // even + 1, fewest + ACCOUNTED_MOST))  # portions of more than half of that
    return next((size // k for k in enough if size % k == 0 and size // k * 2 > even), even)


def fastest_first(shape: tuple[int, ...], main: Part | None, row: int = 0) -> list[int]:
    """The axes in the order in which the largest part's source stores them, those within a row of it first."""
    if main is None:
        return list(reversed(range(len(shape))))

    def order(axis: int) -> tuple[int, int]:
        factors = main.axes[axis].factors
        stacked = [f.tensor for f in factors if f.tensor]
        if stacked:
            return (2, max(stacked))
        steps = [f.step for f in factors if f.step]
        return (0 if not row or max(steps, default=0) < row else 1, min(steps, default=0))

    return sorted(range(len(shape)), key=order)


def read_ratio(parts: tuple[Part, ...]) -> float:
    """Elements read for each element needed, in the largest part: above 1 where a run is read with gaps."""
    main = main_part(parts)
    return plan_read(main).size * len(tensors_of(main)) / main.size if main else 0.0


class Account(NamedTuple):
    """What the units of an array take. A worker keeps its buffers, and so has the largest of each sort at once."""

    read: int  # bytes that all units read
    held: int  # bytes of a buffer for what a unit reads and decodes, at most; there are two, for the next one is read
    made: int  # bytes of buffers that its chunks are made in: two of them, for one is written while the next is made

    @property
    def buffers(self) -> int:
        return 2 * self.held + self.made


def account(kind: Kind) -> Account:
    """What the units of an array of a kind take."""
    return _account(kind.content, kind.chunk, kind.unit)


@lru_cache(maxsize=4096)
def _account(content: Content, chunk: tuple[int, ...], unit: tuple[int, ...]) -> Account:
    read, held, made, shape = 0, 0, 0, content.shape
    axes, times = _repeated(shape, unit, content.parts)
    ranges = [range(1) if a in axes else range(0, n, u) for a, (n, u) in enumerate(zip(shape, unit, strict=True))]
    if prod(map(len, ranges)) > ACCOUNTED_MOST:
        raise TooManyUnitsError
    for corner in product(*ranges):
        box = tuple((c, min(c + u, n)) for c, u, n in zip(corner, unit, shape, strict=True))
        inside = [p for part in content.parts for p in restrict_part(part, box)]
        needs = [need(p, content.sources[p.source]) for p in inside if p.source is not None]
        read += sum(n.read for n in needs) * times
        held = max(held, sum(n.memory for n in needs))
        if not (chunk == unit and _ready(inside, box, content)):
            largest = prod(min(c, high - low) for c, (low, high) in zip(chunk, box, strict=True))
            made = max(made, 2 * largest * itemsize(content.dtype))
    return Account(read, held, made)


def _ready(inside: list[Part], box: Box, content: Content) -> bool:
    """Whether a unit of one chunk is written from where it was read."""
    shape = [high - low for low, high in box]
    return len(inside) == 1 and links.plain(inside[0], content) and in_order(inside[0], shape)


def _repeated(shape: tuple[int, ...], unit: tuple[int, ...], parts: tuple[Part, ...]) -> tuple[set[int], int]:
    """Axes along which every unit reads alike (stacked tensors), and how many units that makes of one."""
    axes, times = set(), 1
    for axis, (n, u) in enumerate(zip(shape, unit, strict=True)):
        if n % u == 0 and all(_stacked(p, axis, n) for p in parts):
            axes.add(axis)
            times *= n // u
    return axes, times


def _stacked(part: Part, axis: int, size: int) -> bool:
    factors = part.axes[axis].factors
    return part.axes[axis].start == 0 and len(factors) == 1 and factors[0].size == size and factors[0].step == 0


def main_part(parts: tuple[Part, ...]) -> Part | None:
    return max((p for p in parts if p.source is not None), key=lambda p: p.size, default=None)

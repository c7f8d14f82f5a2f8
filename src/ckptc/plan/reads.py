"""Which bytes a part of a target needs: contiguous runs of each source tensor, and of those beside it where it is decoded.

Used twice, so that what the plan announces is what the executor does: to count bytes when a plan is made, and to read
when it is run.

A plain source is read run by run, and its elements are copied from where they were read. A decoded source is needed by
whole rows: their codes and their rows of the tensors beside them are read, and each row is decoded once, into float32
rows that lie one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.ops.codes import RowLayout, Setting, code_of
from ckptc.ops.nest import Factor, Part
from ckptc.ops.types import itemsize
from ckptc.plan.model import Stored

WASTE = 2  # a run may be read with gaps as long as it is at most this many times the bytes needed
GAP = 1 << 14  # elements: a longer gap is skipped, since a read of its own costs less than reading over it
ALIGN = 16  # bytes: where a section of a buffer begins, whatever lies before it

Loops = tuple[tuple[int, int], ...]  # (count, step), outermost first
Runs = list[tuple[int, int]]  # (first, length)
Numbers = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Read:
    """`count` ranges of `length` elements, at `start` + Σ i·step over `loops`, of one tensor. Read one after the other,
    they are the elements the part needs, in the tensor's order, with gaps only inside a run."""

    start: int  # elements from the tensor's start
    length: int
    loops: Loops

    @property
    def count(self) -> int:
        return prod(count for count, _ in self.loops)

    @property
    def size(self) -> int:
        """Elements read."""
        return self.length * self.count

    def runs(self) -> Runs:
        ranges = (range(0, count * step, step) for count, step in self.loops)
        return [(self.start + sum(offsets), self.length) for offsets in product(*ranges)]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a decoded tensor that a part needs, as they are decoded: `first` + Σ i·step over `loops`."""

    layout: RowLayout
    first: int
    loops: Loops
    column: int  # the part's first element, within its row
    steps: tuple[int, ...]  # of each of the part's element loops, where the decoded rows lie one after the other

    @property
    def count(self) -> int:
        return prod(count for count, _ in self.loops)

    @property
    def read(self) -> Read:
        """The runs of rows of codes. Counted in elements of the stored tensor."""
        n = self.layout.stored
        return _runs(self.first * n, [*((count, step * n) for count, step in self.loops), (n, 1)])

    def places(self) -> Numbers:
        """Where each row's codes lie in what `read` reads, counted in rows: int64[count]."""
        read, at = self.read, []
        step = read.size // self.layout.stored
        for count, _ in read.loops:
            step //= count
            at.append((count, step))
        return _walk(0, (*at, *self.loops[len(at) :]))

    def numbers(self) -> Numbers:
        """Each row's number in its tensor: int64[count]."""
        return _walk(self.first, self.loops)


@dataclass(frozen=True, slots=True)
class Need:
    """What a part reads of its source, the same of each tensor, and what it holds: sections of a buffer.

    Bytes are those of all tensors.
    """

    tensors: list[int]  # positions in the source's list, in the order of the part's loops
    values: Read
    value_bytes: int
    rows: Rows | None = None  # of a decoded source
    beside: list[BesideNeed] = field(default_factory=list)  # of each tensor beside the codes
    decoded_bytes: int = 0

    @property
    def read(self) -> int:
        """Bytes read."""
        return self.value_bytes + sum(b.bytes for b in self.beside)

    @property
    def memory(self) -> int:
        """Bytes of buffer: values as stored, what is beside them, decoded rows."""
        return sum(map(aligned, [self.value_bytes, *(b.bytes for b in self.beside), self.decoded_bytes]))


@dataclass(frozen=True, slots=True)
class BesideNeed:
    """What some rows need of a tensor beside their codes."""

    runs: Runs  # of elements
    places: Numbers  # where the row that each row has stands in what is read: int64[rows]
    bytes: int  # of all tensors


def need(part: Part, source: Stored) -> Need:
    """What a part needs of a source of which any range can be read."""
    tensors, decode = tensors_of(part), source.decode
    count, item = len(tensors), itemsize(source.dtype)
    if decode is None:
        values = plan_read(part)
        return Need(tensors, values, values.size * item * count)
    layout = layout_of(decode.code, decode.settings, decode.shape)
    rows = plan_rows(part, layout)
    numbers, beside = rows.numbers(), []
    for wanted, stored in zip(layout.beside, decode.beside, strict=True):
        own = layout.rows_of(wanted, numbers)
        runs, each = beside_runs(own), prod(stored.shape) // layout.count(wanted)
        elements = [(first * each, length * each) for first, length in runs]
        size = sum(length for _, length in elements) * itemsize(stored.dtype) * count
        beside.append(BesideNeed(elements, places_in(runs, own), size))
    decoded_bytes = rows.count * layout.length * itemsize("float32") * count
    return Need(tensors, rows.read, rows.read.size * item * count, rows, beside, decoded_bytes)


@lru_cache(maxsize=256)
def layout_of(code: str, settings: tuple[tuple[str, Setting], ...], shape: tuple[int, ...]) -> RowLayout:
    """The rows of a weight that is stored so."""
    return code_of(code, settings).layout(shape)


def aligned(size: int) -> int:
    """Bytes of a section of a buffer, rounded up so that the next section's elements are aligned."""
    return -(-size // ALIGN) * ALIGN


def element_loops(part: Part) -> list[Factor]:
    """The part's loops that move within a tensor, largest step first."""
    loops = [f for axis in part.axes for f in axis.factors if f.tensor == 0 and f.step != 0]
    return sorted(loops, key=lambda f: -f.step)


def tensor_loops(part: Part) -> list[Factor]:
    """The part's loops over the list of tensors."""
    return [f for axis in part.axes for f in axis.factors if f.tensor != 0]


def tensors_of(part: Part) -> list[int]:
    """Positions in the source's list of the tensors that the part reads, in the order of its loops."""
    ranges = (range(0, f.size * f.tensor, f.tensor) for f in tensor_loops(part))
    return [part.first + sum(offsets) for offsets in product(*ranges)]


def plan_read(part: Part) -> Read:
    """The runs that hold the part's elements in each tensor it reads."""
    return _runs(part.base, [(f.size, f.step) for f in element_loops(part)])


def in_order(part: Part, shape: Sequence[int]) -> bool:
    """Whether what is read of a part, of one tensor after the other, is a row-major array of this shape."""
    loops = [f for axis in part.axes for f in axis.factors if f.size > 1]
    as_read = [f for f in (*tensor_loops(part), *element_loops(part)) if f.size > 1]
    return loops == as_read and prod(shape) == part.size == plan_read(part).size * len(tensors_of(part))


def _runs(start: int, loops: Sequence[tuple[int, int]]) -> Read:
    """From the innermost loop outwards, a loop joins the run while its gaps are short and within WASTE."""
    needed, extent, outer = 1, 1, len(loops)
    while outer > 0:
        count, step = loops[outer - 1]
        grown, wanted = (count - 1) * step + extent, needed * count
        if grown > WASTE * wanted or step - extent > GAP:
            break
        needed, extent, outer = wanted, grown, outer - 1
    return Read(start, extent, tuple(loops[:outer]))


def plan_rows(part: Part, layout: RowLayout) -> Rows:
    """The rows that hold the part's elements in each tensor it reads.

    Where the part's walk along a row never leaves the row, these are exactly the rows with an element it needs. Where
    it does (a tensor flattened and cut at other places than its rows), the loops that do not step by whole rows are
    covered by all the rows they span.
    """
    length, loops = layout.length, element_loops(part)
    first, column = divmod(part.base, length)
    if column + sum((f.size - 1) * (f.step % length) for f in loops) < length:
        outer, spanned = [f for f in loops if f.step >= length], 1
    else:
        outer, inner = [f for f in loops if f.step % length == 0], [f for f in loops if f.step % length]
        spanned = (column + sum((f.size - 1) * f.step for f in inner)) // length + 1
        while outer and outer[-1].step // length < spanned:  # its rows overlap: one span for all
            f = outer.pop()
            spanned += (f.size - 1) * (f.step // length)
    moved: dict[Factor, int] = {}
    place = spanned
    for f in reversed(outer):
        moved[f] = place * length + f.step % length
        place *= f.size
    over = [(f.size, f.step // length) for f in outer] + ([(spanned, 1)] if spanned > 1 else [])
    return Rows(layout, first, tuple(over), column, tuple(moved.get(f, f.step) for f in loops))


def beside_runs(numbers: Numbers) -> Runs:
    """The runs of rows beside the codes that hold the given ones: one with gaps, within WASTE, or those without."""
    rows = np.unique(numbers)
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 <= WASTE * len(rows):
        return [(first, last - first + 1)]
    cuts = [0, *(np.flatnonzero(np.diff(rows) > 1) + 1).tolist(), len(rows)]
    return [(int(rows[a]), b - a) for a, b in pairwise(cuts)]


def places_in(runs: Runs, numbers: Numbers) -> Numbers:
    """Where numbers that lie in `runs` stand when the runs are put one after the other: int64[n] -> int64[n]."""
    firsts = np.array([first for first, _ in runs])
    before = np.cumsum([0] + [length for _, length in runs[:-1]])
    run = np.searchsorted(firsts, numbers, side="right") - 1
    places: Numbers = numbers - firsts[run] + before[run]
    return places


def _walk(start: int, loops: Iterable[tuple[int, int]]) -> Numbers:
    """start + Σ i·step for all iterations of the loops, the first one slowest: int64[n]."""
    out: Numbers = np.array([start], dtype=np.int64)
    for count, step in loops:
        out = (out[:, None] + np.arange(count, dtype=np.int64) * step).ravel()
    return out

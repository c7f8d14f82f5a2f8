"""Decoding rows of codes into float32: a table says what each byte stands for, then rows are multiplied by factors.

What stands in the tables, and which factors a row has, is the code's business (`ckptc.ops.codes`). The work goes block by
block, a few rows at a time, so that the indices and the factors of a block stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from ckptc.ops.codes import Code, Factors, RowLayout, Shape
from ckptc.ops.nest import AxisMap, Part
from ckptc.ops.types import itemsize, numpy_dtype
from ckptc.plan.reads import Numbers, Rows, element_loops, tensor_loops

Array = npt.NDArray[Any]

BLOCK = 1 << 15  # elements of a block at most: with indices and factors it stays within a core's cache
MOVED = {1: np.float32, 2: np.complex64, 4: np.complex128}  # what the numbers of a byte are looked up as, in one


class BesideRows(NamedTuple):
    """What was read of a tensor beside the codes, of all tensors one after the other, and where each row's part of it is."""

    data: Array  # flat
    places: Numbers  # int64[rows]
    each: int  # elements of a row
    whole: bool  # whether all rows have the same one


@dataclass(frozen=True, slots=True)
class Coded:
    """How a source's tensors are stored."""

    code: Code
    shape: Shape  # of the weight
    dtype: str  # of the codes


class Decoder:
    """Decodes with its own scratch memory; one for each thread.

    `scratch_bytes` is what it keeps; besides, the factors of a block and lists of row numbers come and go.
    """

    def __init__(self, block: int = BLOCK) -> None:
        self._block = max(1, block)
        self._index = np.empty(max(64, block), dtype=np.intp)
        self.scratch_bytes = self._index.nbytes

    def decode(self, how: Coded, rows: Rows, codes: Array, beside: Sequence[BesideRows], out: Array) -> None:
        """The rows of each of some tensors, one tensor after the other.

        All arrays are flat. `codes` is uint8, the runs of each tensor that `rows.read` names; `out` is
        float32[tensors · rows.count · layout.length]. Products beyond float32 are infinite, as in any multiplication.
        Raises OpError where tensors beside the codes hold what their format does not allow.
        """
        layout, places, numbers = rows.layout, rows.places(), rows.numbers()
        tensors = out.size // (rows.count * layout.length)
        stored = codes.reshape(tensors, -1, layout.stored * itemsize(how.dtype))
        held = [b.data.reshape(tensors, -1, b.each) for b in beside]
        made = out.reshape(tensors, rows.count, layout.length)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for number in range(tensors):
                own = [b._replace(data=data[number]) for b, data in zip(beside, held, strict=True)]
                self._tensor(how, layout, stored[number], places, numbers, own, made[number])

    def _tensor(
        self,
        how: Coded,
        layout: RowLayout,
        codes: Array,
        places: Numbers,
        numbers: Numbers,
        beside: Sequence[BesideRows],
        out: Array,
    ) -> None:
        code, length = how.code, layout.length
        values = code.table(how.dtype, [b.data for b in beside])
        each = values.shape[1]  # numbers of a byte
        table: Array = np.ascontiguousarray(values).view(MOVED[each]).reshape(256)
        step = max(1, self._block // max(code.unit, each)) * max(code.unit, each)
        most = max(1, self._block // length)
        evenly = _evenly(places)
        codes = codes if evenly is None else codes[evenly]  # a view of the rows
        for low, high, shared in self._ranges(code, beside, len(places), most, length):
            own = slice(low, low + 1 if shared else high)
            parts = [b.data if b.whole else b.data[b.places[own]] for b in beside]
            factors = code.factors(how.shape, numbers[own], parts)
            for begin in range(0, length, step):
                end = min(begin + step, length)
                scales, zeros = _spread(factors, begin, end)
                for first in range(low, high, most):
                    last = min(first + most, high)
                    part, of = out[first:last, begin:end], slice(None) if shared else slice(first - low, last - low)
                    which = slice(first, last) if evenly is not None else places[first:last]
                    self._look_up(table, code.order(codes[which, begin // each : -(-end // each)]), part)
                    if zeros is not None:
                        np.subtract(part, zeros[of], out=part)
                    np.multiply(part, scales[of], out=part)
                    if code.rounds:
                        np.copyto(part, part.astype(numpy_dtype(code.rounds)), casting="unsafe")

    def _look_up(self, table: Array, codes: Array, out: Array) -> None:
        index = self._index[: codes.size].reshape(codes.shape)
        np.copyto(index, codes)
        # Every index is in the table; by default numpy would check, in a copy of the result.
        np.take(table, index, out=out.view(table.dtype), mode="wrap")

    def _ranges(
        self, code: Code, beside: Sequence[BesideRows], rows: int, most: int, length: int
    ) -> Iterator[tuple[int, int, bool]]:
        """Ranges of rows that share their factors, which are spread over a row once for all; where that saves little,
        ranges of at most `most` rows, each with its own."""
        changes = np.zeros(max(0, rows - 1), dtype=bool)
        for b in beside:
            changes |= np.diff(b.places) != 0
        cuts = (np.flatnonzero(changes) + 1).tolist()
        ranges = len(cuts) + 1
        shared = not code.by_row and rows >= 2 * ranges and rows * length * 8 >= ranges * self._block
        bounds = [0, *cuts, rows] if shared else [*range(0, rows, most), rows]
        for low, high in pairwise(bounds):
            yield low, high, shared


def _spread(factors: Factors, begin: int, end: int) -> tuple[Array, Array | None]:
    """Scales and zeros of each element of a stretch of rows; one for all of it stays one."""
    group = factors.group
    groups = slice(begin // group, -(-end // group))
    if factors.scales.shape[1] == 1 or groups.stop - groups.start == 1:
        groups = slice(groups.start, groups.start + 1) if factors.scales.shape[1] > 1 else slice(0, 1)
        return factors.scales[:, groups], None if factors.zeros is None else factors.zeros[:, groups]
    if group == 1:
        return factors.scales[:, groups], None if factors.zeros is None else factors.zeros[:, groups]
    edges = np.arange(groups.start, groups.stop + 1) * group
    lengths = np.diff(edges.clip(begin, end))
    counts: int | Array = lengths if (lengths != group).any() else group
    scales = np.repeat(factors.scales[:, groups], counts, axis=1)
    return scales, None if factors.zeros is None else np.repeat(factors.zeros[:, groups], counts, axis=1)


def _evenly(places: Numbers) -> slice | None:
    """The places as a slice, if they follow each other evenly."""
    first, last = int(places[0]), int(places[-1])
    step = int(places[1]) - first if len(places) > 1 else 1
    return slice(first, last + 1, step) if step > 0 and (np.diff(places) == step).all() else None


def packed_rows(part: Part, rows: Rows) -> Part:
    """The part's steps in a buffer of decoded rows: those of one tensor one after the other, then the next tensor's."""
    steps = dict(zip(element_loops(part), rows.steps, strict=True))
    step = rows.count * rows.layout.length
    for f in reversed(tensor_loops(part)):
        steps[f] = step
        step *= f.size
    axes = tuple(
        AxisMap(a.start, tuple(replace(f, step=steps.get(f, f.step), tensor=0) for f in a.factors)) for a in part.axes
    )
    return replace(part, base=rows.column, first=0, axes=axes)

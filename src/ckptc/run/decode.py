"""Decoding rows of codes into float32: a table says what each byte stands for, then rows are multiplied by scales.

One product for each element, in float32, as the ops say (`ckptc.ops.dequant`). The work goes block by block, a few rows
at a time, so that the indices and the scales of a block stay in a core's cache.

Formats: OCP 8-bit floating point 1.0 (e4m3, e5m2), scaled in blocks as in the DeepSeek-V3 repository's
README_WEIGHTS.md; OCP Microscaling Formats (MX) 1.0 (e2m1 in pairs, the low four bits first, and e8m0).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from ckptc.ops.dequant import E2M1, RowLayout
from ckptc.ops.nest import AxisMap, Part
from ckptc.plan.reads import Numbers, Rows, element_loops, tensor_loops

Array = npt.NDArray[Any]

BLOCK = 1 << 15  # elements of a block at most: with indices and scales it stays within a core's cache


def _byte_values(dtype: type[Any]) -> Array:
    """float32[256]: what each byte stands for in an 8-bit dtype."""
    values: Array = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return values


def _pairs() -> Array:
    """float32[256, 2] as complex64[256]: the two e2m1 values of each byte, the low four bits first, moved as one."""
    codes = np.arange(256)
    values: Array = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=-1)
    pairs: Array = values.view(np.complex64).reshape(256)
    return pairs


# What a byte of a stored dtype stands for, and how many elements that is.
TABLES: dict[str, tuple[Array, int]] = {
    "float8_e4m3fn": (_byte_values(ml_dtypes.float8_e4m3fn), 1),
    "float8_e5m2": (_byte_values(ml_dtypes.float8_e5m2), 1),
    "uint8": (_pairs(), 2),
}
# Powers of two from 2^-127, which is subnormal, to 2^127; 255 is NaN. With e2m1 values every product in range is exact.
E8M0 = _byte_values(ml_dtypes.float8_e8m0fnu)


class Decoder:
    """Decodes with its own scratch memory; one for each thread.

    `scratch_bytes` is what it keeps; besides, the scales of a block and lists of row numbers come and go.
    """

    def __init__(self, block: int = BLOCK) -> None:
        self._block = max(2, block // 2 * 2)  # even: pairs stay whole
        self._index = np.empty(self._block, dtype=np.intp)
        self.scratch_bytes = self._index.nbytes

    def decode(self, rows: Rows, dtype: str, codes: Array, scales: Array, scale_places: Numbers, out: Array) -> None:
        """The rows of each of some tensors: values times scales, one tensor after the other.

        All arrays are flat. `codes` is uint8, the runs of each tensor that `rows.read` names, of the stored `dtype`;
        `scales` the rows of scales that were read of each, of any dtype scales have, and row i of a tensor has the
        `scale_places[i]`th of them; `out` is float32[tensors · rows.count · layout.length]. Products beyond float32 are
        infinite, as in any multiplication.
        """
        layout, places = rows.layout, rows.places()
        tensors = out.size // (rows.count * layout.length)
        each = TABLES[dtype][1]
        stacks = (
            codes.reshape(tensors, -1, layout.length // each),
            scales.reshape(tensors, -1, layout.scales),
            out.reshape(tensors, rows.count, layout.length),
        )
        with np.errstate(over="ignore", invalid="ignore"):
            for one_codes, one_scales, one_out in zip(*stacks, strict=True):
                self._decode_rows(layout, dtype, one_codes, places, one_scales, scale_places, one_out)

    def _decode_rows(
        self,
        layout: RowLayout,
        dtype: str,
        codes: Array,
        places: Numbers,
        scales: Array,
        scale_places: Numbers,
        out: Array,
    ) -> None:
        """out[i] = codes[places[i]] · scales[scale_places[i]]."""
        table, each = TABLES[dtype]
        most = max(1, self._block // layout.length)
        columns = list(self._columns(layout))
        evenly = _evenly(places)
        codes = codes if evenly is None else codes[evenly]  # a view of the rows
        for low, high, shared in self._ranges(scale_places, most, layout.length):
            own = as_float32(scales[scale_places[low : low + 1 if shared else high]])
            for begin, end, groups, counts in columns:
                wide = np.repeat(own[:, groups], counts, axis=1)
                for first in range(low, high, most):
                    last = min(first + most, high)
                    part = out[first:last, begin:end]
                    which = slice(first, last) if evenly is not None else places[first:last]
                    self._look_up(table, codes[which, begin // each : end // each], part)
                    np.multiply(part, wide, out=part)

    def _look_up(self, table: Array, codes: Array, out: Array) -> None:
        index = self._index[: codes.size].reshape(codes.shape)
        np.copyto(index, codes)
        # Every index is in the table; by default numpy would check, in a copy of the result.
        np.take(table, index, out=out.view(table.dtype), mode="wrap")

    def _ranges(self, scale_places: Numbers, most: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Ranges of rows that share their scales, which are spread over a row once for all; where that saves little,
        ranges of at most `most` rows, each with its own."""
        cuts = (np.flatnonzero(np.diff(scale_places)) + 1).tolist()
        rows, ranges = len(scale_places), len(cuts) + 1
        shared = rows >= 2 * ranges and rows * length * 8 >= ranges * self._block
        bounds = [0, *cuts, rows] if shared else [*range(0, rows, most), rows]
        for low, high in pairwise(bounds):
            yield low, high, shared

    def _columns(self, layout: RowLayout) -> Iterator[tuple[int, int, slice, int | Array]]:
        """A row in stretches of at most a block: [begin, end), their scales, and how many elements each serves."""
        group = layout.group
        for begin in range(0, layout.length, self._block):
            end = min(begin + self._block, layout.length)
            groups = slice(begin // group, -(-end // group))
            edges = np.arange(groups.start, groups.stop + 1) * group
            counts = np.diff(edges.clip(begin, end))
            yield begin, end, groups, counts if (counts != group).any() else group


def as_float32(scales: Array) -> Array:
    """Scales as numbers, exactly: float32 of the same shape. Bytes are e8m0."""
    if scales.dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
        return np.take(E8M0, scales.view(np.uint8))
    return scales.astype(np.float32)


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

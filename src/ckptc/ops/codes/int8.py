"""int8: whole numbers of eight bits, each a byte, times a scale for each group, or row, of a matrix, or for all of it.

Source of the format: compressed-tensors, `int-quantized` and `naive-quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np

from ckptc.ops.codes.base import (
    FLOATS,
    Array,
    Beside,
    Code,
    Factors,
    Found,
    RowLayout,
    Shape,
    Upload,
    matrix,
    per,
)
from ckptc.ops.codes.tables import signed


@dataclass(frozen=True, slots=True)
class Int8(Code):
    """(code - zero point) · scale, in float32.

    Codes int8 [out, in]; scales and zero points [out, groups], or of one element.
    """

    group: int
    zeros: bool = False
    flat: bool = False  # whether there is one scale, without axes or with one

    name = "int8"
    methods = ("compressed-tensors",)
    dtypes = ("int8",)
    uploads = tuple(
        Upload(".weight", ".weight", {"scales": ".weight_scale", **zeros})
        for zeros in ({"zero points": ".weight_zero_point"}, {})
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], module: str, found: Mapping[str, Found]) -> Self | None:
        (dtype, shape), scales = found[""], found["scales"].shape
        if dtype not in cls.dtypes:
            return None
        if len(scales) < 2 and prod(scales) > 1:
            return None
        return cls(
            per(shape[-1], max(1, scales[-1] if len(scales) > 1 else 1)), "zero points" in found, len(scales) < 2
        )

    def stored(self, shape: Shape) -> Shape:
        return matrix(shape, self.name)

    def layout(self, shape: Shape) -> RowLayout:
        out, n = matrix(shape, self.name)
        grid, blocks = ((1,), (out,)) if self.flat else ((out, per(n, self.group)), (1,))
        beside = [Beside("scales", FLOATS, grid, blocks)]
        if self.zeros:
            beside.append(Beside("zero points", ("int8", *FLOATS), grid, blocks))
        return RowLayout((out,), n, n, tuple(beside))

    def table(self, dtype: str, beside: Sequence[Array]) -> Array:
        return signed()

    def factors(self, shape: Shape, rows: Array, beside: Sequence[Array]) -> Factors:
        return Factors(beside[0].astype(np.float32), beside[1].astype(np.float32) if self.zeros else None, self.group)

    def forward(self, arrays: Sequence[Array], shape: Shape) -> Array:
        values = arrays[0].astype(np.float32)
        of = np.zeros(shape[1], int) if self.flat else np.arange(shape[1]) // self.group
        scales, *zeros = (np.atleast_2d(a.astype(np.float32))[:, of] for a in arrays[1:])
        return np.asarray((values - zeros[0] if zeros else values) * scales)

    def describe(self) -> str:
        return f"int8 in groups of {self.group}{' with zero points' if self.zeros else ''}"


Int8.examples = ((Int8(7), (4, 7)), (Int8(4, True), (3, 10)), (Int8(6, False, True), (5, 6)))

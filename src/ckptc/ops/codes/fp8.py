"""fp8: eight-bit floats times one scale for each block, each row, or all of a weight.

Sources of the format: OCP 8-bit floating point 1.0; the DeepSeek-V3 repository's README_WEIGHTS.md, on `weight_scale_inv`
(a factor, despite its name); the compressed-tensors format `float-quantized`; modelopt's `FP8`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np

from ckptc.ops.codes.base import Array, Beside, Code, Factors, Found, RowLayout, Shape, Upload, per
from ckptc.ops.codes.tables import as_float32, floats
from ckptc.ops.types import OpError

DEFAULT_BLOCK = (128, 128)  # of the publishers that say none


@dataclass(frozen=True, slots=True)
class Fp8(Code):
    """value · scale, in float32.

    Codes float8_e4m3fn or float8_e5m2 [.., m, n] with scales [.., ceil(m / block), ceil(n / block)]. Blocks at the edges
    may be incomplete. A block as long as its axis is one scale for all of it.
    """

    block: Shape  # of the trailing axes
    flat: bool = False  # whether the scales are one axis

    name = "fp8"
    methods = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
    dtypes = ("float8_e4m3fn", "float8_e5m2")
    uploads = (
        Upload("", "", {"scales": "_scale_inv"}, ("_scale_inv",)),
        Upload(".weight", ".weight", {"scales": ".weight_scale"}),
        Upload(".weight", ".weight", {"scales": ".scale"}),  # DeepSeek V4
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], module: str, found: Mapping[str, Found]) -> Self | None:
        (dtype, shape), scales = found[""], found["scales"].shape
        if dtype not in cls.dtypes:
            return None
        if prod(scales) == 1:
            return cls(shape[-2:])
        if len(scales) == 1:  # a scale for each row
            return cls((1, *shape[-1:]), True)
        stated = config.get("weight_block_size")
        block = tuple(int(n) for n in stated) if isinstance(stated, list) and stated else DEFAULT_BLOCK
        if scales[-2:] == (*shape[-2:-1], 1) and scales != cls(block).grid(shape):
            block = (1, shape[-1])  # a scale for each row
        return cls(block[-len(shape) :])

    def stored(self, shape: Shape) -> Shape:
        if len(self.block) > len(shape):
            raise OpError(f"a block {list(self.block)} does not fit a tensor {list(shape)}")
        return shape

    def grid(self, shape: Shape) -> Shape:
        """How many scales there are along each axis."""
        lead = len(self.stored(shape)) - len(self.block)
        return (*shape[:lead], *(per(n, b) for n, b in zip(shape[lead:], self.block, strict=True)))

    def layout(self, shape: Shape) -> RowLayout:
        grid = self.grid(shape)
        stored = (prod(grid),) if self.flat else grid
        *axes, length = shape or (1,)
        blocks = ((1,) * (max(1, len(shape)) - len(self.block)) + self.block)[:-1]
        scales = Beside("scales", ("float32", "bfloat16", "float16", "float8_e8m0fnu"), stored, blocks)
        return RowLayout(tuple(axes), length, length, (scales,))

    def table(self, dtype: str, beside: Sequence[Array]) -> Array:
        return floats(dtype)

    def factors(self, shape: Shape, rows: Array, beside: Sequence[Array]) -> Factors:
        return Factors(as_float32(beside[0]), None, self.block[-1] if self.block else 1)

    def forward(self, arrays: Sequence[Array], shape: Shape) -> Array:
        values, scales = arrays[0].astype(np.float32), arrays[1].astype(np.float32).reshape(self.grid(shape))
        lead = values.ndim - len(self.block)
        for i, b in enumerate(self.block):
            scales = np.take(scales, np.arange(shape[lead + i]) // b, axis=lead + i)
        return np.asarray(values * scales)

    def describe(self) -> str:
        return f"fp8 in blocks of {'x'.join(map(str, self.block)) or '1'}"


Fp8.examples = (
    (Fp8((2, 3)), (5, 7)),
    (Fp8((4,)), (2, 3, 6)),
    (Fp8((1, 8)), (6, 8)),
    (Fp8((1, 8), True), (6, 8)),
    (Fp8((6, 8), True), (6, 8)),
    (Fp8(()), (3, 4)),
    (Fp8((3, 4, 4)), (3, 9, 10)),
)

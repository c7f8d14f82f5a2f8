"""mxfp4: e2m1 codes of four bits, two a byte, times a power of two for each 32 of them.

Sources of the format: OCP Microscaling Formats (MX) specification 1.0, sections 5.1 to 5.4; the layouts of gpt-oss
(`_blocks` and `_scales`), of compressed-tensors (`mxfp4-pack-quantized`) and of DeepSeek V4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np

from ckptc.ops.codes.base import Array, Beside, Code, Factors, Found, RowLayout, Shape, Upload
from ckptc.ops.codes.tables import E2M1, as_float32, e2m1
from ckptc.ops.nest import AxisMap, whole
from ckptc.ops.types import OpError

GROUP = 32  # elements that share a scale: section 5.1
SCALES = ("uint8", "float8_e8m0fnu")


@dataclass(frozen=True, slots=True)
class Mxfp4(Code):
    """e2m1 · 2^(scale - 127), the low four bits of a byte first. Exact; scale 255 is NaN.

    Codes uint8 [.., n / 2] with scales uint8 [.., n / 32]; or, in `groups`, [.., n / 32, 16] with the same scales, and
    the weight is the matrices turned: [.., n, rows].
    """

    groups: bool = False

    name = "mxfp4"
    methods = ("mxfp4", "compressed-tensors")
    dtypes = ("uint8", "int8")
    uploads = (
        Upload(".weight_packed", ".weight", {"scales": ".weight_scale"}),
        Upload("_blocks", "", {"scales": "_scales"}),
        Upload(".weight", ".weight", {"scales": ".scale"}),
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], module: str, found: Mapping[str, Found]) -> Self | None:
        (dtype, shape), (scale_dtype, scales) = found[""], found["scales"]
        if dtype not in cls.dtypes or scale_dtype not in SCALES:
            return None
        return cls(len(shape) == len(scales) + 1)

    def _rows(self, shape: Shape) -> Shape:
        """The weight as its rows are stored."""
        if len(shape) < 2:
            raise OpError(f"mxfp4 is of matrices, the rule's tensor is {list(shape)}")
        rows = (*shape[:-2], shape[-1], shape[-2]) if self.groups else shape
        if rows[-1] % GROUP:
            raise OpError(f"mxfp4 needs rows of whole groups of {GROUP}, these have {rows[-1]} elements")
        return rows

    def stored(self, shape: Shape) -> Shape:
        *lead, n = self._rows(shape)
        return (*lead, n // GROUP, GROUP // 2) if self.groups else (*lead, n // 2)

    def layout(self, shape: Shape) -> RowLayout:
        *lead, n = self._rows(shape)
        scales = Beside("scales", SCALES, (*lead, n // GROUP), (1,) * len(lead))
        return RowLayout(tuple(lead), n, n // 2, (scales,))

    def place(self, shape: Shape) -> tuple[AxisMap, ...]:
        steps = [prod(shape[i + 1 :]) for i in range(len(shape))]
        if self.groups:
            steps[-2:] = [1, shape[-2]]
        return tuple(whole(n, step) for n, step in zip(shape, steps, strict=True))

    def table(self, dtype: str, beside: Sequence[Array]) -> Array:
        return e2m1()

    def factors(self, shape: Shape, rows: Array, beside: Sequence[Array]) -> Factors:
        return Factors(as_float32(beside[0]), None, GROUP)

    def forward(self, arrays: Sequence[Array], shape: Shape) -> Array:
        rows = self._rows(shape)
        codes, scales = arrays[0].view(np.uint8).reshape(-1, GROUP // 2), arrays[1].view(np.uint8).reshape(-1, 1)
        values = E2M1[np.stack([codes & 0xF, codes >> 4], axis=-1).reshape(-1, GROUP)]
        # ldexp is exact, also at the ends of the exponent's range. Scale 255 is NaN, even for codes of zero.
        out = np.where(scales == 255, np.float32(np.nan), np.ldexp(values, scales.astype(np.int32) - 127))
        out = out.astype(np.float32).reshape(rows)
        return np.ascontiguousarray(out.swapaxes(-1, -2)) if self.groups else out


Mxfp4.examples = ((Mxfp4(), (3, 64)), (Mxfp4(), (2, 3, 32)), (Mxfp4(True), (2, 64, 3)), (Mxfp4(True), (32, 5)))

"""nvfp4: e2m1 codes of four bits, two a byte, times an fp8 scale for each 16 of them and one scale for all.

Sources of the format: NVIDIA's NVFP4 as compressed-tensors writes it (`nvfp4-pack-quantized`: the scale of all is a
divisor) and as modelopt does (`NVFP4`: a factor).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from ckptc.ops.codes.base import Array, Beside, Code, Factors, Found, RowLayout, Shape, Upload
from ckptc.ops.codes.tables import E2M1, e2m1
from ckptc.ops.types import OpError

GROUP = 16


@dataclass(frozen=True, slots=True)
class Nvfp4(Code):
    """e2m1 · (scale · scale of all), or scale / scale of all if it `divides`; both steps in float32.

    Codes uint8 [.., n / 2], the low four bits of a byte first, scales float8_e4m3fn [.., n / 16], the scale of all
    float32 of one element.
    """

    divides: bool

    name = "nvfp4"
    methods = ("compressed-tensors", "modelopt", "modelopt_fp4")
    dtypes = ("uint8",)
    uploads = (
        Upload(".weight_packed", ".weight", {"scales": ".weight_scale", "divisor": ".weight_global_scale"}),
        Upload(".weight", ".weight", {"scales": ".weight_scale", "factor": ".weight_scale_2"}),
    )

    @classmethod
    def read(cls, config: Mapping[str, Any], module: str, found: Mapping[str, Found]) -> Self | None:
        return cls("divisor" in found) if found[""].dtype in cls.dtypes else None

    def stored(self, shape: Shape) -> Shape:
        if not shape or shape[-1] % GROUP:
            raise OpError(f"nvfp4 needs rows of whole groups of {GROUP}, the rule's tensor is {list(shape)}")
        return (*shape[:-1], shape[-1] // 2)

    def layout(self, shape: Shape) -> RowLayout:
        *lead, stored = self.stored(shape)
        axes, n = tuple(lead), shape[-1]
        scales = Beside("scales", ("float8_e4m3fn",), (*axes, n // GROUP), (1,) * len(axes))
        role = "divisor" if self.divides else "factor"
        return RowLayout(axes, n, stored, (scales, Beside(role, ("float32",), (1,), axes)))

    def table(self, dtype: str, beside: Sequence[Array]) -> Array:
        return e2m1()

    def factors(self, shape: Shape, rows: Array, beside: Sequence[Array]) -> Factors:
        scales, whole = beside[0].astype(np.float32), beside[1]
        return Factors(scales / whole if self.divides else scales * whole, None, GROUP)

    def forward(self, arrays: Sequence[Array], shape: Shape) -> Array:
        codes, scales, whole = arrays[0].reshape(-1, GROUP // 2), arrays[1].astype(np.float32).reshape(-1, 1), arrays[2]
        values = E2M1[np.stack([codes & 0xF, codes >> 4], axis=-1).reshape(-1, GROUP)]
        each = scales / whole.reshape(()) if self.divides else scales * whole.reshape(())
        return np.asarray(values * each, np.float32).reshape(shape)


Nvfp4.examples = ((Nvfp4(True), (3, 32)), (Nvfp4(False), (2, 16)), (Nvfp4(True), (2, 2, 48)))

"""`scale`, `add` and `cast`: arithmetic in float32, and where it rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from ckptc.ops.base import Array, Op, Parts, one
from ckptc.ops.types import OpError, TensorType, check_float, is_float, numpy_dtype


def _math(parts: Parts, step: tuple[str, float | str]) -> Parts:
    return [replace(p, math=(*p.math, step)) for p in parts]


def _float32(value: float, op: str) -> np.float32:
    with np.errstate(all="ignore"):
        out = np.float32(value)
    if not np.isfinite(out):
        raise OpError(f"`{op}` needs a finite number that float32 holds, not {value}")
    return out


@dataclass(frozen=True, slots=True)
class Scale(Op):
    """Times `factor` (rounded to float32), in float32. The shape stays; the dtype is float32 until a cast."""

    factor: float
    name = "scale"

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        input = one(inputs, self.name)
        check_float(input, self.name)
        if _float32(self.factor, self.name) == 0:
            raise OpError("`scale` by 0 loses the tensor")
        _float32(1.0 / float(np.float32(self.factor)), self.name)
        return TensorType(input.axes, "float32")

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        return np.asarray(arrays[0].astype(np.float32) * np.float32(self.factor))

    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        return _math(parts[0], ("scale", float(np.float32(self.factor))))

    def describe(self) -> str:
        return f"scale {float(np.float32(self.factor)):.9g}"


@dataclass(frozen=True, slots=True)
class Add(Op):
    """Plus `term` (rounded to float32), in float32. The shape stays; the dtype is float32 until a cast."""

    term: float
    name = "add"

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        input = one(inputs, self.name)
        check_float(input, self.name)
        _float32(self.term, self.name)
        return TensorType(input.axes, "float32")

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        return np.asarray(arrays[0].astype(np.float32) + np.float32(self.term))

    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        return _math(parts[0], ("add", float(np.float32(self.term))))

    def describe(self) -> str:
        return f"add {float(np.float32(self.term)):.9g}"


@dataclass(frozen=True, slots=True)
class Cast(Op):
    """To another floating dtype, rounding to nearest even. The shape stays. Exact when the new dtype holds every value of the old."""

    dtype: str
    name = "cast"

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        input = one(inputs, self.name)
        numpy_dtype(self.dtype)
        if self.dtype != input.dtype and not (is_float(self.dtype) and is_float(input.dtype)):
            raise OpError(f"`cast` is between floating dtypes, not from {input.dtype} to {self.dtype}")
        return TensorType(input.axes, self.dtype)

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        return arrays[0].astype(numpy_dtype(self.dtype))

    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        return parts[0] if self.dtype == inputs[0].dtype else _math(parts[0], ("cast", self.dtype))

    def describe(self) -> str:
        return f"cast {self.dtype}"

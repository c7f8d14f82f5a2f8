"""`scale`, `add` and `cast`: arithmetic in float32, and where it rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from ckptc.ops.base import Array, Inverse, Op, Parts, one
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
    """Times `factor` (rounded to float32), in float32. The shape stays; the dtype is float32 until a cast.

    The inverse multiplies by 1/factor: exact where the factor is a power of two (and nothing overflows), else it rounds.
    """

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

    def inverse(self, inputs: Sequence[TensorType]) -> tuple[Inverse, ...]:
        exact = abs(math.frexp(float(np.float32(self.factor)))[0]) == 0.5 and _in_float32(inputs[0].dtype)
        return (Inverse((Scale(1.0 / float(np.float32(self.factor))), *_back(inputs[0].dtype)), rounds=not exact),)

    def describe(self) -> str:
        return f"scale {float(np.float32(self.factor)):.9g}"


@dataclass(frozen=True, slots=True)
class Add(Op):
    """Plus `term` (rounded to float32), in float32. The shape stays; the dtype is float32 until a cast. The inverse rounds."""

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

    def inverse(self, inputs: Sequence[TensorType]) -> tuple[Inverse, ...]:
        # Even adding 0 is not undone bit for bit: it makes 0 of -0.
        return (Inverse((Add(-float(np.float32(self.term))), *_back(inputs[0].dtype)), rounds=True),)

    def describe(self) -> str:
        return f"add {float(np.float32(self.term)):.9g}"


def _in_float32(dtype: str) -> bool:
    return dtype == "float32" or dtype in _HOLDS["float32"]


def _back(dtype: str) -> tuple[Op, ...]:
    """The cast from float32 to what the input was."""
    return () if dtype == "float32" else (Cast(dtype),)


# Which floats hold all values of which: a cast along these is exact both ways.
_HOLDS = {
    "float32": {"bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"},
    "float64": {"float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"},
    "bfloat16": {"float8_e4m3fn", "float8_e5m2"},
    "float16": {"float8_e4m3fn", "float8_e5m2"},
}


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

    def inverse(self, inputs: Sequence[TensorType]) -> tuple[Inverse, ...]:
        old = inputs[0].dtype
        return (Inverse((Cast(old),), rounds=self.dtype != old and old not in _HOLDS.get(self.dtype, ())),)

    def describe(self) -> str:
        return f"cast {self.dtype}"

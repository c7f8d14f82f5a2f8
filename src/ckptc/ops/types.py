"""The types of the op algebra: named axes with sizes, and dtypes by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import ml_dtypes
import numpy as np


class OpError(ValueError):
    """An op does not fit its input. The message states the rule; callers add the op, the pattern and the place."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: a name from the mapping ("" for an anonymous axis of size 1) and its size in elements."""

    name: str
    size: int

    def __str__(self) -> str:
        return f"{self.name}={self.size}" if self.name else str(self.size)


@dataclass(frozen=True, slots=True)
class TensorType:
    """Axes, slowest first, and the dtype's name as numpy and ml_dtypes spell it."""

    axes: tuple[Axis, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(a.size for a in self.axes)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.dtype)

    def find(self, name: str) -> int:
        """Position of the axis called `name`. Raises OpError when there is none."""
        for i, axis in enumerate(self.axes):
            if axis.name == name:
                return i
        raise OpError(f"there is no axis `{name}`; the axes are {self.names()}")

    def names(self) -> str:
        return " ".join(a.name or str(a.size) for a in self.axes) or "(none)"

    def with_axes(self, axes: tuple[Axis, ...]) -> TensorType:
        return TensorType(axes, self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(a) for a in self.axes)}]"


@lru_cache(maxsize=64)
def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The numpy dtype of a name, ml_dtypes' included. Raises OpError for an unknown name."""
    known = getattr(ml_dtypes, name, name)
    try:
        dtype = np.dtype(known if isinstance(known, type) else name)
    except (TypeError, ValueError, SyntaxError):
        raise OpError(f"`{name}` is not a dtype") from None
    # One spelling each (not `f4`), and numbers only; ml_dtypes has other things by name too, and numpy makes objects of them.
    if dtype.name != name or dtype.kind not in "biufcV" or dtype.type is np.void:
        raise OpError(f"`{name}` is not a dtype")
    return dtype


@lru_cache(maxsize=64)
def itemsize(name: str) -> int:
    """Bytes of one element."""
    return numpy_dtype(name).itemsize


@lru_cache(maxsize=64)
def is_float(name: str) -> bool:
    return numpy_dtype(name).kind == "f" or name in ("bfloat16", "float16") or name.startswith(("float8", "float4"))


def check_float(type_: TensorType, op: str) -> None:
    """Arithmetic is for floating point only. Raises OpError for integers and booleans."""
    if not is_float(type_.dtype):
        raise OpError(f"`{op}` is arithmetic on floating point, the input is {type_.dtype}")


def replace_axis(type_: TensorType, position: int, *axes: Axis) -> TensorType:
    """The type with the axis at `position` replaced by `axes` (none drops it)."""
    return type_.with_axes(type_.axes[:position] + axes + type_.axes[position + 1 :])

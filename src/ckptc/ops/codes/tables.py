"""Tables of what a byte stands for, by its value: float32[256, numbers in a byte].

Formats: OCP 8-bit floating point 1.0 (e4m3, e5m2); OCP Microscaling Formats (MX) 1.0 (e2m1, e8m0).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BYTES = np.arange(256, dtype=np.uint8)
# The sixteen values of e2m1, by code: OCP Microscaling Formats (MX) specification 1.0, section 5.3.3.
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
# Powers of two from 2^-127, which is subnormal, to 2^127; 255 is NaN. With e2m1 values every product in range is exact.
E8M0 = _BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


@lru_cache(maxsize=8)
def floats(dtype: str) -> Array:
    """The values of an 8-bit floating dtype."""
    return np.asarray(_BYTES.view(getattr(ml_dtypes, dtype)).astype(np.float32).reshape(256, 1))


@lru_cache(maxsize=16)
def integers(bits: int, less: int) -> Array:
    """Unsigned fields of 8, 4 or 2 bits, the lowest first, each `less` an offset."""
    fields = [(_BYTES >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(fields, axis=1).astype(np.float32) - np.float32(less)


@lru_cache(maxsize=1)
def signed() -> Array:
    """Bytes as int8."""
    return _BYTES.view(np.int8).astype(np.float32).reshape(256, 1)


def pairs(values: Array, high_first: bool = False) -> Array:
    """Two codes of four bits, of sixteen values."""
    low, high = values[_BYTES & 15], values[_BYTES >> 4]
    return np.stack([high, low] if high_first else [low, high], axis=1).astype(np.float32)


@lru_cache(maxsize=1)
def e2m1() -> Array:
    """Pairs of e2m1 codes, the low four bits first."""
    return pairs(E2M1)


def as_float32(scales: Array) -> Array:
    """Scales as numbers, exactly: float32 of the same shape. Bytes are e8m0."""
    if scales.dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
        return np.take(E8M0, scales.view(np.uint8))
    return scales.astype(np.float32)


def fields(words: Array, bits: int) -> Array:
    """int32[.., n] -> int32[.., n, 32 / bits]: the unsigned fields of each word, the lowest first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return np.asarray((words.view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.int32))

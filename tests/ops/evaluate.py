"""What index nests mean, said slowly: every element of every part, one after the other.

This is the reference for whatever runs parts fast. It trusts nothing: indices are checked against the
tensors' sizes, and every element of the target must be written exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

from ckptc.ops.nest import AxisMap, Part

Array = np.ndarray[Any, np.dtype[Any]]


def evaluate(parts: Iterable[Part], sources: Sequence[Sequence[Array]], shape: tuple[int, ...], dtype: str) -> Array:
    """The array of `shape` and `dtype` that `parts` describe. `sources[leaf][tensor]` are the arrays read.

    Raises AssertionError where an index leaves its tensor or the target, where an element is written twice or never,
    and where the parts' arithmetic does not end in `dtype`.
    """
    out = np.zeros(shape, dtype_of(dtype))
    written = np.zeros(shape, np.int64)
    for part in parts:
        assert len(part.axes) == len(shape), f"a part of {len(part.axes)} axes in a target of {len(shape)}"
        for index, tensor, element in elements(part):
            assert all(0 <= i < n for i, n in zip(index, shape, strict=True)), f"{index} is outside {shape}"
            written[index] += 1
            out[index] = compute(part, read(part, sources, tensor, element), dtype)
    assert (written == 1).all(), f"written {written.min()} to {written.max()} times:\n{written}"
    return out


def elements(part: Part) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Every element of a part: its index in the target, its tensor, and its place in that tensor."""
    for combination in product(*(list(counters(axis)) for axis in part.axes)):
        index = tuple(i for i, _, _ in combination)
        yield index, part.first + sum(t for _, _, t in combination), part.base + sum(s for _, s, _ in combination)


def counters(axis: AxisMap) -> Iterator[tuple[int, int, int]]:
    """Every index of an axis, with what it adds to the place in the tensor and to the number of the tensor."""
    for counts in product(*(range(f.size) for f in axis.factors)):
        pairs = list(zip(counts, axis.factors, strict=True))
        yield (
            axis.start + sum(i * f.weight for i, f in pairs),
            sum(i * f.step for i, f in pairs),
            sum(i * f.tensor for i, f in pairs),
        )


def read(part: Part, sources: Sequence[Sequence[Array]], tensor: int, element: int) -> Array:
    if part.source is None:
        return np.asarray(part.value, np.float32)
    tensors = sources[part.source]
    assert 0 <= tensor < len(tensors), f"tensor {tensor} of {len(tensors)}"
    assert 0 <= element < tensors[tensor].size, f"element {element} of {tensors[tensor].size}"
    return tensors[tensor].reshape(-1)[element : element + 1].reshape(())


def compute(part: Part, value: Array, dtype: str) -> Array:
    for step, argument in part.math:
        if step == "scale":
            value = np.asarray(value.astype(np.float32) * np.float32(argument))
        elif step == "add":
            value = np.asarray(value.astype(np.float32) + np.float32(argument))
        else:
            assert step == "cast"
            value = value.astype(dtype_of(str(argument)))
    if part.source is None:
        return value.astype(dtype_of(dtype))
    assert value.dtype == dtype_of(dtype), f"the parts end in {value.dtype}, the target is {dtype}"
    return value


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def same(a: Array, b: Array) -> bool:
    """Equal bit for bit, any two NaNs alike."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind not in "iub" and not (a.dtype.kind == "V" and a.dtype.name.startswith(("int", "uint"))):
        both = np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32))
        a, b = np.where(both, np.zeros((), a.dtype), a), np.where(both, np.zeros((), b.dtype), b)
    return a.tobytes() == b.tobytes()

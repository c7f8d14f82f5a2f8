"""Weights that are stored as codes, for tests: random ones, decoded by the executor's decoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np

from ckptc.ops.codes import Code, Shape
from ckptc.ops.nest import AxisMap, Factor, Part, whole
from ckptc.ops.types import itemsize
from ckptc.plan.model import Beside, Decode, Stored
from ckptc.plan.reads import need
from ckptc.run.decode import BesideRows, Coded, Decoder

Array = np.ndarray[Any, Any]


def source_of(code: Code, shape: Shape, arrays: Sequence[Array]) -> Stored:
    """The plan's record of one weight: tensor 0 has its codes, those that follow are beside it."""
    beside = tuple(Beside(a.dtype.name, a.shape) for a in arrays[1:])
    return Stored(arrays[0].dtype.name, arrays[0].shape, decode=Decode(code.name, code.settings(), shape, beside))


def all_rows(code: Code, shape: Shape) -> Part:
    layout = code.layout(shape)
    count = prod(layout.axes)
    return Part(0, 0, 0, (whole(count, layout.length), whole(layout.length, 1)))


def decoded(code: Code, shape: Shape, arrays: Sequence[Array], part: Part, block: int = 1 << 15) -> Array:
    """The rows that a part needs: float32[rows, length]."""
    source, layout = source_of(code, shape, arrays), code.layout(shape)
    needed = need(part, source)
    assert needed.rows is not None and source.decode is not None
    flat = [np.ascontiguousarray(a).reshape(-1) for a in arrays]
    codes = np.concatenate([flat[0][first : first + length] for first, length in needed.values.runs()])
    beside = []
    for data, wanted, of in zip(flat[1:], needed.beside, layout.beside, strict=True):
        read = np.concatenate([data[first : first + length] for first, length in wanted.runs])
        each = data.size // layout.count(of)
        beside.append(BesideRows(read, wanted.places, each, layout.count(of) == 1))
    out = np.full(needed.rows.count * layout.length, 7, np.float32)
    how = Coded(code, shape, source.dtype)
    assert codes.nbytes == needed.value_bytes == codes.size * itemsize(source.dtype)
    Decoder(block).decode(how, needed.rows, codes.view(np.uint8), beside, out)
    return out.reshape(needed.rows.count, layout.length)


def placed(code: Code, shape: Shape, rows: Array) -> Array:
    """All decoded rows as the logical weight, element by element as `place` says."""
    flat, out = rows.reshape(-1), np.zeros(shape, np.float32)
    steps = [list(_walk(axis)) for axis in code.place(shape)]
    for index in product(*steps):
        out[tuple(i for i, _ in index)] = flat[sum(step for _, step in index)]
    return out


def _walk(axis: AxisMap) -> list[tuple[int, int]]:
    """(index, step) of each index of an axis."""
    found = [(axis.start, 0)]
    for f in axis.factors:
        found = [(i + n * f.weight, s + n * f.step) for i, s in found for n in range(f.size)]
    assert all(isinstance(f, Factor) and f.tensor == 0 for f in axis.factors)
    return found

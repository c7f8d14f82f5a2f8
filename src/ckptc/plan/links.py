"""Which chunks of an array lie in source files as they are, so that a checkpoint may refer to them there.

A chunk of an array with `link` is stored as its elements' bytes, row-major after its axes were put in that order. It
lies in a source file when

- one part covers all of it, without arithmetic, from tensors of the array's dtype, and none of it is outside the array;
- it comes from one tensor, along each axis by one loop whose step is that of a row-major chunk in that order.

Then it is `chunk_bytes` bytes from its first element on. Every other chunk is made, and stored in the same order: those
that hold padding or reach past the array's edge, those that several tensors meet in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptc.ops.nest import AxisMap, Part, joined, restrict
from ckptc.ops.types import itemsize
from ckptc.plan.model import Box, Content, Kind, Plan

MAX_CHUNKS = 1 << 21  # along the axes of an array, of all its parts: those of a model are thousands
Numbers = npt.NDArray[Any]  # int64[n]


class Links(NamedTuple):
    """An array's chunks that lie in source files: for each, its cell (the row-major number in the array's grid), the
    source and the tensor in its list, and the element it begins with."""

    cells: Numbers
    sources: Numbers
    tensors: Numbers
    elements: Numbers


@dataclass(frozen=True, slots=True)
class Place:
    """Chunks of an array that lie in the files of a plan."""

    array: int  # position in `Plan.outputs`
    cells: Numbers
    files: Numbers  # positions among the first source's files
    offsets: Numbers  # bytes from the start of the file


def links(kind: Kind) -> Links:
    """The chunks of an array of a kind that need not be made; none where it has no `link`."""
    return of(kind.content, kind.chunk, kind.link)


@lru_cache(maxsize=4096)
def of(content: Content, chunk: tuple[int, ...], order: tuple[int, ...] | None) -> Links:
    """As `links`, of an array that holds this in such chunks."""
    spans = (a.stop // c - a.start // c + 1 for p in content.parts for a, c in zip(p.axes, chunk, strict=True))
    if order is not None and sum(spans) > MAX_CHUNKS:
        raise ValueError(f"more than {MAX_CHUNKS} chunks along its axes are to be linked")
    found = [Links(*(np.empty(0, np.int64) for _ in Links._fields))]
    if order is not None:
        steps = _steps(chunk, order)
        for part in content.parts:
            if plain(part, content):
                found += _part(part, content.shape, chunk, steps)
    return Links(*(np.concatenate(column) for column in zip(*found, strict=True)))


def plain(part: Part, content: Content) -> bool:
    """Whether a part of it only moves what is stored."""
    if part.source is None or any(step != ("cast", content.dtype) for step in part.math):
        return False
    source = content.sources[part.source]
    return source.dtype == content.dtype and source.decode is None and source.chunk is None


def _steps(chunk: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
    """For each axis, the elements from one index to the next in a chunk whose axes are stored in this order."""
    steps, step = [0] * len(chunk), 1
    for axis in reversed(order):
        steps[axis] = step
        step *= chunk[axis]
    return steps


def _part(part: Part, shape: tuple[int, ...], chunk: tuple[int, ...], steps: list[int]) -> list[Links]:
    cells, elements, tensors = (np.array([n], np.int64) for n in (0, part.base, part.first))
    for axis, size, extent, step in zip(part.axes, shape, chunk, steps, strict=True):
        own = _along(axis, size, extent, step)
        cells = _sums(cells * -(-size // extent), own[0])
        elements, tensors = _sums(elements, own[1]), _sums(tensors, own[2])
    return [Links(cells, np.full(cells.size, part.source, np.int64), tensors, elements)]


def _along(axis: AxisMap, size: int, extent: int, step: int) -> tuple[Numbers, Numbers, Numbers]:
    """The indices of chunks along an axis that the axis' map covers with one loop of this step; what each adds to the
    first element and to the tensor's number."""
    rows = []
    for index in range(axis.start // extent, min(-(-axis.stop // extent), size // extent)):
        found = restrict(axis, index * extent, (index + 1) * extent)
        if len(found) != 1 or found[0][0].size != extent:
            continue
        inside, element, tensor = found[0]
        if extent == 1 or [(f.weight, f.step, f.tensor) for f in joined(inside.factors)] == [(1, step, 0)]:
            rows.append((index, element, tensor))
    columns = np.array(rows, np.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def _sums(a: Numbers, b: Numbers) -> Numbers:
    """Every a + b, those of the first a first."""
    out: Numbers = (a[:, None] + b).reshape(-1)
    return out


def made(kind: Kind) -> Iterator[Box]:
    """The boxes of the units that are made: of arrays with `link`, of the other chunks."""
    return kind.units() if kind.link is None else others(kind.shape, kind.chunk, links(kind).cells)


def others(shape: tuple[int, ...], chunk: tuple[int, ...], cells: Numbers) -> Iterator[Box]:
    """The boxes of all chunks but these, within the array."""
    grid = tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    rest = np.ones(prod(grid), np.bool_)
    rest[cells] = False
    for index in np.argwhere(rest.reshape(grid)).tolist() if rest.any() else ():
        yield tuple((i * c, min(i * c + c, n)) for i, c, n in zip(index, chunk, shape, strict=True))


def linked_bytes(kind: Kind) -> int:
    """Bytes of an array's chunks that need not be made. (None of them reaches past its edge.)"""
    return links(kind).cells.size * prod(kind.chunk) * itemsize(kind.dtype)


def places(plan: Plan) -> list[Place]:
    """Where the chunks of a plan are that are not made."""
    files = np.array([t.file for t in plan.tensors], np.int64)
    begins = np.array([t.begin for t in plan.tensors], np.int64)
    out = []
    for number, array in enumerate(plan.arrays):
        found = links(array.kind)
        if not found.cells.size:
            continue
        tensors, elements = np.empty(found.cells.size, np.int64), found.elements.copy()
        for k, source in enumerate(array.sources):
            of_source = found.sources == k
            if of_source.any():
                tensors[of_source] = np.array(source.tensors, np.int64)[found.tensors[of_source]]
                elements[of_source] += source.begin
        offsets = begins[tensors] + elements * itemsize(array.dtype)
        out.append(Place(number, found.cells, files[tensors], offsets))
    return out

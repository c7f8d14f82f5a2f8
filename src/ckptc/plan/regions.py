"""Which box of a stored array a part needs, and the part's steps within that box once it is in memory.

A part of an exported tensor steps through a stored array by elements, row-major. Each of its loops stays within one
axis of that array (`compile.invert` sees to it), so what it needs is a box with a stride along each axis: read whole,
with nothing between the strides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from ckptc.ops.nest import AxisMap, Factor, Part, restrict_part
from ckptc.ops.types import itemsize
from ckptc.plan.files import PAGE
from ckptc.plan.model import Box, Kind, Padding

PIECE = 4 << 20  # bytes of an output that are made and written at once, where its layout has no chunks

Numbers = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Region:
    """Indices start + i·stride, i below count, along each axis of an array: (start, stride, count)."""

    axes: tuple[tuple[int, int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(count for _, _, count in self.axes)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def chunked(self, chunk: Sequence[int], shape: Sequence[int]) -> int:
        """Elements of the array that are decoded to read it: those of every chunk it touches."""
        out = 1
        for (start, stride, count), c, n in zip(self.axes, chunk, shape, strict=True):
            if stride < c:
                first, last = start // c, (start + (count - 1) * stride) // c
                touched = min((last + 1) * c, n) - first * c
            else:  # chunks between the strides are not touched
                touched = sum(
                    min((at // c + 1) * c, n) - at // c * c for at in range(start, start + count * stride, stride)
                )
            out *= touched
        return out


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one index of an axis to the next, row-major."""
    out, step = [], 1
    for n in reversed(shape):
        out.append(step)
        step *= n
    return tuple(reversed(out))


def _ordered(shape: Sequence[int], order: Sequence[int] | None) -> tuple[int, ...]:
    """As `strides`, where the axes lie in this order, slowest first."""
    if order is None:
        return strides(shape)
    steps = dict(zip(order, strides([shape[a] for a in order]), strict=True))
    return tuple(steps[a] for a in range(len(shape)))


def axis_of(step: int, shape: Sequence[int]) -> int:
    """The axis of a row-major array along which a loop of this step moves. Axes of size 1 have no loops."""
    steps = strides(shape)
    return max((a for a, n in enumerate(shape) if n > 1 and steps[a] <= step), key=lambda a: (steps[a], a))


def region(part: Part, shape: Sequence[int]) -> Region:
    """The box that a part needs of an array of this shape."""
    steps, rest = strides(shape), part.base
    weights: list[list[tuple[int, int]]] = [[] for _ in shape]
    for f in _loops(part):
        axis = axis_of(f.step, shape)
        weights[axis].append((f.size, f.step // steps[axis]))
    axes = []
    for axis, step in enumerate(steps):
        start, rest = divmod(rest, step)
        last = sum((size - 1) * weight for size, weight in weights[axis])
        stride = gcd(*(weight for _, weight in weights[axis])) or 1
        axes.append((start, stride, last // stride + 1))
    return Region(tuple(axes))


def union(regions: Iterable[Region]) -> Region:
    """The smallest box with strides that holds all of them."""
    first, *others = regions
    axes = list(first.axes)
    for other in others:
        axes = [_join(a, b) for a, b in zip(axes, other.axes, strict=True)]
    return Region(tuple(axes))


def _join(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    if a == b:
        return a
    low = min(a[0], b[0])
    high = max(start + stride * (count - 1) for start, stride, count in (a, b))
    stride = gcd(abs(a[0] - b[0]), *(s for _, s, count in (a, b) if count > 1)) or 1
    return low, stride, (high - low) // stride + 1


def needs(kind: Kind, begins: Numbers, box: Box) -> Iterator[tuple[int, Region]]:
    """What the same box of each of some outputs of a kind needs of each source of chunks: its position among the
    kind's, and the region for all of the outputs.

    `begins`: where they begin in the stored arrays, int64[outputs, sources].
    """
    found: dict[int, list[Region]] = {}
    for part in kind.parts:
        source = part.source
        if source is None or kind.sources[source].chunk is None:
            continue
        for inside in restrict_part(part, box):
            shape = kind.sources[source].shape
            found.setdefault(source, []).append(_spread(inside, begins[:, source], shape))
    for source, regions in sorted(found.items()):
        yield source, union(regions)


def _spread(part: Part, begins: Numbers, shape: Sequence[int]) -> Region:
    """The box that a part needs where it begins at each of `begins`, elements of the array."""
    first = region(replace(part, base=part.base + int(begins[0])), shape)
    if len(begins) == 1:
        return first
    axes, rest = [], begins + part.base
    for (_, stride, count), step in zip(first.axes, strides(shape), strict=True):
        starts, rest = np.divmod(rest, step)
        low, high = int(starts.min()), int(starts.max()) + stride * (count - 1)
        apart = gcd(*np.unique(starts - low).tolist())
        common = gcd(apart, stride if count > 1 else 0) or 1
        axes.append((low, common, (high - low) // common + 1))
    return Region(tuple(axes))


def within(part: Part, shape: Sequence[int], box: Region, order: Sequence[int] | None = None) -> Part:
    """The part's steps in an array that holds the elements of `box` and nothing else: row-major, or with its axes in
    this order, slowest first."""
    steps, inner = strides(shape), _ordered(box.shape, order)

    def moved(f: Factor) -> Factor:
        if f.step == 0 or f.size == 1:
            return f
        axis = axis_of(f.step, shape)
        return replace(f, step=f.step // steps[axis] // box.axes[axis][1] * inner[axis])

    axes = tuple(AxisMap(a.start, tuple(moved(f) for f in a.factors)) for a in part.axes)
    return replace(part, base=place_in(part.base, shape, box, order), first=0, axes=axes)


def place_in(element: int, shape: Sequence[int], box: Region, order: Sequence[int] | None = None) -> int:
    """Where an element of an array of this shape is in an array that holds `box` and nothing else: as `within`."""
    at, rest = 0, element
    for step, inner, (start, stride, _) in zip(strides(shape), _ordered(box.shape, order), box.axes, strict=True):
        index, rest = divmod(rest, step)
        at += (index - start) // stride * inner
    return at


def piece(unit: Sequence[int], item: int) -> tuple[int, ...]:
    """The shape of the pieces in which a box of this shape is made and written: cut along its first axis, of at most
    PIECE bytes or of one index; `item` bytes an element. Where several indices fit, pieces are of whole pages, so that
    each can be written directly from where it is.
    """
    if not unit:
        return ()
    row = prod(unit[1:]) * item
    step, whole = max(1, PIECE // row), PAGE // gcd(row, PAGE)
    step -= step % whole if step > whole else 0
    return (min(unit[0], step), *unit[1:])


def made_bytes(unit: Sequence[int], item: int) -> int:
    """Bytes of buffers in which a box of this shape is made: two pieces."""
    return 2 * prod(piece(unit, item)) * item


def padding_bytes(padding: Padding) -> int:
    """Bytes of the chunks that are decoded to look at all of some padding, each once."""
    array = padding.array
    return padding_region(padding).chunked(array.chunk or array.shape, array.shape) * itemsize(array.dtype)


def padding_region(padding: Padding) -> Region:
    """The smallest box that holds the padding."""
    return Region(tuple((a.start, 1, a.stop - a.start) for a in padding.axes))


def indices(axis: AxisMap) -> Numbers:
    """Every index of an axis that its loops reach, in the order of the loops: int64[n]."""
    out: Numbers = np.array([axis.start], dtype=np.int64)
    for f in axis.factors:
        out = (out[:, None] + np.arange(f.size, dtype=np.int64) * f.weight).ravel()
    return out


def _loops(part: Part) -> list[Factor]:
    return [f for a in part.axes for f in a.factors if f.step and f.size > 1]

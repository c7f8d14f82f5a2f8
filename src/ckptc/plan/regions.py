"""Which box of a stored array a part needs, and the part's steps within that box once it is in memory.

A part of an exported tensor steps through a stored array by elements, row-major. Each of its loops stays within one
axis of that array (`compile.invert` sees to it), so what it needs is a box with a stride along each axis: read whole,
with nothing between the strides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.ops.nest import AxisMap, Factor, Part, restrict_part
from ckptc.plan.model import Array, Box

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


def bases(arrays: Sequence[Array]) -> Numbers:
    """Where the parts of alike arrays begin: int64[arrays, parts]."""
    return np.array([[part.base for part in array.parts] for array in arrays], dtype=np.int64)


def needs(array: Array, begins: Numbers, box: Box, shapes: Sequence[Sequence[int]]) -> Iterator[tuple[int, Region]]:
    """What the same box of each of some alike arrays needs of each source: its position among theirs, and the region
    for all of them.

    The arrays differ from `array` in where their parts begin alone, which is `begins` (see `bases`); `shapes` are
    those of their sources.
    """
    found: dict[int, list[Region]] = {}
    for number, part in enumerate(array.parts):
        source = part.source or 0
        for inside in restrict_part(part, box):
            one = region(inside, shapes[source])
            found.setdefault(source, []).append(
                _spread(one, begins[:, number] + (inside.base - part.base), shapes[source])
            )
    for source, regions in sorted(found.items()):
        yield source, union(regions)


def _spread(one: Region, begins: Numbers, shape: Sequence[int]) -> Region:
    """The union of a region and of the same one beginning elsewhere: at each of `begins`, elements of the array."""
    if len(begins) == 1:
        return one
    axes, rest = [], begins
    for (_, stride, count), step in zip(one.axes, strides(shape), strict=True):
        starts, rest = np.divmod(rest, step)
        low, high = int(starts.min()), int(starts.max()) + stride * (count - 1)
        apart = gcd(*np.unique(starts - low).tolist())
        common = gcd(apart, stride if count > 1 else 0) or 1
        axes.append((low, common, (high - low) // common + 1))
    return Region(tuple(axes))


def within(part: Part, shape: Sequence[int], box: Region) -> Part:
    """The part's steps in a row-major array that holds the elements of `box` and nothing else."""
    steps, inner = strides(shape), strides(box.shape)
    base, rest = 0, part.base
    for axis, step in enumerate(steps):
        at, rest = divmod(rest, step)
        start, stride, _ = box.axes[axis]
        base += (at - start) // stride * inner[axis]

    def moved(f: Factor) -> Factor:
        if f.step == 0 or f.size == 1:
            return f
        axis = axis_of(f.step, shape)
        return replace(f, step=f.step // steps[axis] // box.axes[axis][1] * inner[axis])

    axes = tuple(AxisMap(a.start, tuple(moved(f) for f in a.factors)) for a in part.axes)
    return replace(part, base=base, first=0, axes=axes)


def _loops(part: Part) -> list[Factor]:
    return [f for a in part.axes for f in a.factors if f.step and f.size > 1]

"""Index nests: where each element of an array comes from, as loops with strides.

Every rearrangement a mapping can say (transpose, reshape, slice, interleave, stack, concat) is affine once axes are cut into factors: walk a few loop
counters, and both the place in the target and the place in the source advance by fixed steps. A `Part` states that for one region of an array:
per axis a start and *factors*, each with a size, its weight in the axis' index, and its step at the source (elements within a tensor, and tensors
within a list of equally shaped tensors). Reshaping cuts and joins factors, slicing restricts them, and no data is touched.

The numbers of one axis form a mixed radix system: factors stand in order of falling weight, and a factor's weight is at
least the extent of all that follow, so an index has one decomposition at most. `restrict` relies on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import gcd, prod
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace

Count = Annotated[int, Meta(ge=0)]  # checked where records are read
Positive = Annotated[int, Meta(ge=1)]


class Factor(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    size: Positive  # iterations
    weight: Positive  # how far the axis' index moves per iteration
    step: Count  # how many source elements per iteration
    tensor: Annotated[int, Meta(ge=0)] = 0  # how many tensors of the list per iteration


class AxisMap(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The index set {start + Σ i·weight} of one axis."""

    start: Count
    factors: tuple[Factor, ...]

    @property
    def size(self) -> int:
        """Number of indices covered."""
        return prod(f.size for f in self.factors)

    @property
    def stop(self) -> int:
        """One past the largest index covered."""
        return self.start + sum((f.size - 1) * f.weight for f in self.factors) + 1


class Part(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One region of an array, and where it comes from.

    `source` numbers the leaf it reads (None: every element is `value`). Element (i…) of the region is element
    `base + Σ i·step` of tensor `first + Σ i·tensor` of that leaf's list. `math` is applied in order: ("scale", x), ("add", x) in
    float32, ("cast", dtype) rounds.
    """

    source: Count | None
    base: Count
    first: Count
    axes: tuple[AxisMap, ...]
    math: tuple[tuple[str, float | str], ...] = ()
    value: float = 0.0

    @property
    def size(self) -> int:
        """Number of elements of the region."""
        return prod(a.size for a in self.axes)


def whole(size: int, step: int, tensor: int = 0) -> AxisMap:
    """A full axis read with one stride."""
    return AxisMap(0, (Factor(size, 1, step, tensor),) if size != 1 else ())


Restricted = tuple[AxisMap, int, int]  # the map, and what is added to the part's base and first


def restrict(axis: AxisMap, low: int, high: int) -> list[Restricted]:
    """The indices of `axis` in [low, high), renumbered from `low`: maps that cover each of them once.

    A range that cuts through k factors needs up to 2k + 1 maps, since only boxes are affine.
    """
    return list(_restrict(axis.start, axis.factors, low, high))


def _restrict(start: int, factors: tuple[Factor, ...], low: int, high: int) -> Iterator[Restricted]:
    extent = sum((f.size - 1) * f.weight for f in factors) + 1
    if start >= high or start + extent <= low:
        return
    if low <= start and start + extent <= high:
        yield AxisMap(start - low, factors), 0, 0
        return
    f, rest = factors[0], factors[1:]
    inner = extent - (f.size - 1) * f.weight
    first_full = max(0, -(-(low - start) // f.weight))
    last_full = min(f.size - 1, (high - inner - start) // f.weight)
    touched_first = max(0, -(-(low - start - inner + 1) // f.weight))
    touched_last = min(f.size - 1, (high - 1 - start) // f.weight)
    if first_full <= last_full:
        kept = (replace(f, size=last_full - first_full + 1), *rest) if last_full > first_full else rest
        yield AxisMap(start + first_full * f.weight - low, kept), first_full * f.step, first_full * f.tensor
        partial = [i for i in (touched_first, touched_last) if not first_full <= i <= last_full]
    else:
        partial = list(range(touched_first, touched_last + 1))
    for i in dict.fromkeys(partial):
        for m, step, tensor in _restrict(start + i * f.weight, rest, low, high):
            yield m, step + i * f.step, tensor + i * f.tensor


def restrict_part(part: Part, box: tuple[tuple[int, int], ...]) -> list[Part]:
    """The part of `part` inside `box` ([low, high) per axis), renumbered from the box's corner: disjoint parts, none if they do not meet."""
    parts = [(part.base, part.first, ())]  # type: list[tuple[int, int, tuple[AxisMap, ...]]]
    for axis, (low, high) in zip(part.axes, box, strict=True):
        if low <= axis.start and axis.stop <= high:
            kept: list[Restricted] = [(AxisMap(axis.start - low, axis.factors), 0, 0)]
        else:
            kept = restrict(axis, low, high)
            if not kept:
                return []
        parts = [(b + step, t + tensor, (*axes, m)) for b, t, axes in parts for m, step, tensor in kept]
    return [replace(part, base=b, first=t, axes=axes) for b, t, axes in parts]


def merge_axes(axes: tuple[AxisMap, ...], sizes: tuple[int, ...]) -> AxisMap:
    """Adjacent axes of the given sizes as one, row-major."""
    start, factors, weight = 0, (), 1  # type: int, tuple[Factor, ...], int
    for axis, size in zip(reversed(axes), reversed(sizes), strict=True):
        start += axis.start * weight
        factors = tuple(replace(f, weight=f.weight * weight) for f in axis.factors) + factors
        weight *= size
    return AxisMap(start, factors)


def split_axis(axis: AxisMap, inner: int, join: bool = True) -> list[tuple[AxisMap, AxisMap, int, int]]:
    """One axis as two, the second of size `inner`: pieces (outer map, inner map, added base, added first).

    One piece where the axis starts on a row of the new shape; where it begins or ends inside one, the incomplete rows are pieces of their own.
    Factors that do not fit the rows (a transposed 3x4 as 2x6) are cut where rows begin, once for each way they meet them.
    With `join`, loops that advance as one become one; without, every loop of the pieces is part of one loop of the axis.
    """
    rows = sorted({axis.start, -(-axis.start // inner) * inner, axis.stop // inner * inner, axis.stop})
    cuts = [r for r in rows if axis.start <= r <= axis.stop]
    out = []
    for low, high in pairwise(cuts):
        for m, step, tensor in restrict(axis, low, high):
            pieces = _split(m.start + low, (), joined(m.factors) if join else m.factors, inner)
            out += [(outer, rest, step + s, tensor + t) for outer, rest, s, t in pieces]
    return out


def joined(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """The same loops with adjacent ones that advance as one made one."""
    out: list[Factor] = []
    for f in factors:
        if out and out[-1] == replace(
            f, size=out[-1].size, weight=f.weight * f.size, step=f.step * f.size, tensor=f.tensor * f.size
        ):
            out[-1] = replace(f, size=f.size * out[-1].size)
        elif f.size > 1:
            out.append(f)
    return tuple(out)


def _split(
    start: int, outer: tuple[Factor, ...], rest: tuple[Factor, ...], inner: int
) -> Iterator[tuple[AxisMap, AxisMap, int, int]]:
    """`outer` counts whole rows already; `rest` is to be divided between rows and the inside of a row."""
    while rest and rest[0].weight % inner == 0:
        outer, rest = (*outer, replace(rest[0], weight=rest[0].weight // inner)), rest[1:]
    stop = AxisMap(start, rest).stop
    if start % inner + stop - start <= inner:
        yield AxisMap(start // inner, outer), AxisMap(start % inner, rest), 0, 0
        return
    f = rest[0]
    period = inner // gcd(f.weight, inner)  # iterations after which it meets the rows as it did at first
    if f.size > period:
        turns, left = divmod(f.size, period)
        loop = Factor(turns, f.weight * period // inner, f.step * period, f.tensor * period)
        yield from _split(start, (*outer, loop) if turns > 1 else outer, (replace(f, size=period), *rest[1:]), inner)
        if left:
            done = turns * period
            last = (replace(f, size=left), *rest[1:]) if left > 1 else rest[1:]
            for a, b, step, tensor in _split(start + done * f.weight, outer, last, inner):
                yield a, b, step + done * f.step, tensor + done * f.tensor
        return
    if f.weight > inner:
        for i in range(f.size):
            for a, b, step, tensor in _split(start + i * f.weight, outer, rest[1:], inner):
                yield a, b, step + i * f.step, tensor + i * f.tensor
        return
    for row in range(start // inner, -(-stop // inner)):
        for m, step, tensor in restrict(AxisMap(start, rest), row * inner, (row + 1) * inner):
            yield AxisMap(row, outer), m, step, tensor

"""What becomes what, for people: which elements of which stored tensor become which region of an output.

A `Part` says it as loops. Here one part becomes one `Piece` for all tensors that its loops step over: the loops over
tensors move a region through the output, all other loops are regions as one writes them, `[0:4096, :]`. A region of a
transposed or interleaved axis is shown by its bounds and its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, prod
from typing import NamedTuple

from ckptc.ops.nest import AxisMap, Factor, Part
from ckptc.plan.model import Array, Kind

Range = tuple[int, int, int]  # start, stop, step


class Loop(NamedTuple):
    """A loop over tensors: of each iteration, how far it goes in the list, and along which axis of the output."""

    size: int
    tensors: int
    axis: int
    weight: int


class Piece(NamedTuple):
    """What one part does, of each tensor that it reads."""

    source: int | None  # position in `Kind.sources`; None for constants
    first: int  # position in the source's list of the first tensor
    loops: tuple[Loop, ...]  # outermost in the list first
    base: int  # element where the region begins in the tensor, counted from where the output begins there
    extents: tuple[Range, ...]  # the region in the tensor, along each of its axes, counted from `base`
    region: tuple[Range, ...]  # the region in the output, for the first tensor
    value: float  # of constants

    def tensors(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Of each tensor: its position in the list, and how far the region is moved along each axis of the output."""

        def walk(loops: tuple[Loop, ...], at: int, moved: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
            if not loops:
                yield at, moved
                return
            loop, rest = loops[0], loops[1:]
            for k in range(loop.size):
                further = tuple(m + k * loop.weight if a == loop.axis else m for a, m in enumerate(moved))
                yield from walk(rest, at + k * loop.tensors, further)

        yield from walk(self.loops, self.first, (0,) * len(self.region))


class Traced(NamedTuple):
    """One region of one stored tensor that becomes one region of an output."""

    tensor: int | None  # position in `Plan.tensors`; None for constants
    source: tuple[Range, ...]
    output: tuple[Range, ...]
    value: float


def pieces(kind: Kind) -> list[Piece]:
    return [_piece(part, kind) for part in kind.parts]


def trace(array: Array) -> Iterator[Traced]:
    """All of an output's regions, one for each tensor and part."""
    for piece in pieces(array.kind):
        if piece.source is None:
            yield Traced(None, (), piece.region, piece.value)
            continue
        operand = array.sources[piece.source]
        corner = _unravel(operand.begin + piece.base, operand.stored.shape)
        source = _moved(piece.extents, corner)
        for at, moved in piece.tensors():
            yield Traced(operand.tensors[at], source, _moved(piece.region, moved), 0.0)


def shown(region: Sequence[Range], shape: Sequence[int]) -> str:
    """`[0:96, :, 3]`: whole axes are `:`."""
    return "[" + ", ".join(map(_shown, region, shape)) + "]"


def _shown(axis: Range, size: int) -> str:
    start, stop, step = axis
    if (start, stop, step) == (0, size, 1):
        return ":"
    if stop == start + 1:
        return str(start)
    return f"{start}:{stop}" + (f":{step}" if step != 1 else "")


def _moved(region: Sequence[Range], by: Sequence[int]) -> tuple[Range, ...]:
    return tuple((start + n, stop + n, step) for (start, stop, step), n in zip(region, by, strict=True))


def _piece(part: Part, kind: Kind) -> Piece:
    loops = tuple(
        Loop(f.size, f.tensor, axis, f.weight) for axis, m in enumerate(part.axes) for f in m.factors if f.tensor
    )
    region = tuple(_range(m.start, [(f.size, f.weight) for f in m.factors if not f.tensor]) for m in part.axes)
    extents: tuple[Range, ...] = ()
    if part.source is not None:
        extents = _extents(part.axes, kind.sources[part.source].shape)
    return Piece(
        part.source, part.first, tuple(sorted(loops, key=lambda x: -x.tensors)), part.base, extents, region, part.value
    )


def _range(start: int, loops: Sequence[tuple[int, int]]) -> Range:
    """The bounds and the step of the indices that loops, of (size, weight), give."""
    stop = start + sum((size - 1) * weight for size, weight in loops) + 1
    count = prod(size for size, _ in loops)
    step = 1 if count == stop - start else gcd(*(weight for size, weight in loops if size > 1))
    return start, stop, step


def _extents(axes: Sequence[AxisMap], shape: Sequence[int]) -> tuple[Range, ...]:
    """The region of a tensor that loops step through, from the element where they begin."""
    strides = [prod(shape[n + 1 :]) for n in range(len(shape))]
    found: list[list[tuple[int, int]]] = [[] for _ in shape]
    for f in (f for m in axes for f in m.factors if not f.tensor and f.step and f.size > 1):
        _spread(f, shape, strides, found)
    return tuple(_range(0, loops) for loops in found)


def _spread(f: Factor, shape: Sequence[int], strides: Sequence[int], found: list[list[tuple[int, int]]]) -> None:
    """One loop as loops along the tensor's axes: it may step through several, where they lie one after the other."""
    size, step = f.size, f.step
    for axis in reversed(range(len(shape))):
        outer = shape[0] * strides[0] if not axis else strides[axis - 1]
        if step >= outer and axis:
            continue
        each = step // strides[axis]
        inner = size if not axis else min(size, max(1, -(-shape[axis] // each)))
        if inner > 1:
            found[axis].append((inner, each))
        size, step = -(-size // inner), step * inner
        if size <= 1:
            return


def _unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    out = []
    for n in reversed(shape):
        out.append(index % n)
        index //= n
    return tuple(reversed(out))

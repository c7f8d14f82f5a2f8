"""The one copy between source bytes and a storage chunk: strided loops, in blocks that stay in cache, with arithmetic in between.

A transposition walks one side with large steps; done block by block, through a small scratch array, both sides move in whole cache lines. Each
block is copied into scratch in the source's order, turned into the target's dtype there, and copied out in the target's order.
Arithmetic is float32 and rounds once, at the end, to nearest even.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptc.ops.types import is_float, numpy_dtype

Array = npt.NDArray[Any]
Math = tuple[tuple[str, float | str], ...]

# Elements: how far a block runs at least, where the loops allow it. Short runs cost more in numpy's calls than in copying.
SOURCE_RUN = 256
TARGET_RUN = 512
LINE = 32  # elements in a cache line, of two bytes each; the first cache holds TARGET_RUN of them
BLOCK = 1 << 17  # elements of a block at most: its float32 copy stays within a core's second cache
LONG, PAD = (
    64,
    8,
)  # elements: rows of scratch from LONG on lie PAD apart, for rows a power of two apart share few of the first cache's sets
SHORT = 8  # elements of an innermost loop that costs more to start than to run
FEW = 4096  # elements: blocks of fewer cost more than they save


class Loop(NamedTuple):
    size: int
    source: int  # elements the source moves per iteration
    target: int  # elements the target moves per iteration


@dataclass(frozen=True, slots=True)
class Conversion:
    """From stored elements of one dtype to another, through `math`."""

    source: str
    target: str
    math: Math = ()

    @property
    def moves(self) -> bool:
        """Whether bytes are only moved."""
        return self.source == self.target and all(step == ("cast", self.target) for step in self.math)


def raw(itemsize: int) -> np.dtype[Any]:
    """An unsigned dtype to move elements with: numpy copies these faster than ml_dtypes' types, and never looks at them."""
    return np.dtype(f"u{itemsize}")


def simplify(loops: list[Loop]) -> list[Loop]:
    """The same walk with fewer loops, the target's slowest first: unit loops dropped, loops that continue each other joined."""
    ordered = sorted((x for x in loops if x.size > 1), key=lambda x: (-x.target, -x.source))
    out: list[Loop] = []
    for loop in ordered:
        if out and out[-1].target == loop.target * loop.size and out[-1].source == loop.source * loop.size:
            out[-1] = Loop(out[-1].size * loop.size, loop.source, loop.target)
        else:
            out.append(loop)
    return out


class Kernel:
    """Copies with its own scratch memory; one for each thread. `scratch_bytes` is all it allocates."""

    def __init__(self) -> None:
        self._values = np.empty(BLOCK, dtype=np.float32)
        self._rows = np.empty(BLOCK * 8 * (LONG + PAD) // LONG, dtype=np.uint8)  # for elements of up to 8 bytes
        self.scratch_bytes = self._values.nbytes + self._rows.nbytes

    def copy(
        self, source: Array, start: int, target: Array, at: int, loops: list[Loop], conversion: Conversion
    ) -> None:
        """target[at + Σ i·target] = convert(source[start + Σ i·source]). Both are flat arrays of their stored dtype."""
        loops = simplify(loops)
        sizes = tuple(x.size for x in loops)
        moves = conversion.moves
        if moves:
            source, target = source.view(raw(source.itemsize)), target.view(raw(target.itemsize))
        src = _view(source, start, sizes, tuple(x.source for x in loops))
        dst = _view(target, at, sizes, tuple(x.target for x in loops))
        if moves and (not loops or loops[-1].source == 1 or (loops[-1].size * 4 < SOURCE_RUN and prod(sizes) <= FEW)):
            np.copyto(dst, src)
            return
        extents = block_extents(loops, BLOCK)
        order = sorted(range(len(loops)), key=lambda i: -loops[i].source)  # the source's order
        back = tuple(int(i) for i in np.argsort(order))
        for corner in product(*(range(0, n, e) for n, e in zip(sizes, extents, strict=True))):
            # With `...` the result is a view, even of no axes.
            index: Any = (*(slice(c, c + e) for c, e in zip(corner, extents, strict=True)), ...)
            block = src[index].transpose(order)
            scratch = self._scratch(block.shape, target.dtype)
            if moves:
                np.copyto(scratch, block)
            else:
                with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaNs are values as any others
                    self._convert(block, conversion, scratch)
            _copy_out(_bits(dst[index]), _bits(scratch).transpose(back))

    def _scratch(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Scratch memory for a block, with room after each of its rows if they are long."""
        if len(shape) < 2 or shape[-1] < LONG:
            return self._rows.view(dtype)[: prod(shape)].reshape(shape)
        rows = (*shape[:-1], shape[-1] + PAD)
        return self._rows.view(dtype)[: prod(rows)].reshape(rows)[..., : shape[-1]]

    def _convert(self, block: Array, conversion: Conversion, out: Array) -> None:
        """`out` = the block through the conversion's math, in the target's dtype."""
        if not is_float(conversion.source):
            np.copyto(out, block, casting="unsafe")
            return
        values = self._values[: block.size].reshape(block.shape)
        np.copyto(values, block, casting="unsafe")
        for number, (step, operand) in enumerate(conversion.math):
            if step == "scale":
                np.multiply(values, np.float32(operand), out=values)
            elif step == "unscale":
                np.divide(values, np.float32(operand), out=values)
            elif step == "add":
                np.add(values, np.float32(operand), out=values)
            else:
                dtype = str(operand)
                if dtype != "float32" and number + 1 < len(conversion.math):  # the last cast is `out`'s own
                    np.copyto(values, values.astype(numpy_dtype(dtype)), casting="unsafe")
        np.copyto(out, values, casting="unsafe")


def _copy_out(target: Array, source: Array) -> None:
    """numpy's innermost loop is the target's fastest axis: where that is short, it is walked here instead."""
    if target.ndim > 1 and target.shape[-1] < SHORT:
        for i in range(target.shape[-1]):
            np.copyto(target[..., i], source[..., i])
    else:
        np.copyto(target, source)


def _bits(array: Array) -> Array:
    """The same elements as plain integers."""
    return array.view(raw(array.itemsize))


def _view(flat: Array, start: int, sizes: tuple[int, ...], steps: tuple[int, ...]) -> Array:
    """A strided view, within bounds: numpy would not check."""
    last = start + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
    if start < 0 or last >= flat.size:
        raise IndexError(f"elements {start} to {last} of a buffer of {flat.size}")
    item = flat.itemsize
    # As plain integers first: numpy cannot make strided views of all of ml_dtypes' types.
    view = np.lib.stride_tricks.as_strided(flat.view(raw(item))[start:], sizes, tuple(s * item for s in steps))
    return view.view(flat.dtype)


def block_extents(loops: list[Loop], most: int) -> list[int]:
    """How much of each loop one block covers: whole runs on both sides, as many as `most` allows."""
    extents = [1] * len(loops)
    size = 1

    def grow(axes: list[int], enough: int) -> None:
        nonlocal size
        run = 1
        for axis in axes:
            room = most // (size // extents[axis])
            wanted = min(loops[axis].size, max(extents[axis], -(-enough // run)), room)
            if wanted > extents[axis]:
                size = size // extents[axis] * wanted
                extents[axis] = wanted
            run *= extents[axis]
            if run >= enough or extents[axis] < loops[axis].size:
                return

    by_source = sorted(range(len(loops)), key=lambda i: loops[i].source)
    by_target = sorted(range(len(loops)), key=lambda i: loops[i].target)
    grow(by_source, SOURCE_RUN)
    grow(by_target, TARGET_RUN)
    longest = most  # what is left goes to longer runs at the target
    if by_source[:1] != by_target[:1]:
        # Of a transposition, a run takes an element each from many lines of scratch, which are to stay in the first
        # cache for the next run: with a third more lines it is half as fast.
        longest = TARGET_RUN * max(1, LINE // extents[by_source[0]])
    grow(by_target, longest)
    return extents

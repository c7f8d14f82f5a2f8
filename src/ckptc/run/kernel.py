"""The one copy between source bytes and a storage chunk: strided loops, in blocks that stay in cache, with arithmetic in between.

A transposition walks one side with large steps; done block by block, through a small scratch array, both sides move in whole cache lines. Each
block is copied into scratch in the source's order, turned into the target's dtype there, and copied out in the target's order.
Arithmetic is float32 and rounds once, at the end, to nearest even.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptc.ops.types import is_float, itemsize, numpy_dtype

Array = npt.NDArray[Any]
Math = tuple[tuple[str, float | str], ...]

RUN = 128  # elements: a block's shortest contiguous run on either side, where the loops allow it
BLOCK = 1 << 15  # elements of a block at most: with its float32 copy it stays within a core's cache


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
        self._a = np.empty(BLOCK, dtype=np.float32)
        self._b = np.empty(BLOCK, dtype=np.uint32)
        self.scratch_bytes = self._a.nbytes + self._b.nbytes

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
        if moves and (not loops or loops[-1].source == 1 or (loops[-1].size * 4 < RUN and _short(loops))):
            np.copyto(dst, src)
            return
        extents = block_extents(loops, BLOCK)
        order = sorted(range(len(loops)), key=lambda i: -loops[i].source)  # the source's order
        back = tuple(int(i) for i in np.argsort(order))
        for corner in product(*(range(0, n, e) for n, e in zip(sizes, extents, strict=True))):
            # With `...` the result is a view, even of no axes.
            index: Any = (*(slice(c, c + e) for c, e in zip(corner, extents, strict=True)), ...)
            block = src[index].transpose(order)
            if moves:
                scratch = self._a.view(source.dtype)[: block.size].reshape(block.shape)
                np.copyto(scratch, block)
            else:
                scratch = self._convert(block, conversion)
            np.copyto(dst[index], scratch.transpose(back))

    def _convert(self, block: Array, conversion: Conversion) -> Array:
        """A contiguous array of the target dtype, in scratch where the dtypes are the usual ones."""
        math = conversion.math
        if not is_float(conversion.source):
            return block.astype(numpy_dtype(conversion.target))
        values = self._a[: block.size].reshape(block.shape)
        if conversion.source == "bfloat16":
            np.left_shift(block.view(np.uint16), np.uint32(16), out=values.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(values, block, casting="unsafe")
        rounded = "float32"
        for number, (step, operand) in enumerate(math):
            if step == "scale":
                np.multiply(values, np.float32(operand), out=values)
            elif step == "unscale":
                np.divide(values, np.float32(operand), out=values)
            elif step == "add":
                np.add(values, np.float32(operand), out=values)
            else:
                rounded = str(operand)
                if rounded != "float32" and number + 1 < len(math):
                    np.copyto(values, values.astype(numpy_dtype(rounded)), casting="unsafe")
        if conversion.target == "float32":
            return values
        if conversion.target == "bfloat16":
            return self._round_bfloat16(values)
        return values.astype(numpy_dtype(conversion.target))

    def _round_bfloat16(self, values: Array) -> Array:
        """To the nearest bfloat16, ties to even, on the bits: add half of the last place kept, less one where it is even, and cut.

        A NaN could carry into infinity that way, so arrays that have one take ml_dtypes' slower path.
        """
        if np.isnan(values.sum(dtype=np.float32)) and np.isnan(values).any():
            return values.astype(numpy_dtype("bfloat16"))
        bits = values.view(np.uint32)
        odd = self._b[: values.size].reshape(values.shape)
        np.right_shift(bits, np.uint32(16), out=odd)
        np.bitwise_and(odd, np.uint32(1), out=odd)
        np.add(odd, np.uint32(0x7FFF), out=odd)
        np.add(odd, bits, out=odd)
        np.right_shift(odd, np.uint32(16), out=odd)
        # The low halves of the 32-bit results, as they lie on a little-endian machine.
        return (
            odd.view(np.uint16)[..., ::2].view(numpy_dtype("bfloat16"))
            if odd.ndim
            else odd.astype(np.uint16).view(numpy_dtype("bfloat16"))
        )


def _view(flat: Array, start: int, sizes: tuple[int, ...], steps: tuple[int, ...]) -> Array:
    """A strided view, within bounds: numpy would not check."""
    last = start + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
    if start < 0 or last >= flat.size:
        raise IndexError(f"elements {start} to {last} of a buffer of {flat.size}")
    item = flat.itemsize
    # As plain integers first: numpy cannot make strided views of all of ml_dtypes' types.
    view = np.lib.stride_tricks.as_strided(flat.view(raw(item))[start:], sizes, tuple(s * item for s in steps))
    return view.view(flat.dtype)


def _short(loops: list[Loop]) -> bool:
    """Whether so little is moved that blocks cost more than they save."""
    total = 1
    for loop in loops:
        total *= loop.size
    return total <= 4096


def block_extents(loops: list[Loop], most: int) -> list[int]:
    """How much of each loop one block covers: whole runs of RUN elements on both sides, as many as `most` allows."""
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
    grow(by_source, RUN)
    grow(by_target, RUN)
    grow(by_target, most)  # what is left goes to longer runs at the target
    return extents


def element_bytes(dtype: str) -> int:
    return itemsize(dtype)

"""The copy kernel against a slow one that walks every element."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptc.ops.types import numpy_dtype
from ckptc.run import kernel
from ckptc.run.kernel import Conversion, Kernel, Loop, block_extents, simplify

SCALE = ("scale", 0.3)


def slowly(
    source: npt.NDArray[Any], start: int, target: npt.NDArray[Any], at: int, loops: list[Loop], conversion: Conversion
) -> None:
    """Element by element, each through its own arithmetic."""
    for index in product(*(range(x.size) for x in loops)):
        value = source[start + sum(i * x.source for i, x in zip(index, loops, strict=True))]
        for step, operand in conversion.math:
            if step == "cast":
                value = np.asarray(value).astype(numpy_dtype(str(operand)))[()]
            else:
                wide = np.float32(value)
                by = np.float32(operand)
                value = {"scale": wide * by, "unscale": wide / by, "add": wide + by}[step]
        place = at + sum(i * x.target for i, x in zip(index, loops, strict=True))
        target[place] = np.asarray(value).astype(target.dtype)


def loops_of(sizes: list[int], order: list[int], gap: int) -> tuple[list[Loop], int, int]:
    """Loops over a row-major target of `sizes`, whose source holds the axes in `order`, its rows `gap` apart; and the
    sizes of both."""
    target, step = [0] * len(sizes), 1
    for axis in reversed(range(len(sizes))):
        target[axis], step = step, step * sizes[axis]
    source, step = [0] * len(sizes), 1
    for number, axis in enumerate(reversed(order)):
        source[axis], step = step, step * sizes[axis] + (gap if number == 0 else 0)
    return [Loop(*x) for x in zip(sizes, source, target, strict=True)], step, prod(sizes)


def noise(size: int, dtype: str) -> npt.NDArray[Any]:
    """Bits of every kind, NaNs and infinities among them."""
    bits = np.random.default_rng(size).integers(0, 256, size * numpy_dtype(dtype).itemsize, dtype=np.uint8)
    return bits.view(numpy_dtype(dtype))


def assert_same(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Bit for bit; of NaNs, only that they are."""
    both = [np.isnan(x.astype(np.float32)) for x in (found, expected)]
    assert np.array_equal(*both)
    bits = [np.where(both[0], 0, x.view(f"u{x.itemsize}")) for x in (found, expected)]
    assert np.array_equal(*bits)


@st.composite
def walks(draw: st.DrawFn) -> tuple[list[Loop], int, int]:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    return loops_of(sizes, draw(st.permutations(range(len(sizes)))), draw(st.integers(0, 3)))


CONVERSIONS = [
    Conversion("bfloat16", "bfloat16"),
    Conversion("int64", "int64"),
    Conversion("float8_e4m3fn", "float8_e4m3fn"),
    Conversion("bfloat16", "float32", (("cast", "float32"),)),
    Conversion("float32", "bfloat16", (("cast", "bfloat16"),)),
    Conversion("float16", "bfloat16", (("cast", "bfloat16"),)),
    Conversion("bfloat16", "bfloat16", (SCALE, ("cast", "bfloat16"))),
    Conversion("bfloat16", "float32", (("cast", "float32"), ("add", 1.0))),
    Conversion("bfloat16", "bfloat16", (("unscale", 3.0), ("cast", "float16"), SCALE, ("cast", "bfloat16"))),
]


@pytest.mark.parametrize("block", [kernel.BLOCK, 64, 8], ids=str)
@pytest.mark.parametrize("conversion", CONVERSIONS, ids=lambda c: f"{c.source}-{c.target}-{len(c.math)}")
@given(walk=walks(), start=st.integers(0, 5), at=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_every_element_arrives_converted(
    block: int, conversion: Conversion, walk: tuple[list[Loop], int, int], start: int, at: int
) -> None:
    loops, source_size, target_size = walk
    source = noise(start + source_size, conversion.source)
    found = noise(at + target_size + 3, conversion.target)
    expected = found.copy()
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(kernel, "BLOCK", block)
        patch.setattr(kernel, "FEW", 0)  # blocks even where they do not pay
        Kernel().copy(source, start, found, at, loops, conversion)
        slowly(source, start, expected, at, loops, conversion)
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int64", "float8_e4m3fn"])
@pytest.mark.parametrize("order", [[1, 0, 2], [2, 1, 0], [0, 2, 1]], ids=str)
def test_blocks_of_full_size_with_room_between_their_rows(dtype: str, order: list[int]) -> None:
    sizes = [37, 300, 130]
    loops, source_size, target_size = loops_of(sizes, order, 0)
    source, target = noise(source_size, dtype), np.zeros(target_size, numpy_dtype(dtype))
    Kernel().copy(source, 0, target, 0, loops, Conversion(dtype, dtype))
    bits = source.view(f"u{source.itemsize}").reshape([sizes[a] for a in order])
    assert np.array_equal(target.view(bits.dtype).reshape(sizes), bits.transpose(np.argsort(order)))


def test_rounding_is_to_nearest_even_at_both_sides_of_every_tie() -> None:
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    values = np.concatenate([high + low for low in (0, 0x7FFF, 0x8000, 0x8001)]).astype(np.uint32).view(np.float32)
    found = np.empty(values.size, dtype=ml_dtypes.bfloat16)
    conversion = Conversion("float32", "bfloat16", (("cast", "bfloat16"),))
    with np.errstate(all="ignore"):
        Kernel().copy(values, 0, found, 0, [Loop(values.size, 1, 1)], conversion)
        # 2^-8 of the distance between neighbours decides; on the integers of the encoding this is exact.
        bits = values.view(np.uint32).astype(np.uint64)
    even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    numbers = ~np.isnan(values)
    assert np.array_equal(found.view(np.uint16)[numbers], even[numbers].astype(np.uint16))
    assert np.isnan(found.astype(np.float32)[~numbers]).all()


@given(walk=walks(), most=st.integers(1, 200))
@settings(deadline=None)
def test_blocks_stay_within_what_they_may_hold(walk: tuple[list[Loop], int, int], most: int) -> None:
    loops = simplify(walk[0])
    extents = block_extents(loops, most)
    assert prod(extents) <= most
    assert all(1 <= e <= x.size for e, x in zip(extents, loops, strict=True))


def test_runs_at_the_target_do_not_outgrow_the_first_cache() -> None:
    rows = 5376
    for row in (4, 192, 3072):  # elements that lie side by side at the source
        (at_target, at_source) = block_extents([Loop(rows, row, 1), Loop(row, 1, rows)], kernel.BLOCK)
        lines = at_target * min(at_source, kernel.LINE) // kernel.LINE
        assert at_target >= kernel.TARGET_RUN >= lines, row


@pytest.mark.parametrize("step", [1, 2])
def test_what_is_not_transposed_is_done_in_blocks_as_large_as_may_be(step: int) -> None:
    assert block_extents([Loop(1 << 24, step, 1)], kernel.BLOCK) == [kernel.BLOCK]
    rows = [Loop(4096, 8192, 4096), Loop(4096, step, 1)]
    assert prod(block_extents(rows, kernel.BLOCK)) == kernel.BLOCK


def test_walks_out_of_bounds_are_refused() -> None:
    source, target = np.zeros(8, np.uint16), np.zeros(8, np.uint16)
    move = Conversion("uint16", "uint16")
    with pytest.raises(IndexError, match="elements 0 to 8 of a buffer of 8"):
        Kernel().copy(source, 0, target, 0, [Loop(9, 1, 1)], move)
    with pytest.raises(IndexError, match="elements 1 to 8 of a buffer of 8"):
        Kernel().copy(source, 0, target, 1, [Loop(8, 1, 1)], move)

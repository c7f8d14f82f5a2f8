"""Decoding, against the formats as published, one element at a time in plain Python; then through the worker."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ops.evaluate import Array, dtype_of, same
from tests.ops.strategies import STEPS, Made, apply, op_for
from tests.run.test_worker import Stored, check, cuts

from ckptc.ops import Axis, Cast, DequantBlockFp8, DequantMxfp4, ReshapeHeads, TensorType, Transpose
from ckptc.ops.nest import Part, whole
from ckptc.plan.reads import places_in, plan_rows, scale_runs
from ckptc.run.decode import E8M0, TABLES, Decoder, as_float32

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]

relaxed = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
SCALES = ("float32", "bfloat16", "float8_e8m0fnu")


# --- the formats, slowly ----------------------------------------------------------------------------------------------


def e4m3(byte: int) -> float:
    """OCP 8-bit floating point 1.0, table 1: bias 7, no infinities, NaN where all bits but the sign are set."""
    sign, exponent, mantissa = (-1.0) ** (byte >> 7), byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def e5m2(byte: int) -> float:
    """The same table: bias 15, infinities and NaN as IEEE 754 has them."""
    sign, exponent, mantissa = (-1.0) ** (byte >> 7), byte >> 2 & 31, byte & 3
    if exponent == 31:
        return math.nan if mantissa else sign * math.inf
    return sign * (mantissa * 2.0**-16 if exponent == 0 else (4 + mantissa) * 2.0 ** (exponent - 17))


def e2m1(code: int) -> float:
    """OCP MX 1.0, 5.3.3: bias 1, one bit of mantissa, no infinities or NaN."""
    sign, exponent, mantissa = (-1.0) ** (code >> 3), code >> 1 & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2))


def e8m0(byte: int) -> float:
    """OCP MX 1.0, 5.4.1: a power of two with bias 127; 255 is NaN."""
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def scale_of(scales: Array, at: tuple[int, ...]) -> float:
    if scales.dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
        return e8m0(int(scales.view(np.uint8)[at]))
    return float(scales[at])


def rounded(value: float) -> np.float32:
    """A product of two float32 numbers, exact as a Python float, rounded once."""
    with np.errstate(over="ignore"):
        return np.float32(value)


def slow_block_fp8(values: Array, scales: Array, block: Shape) -> Array:
    """DeepSeek-V3, README_WEIGHTS.md: a weight is its code times its block's `weight_scale_inv`; edges are cut."""
    decode = e4m3 if values.dtype == ml_dtypes.float8_e4m3fn else e5m2
    out, lead = np.zeros(values.shape, np.float32), values.ndim - len(block)
    for index in np.ndindex(values.shape):
        at = (*index[:lead], *(i // b for i, b in zip(index[lead:], block, strict=True)))
        out[index] = rounded(decode(int(values.view(np.uint8)[index])) * scale_of(scales, at))
    return out


def slow_mxfp4(blocks: Array, scales: Array) -> Array:
    """OCP MX 1.0: 32 elements share a scale; a byte holds two, the first in its low four bits."""
    out = np.zeros((*blocks.shape[:-2], blocks.shape[-2] * 32), np.float32)
    for index in np.ndindex(out.shape):
        *lead, i = index
        byte = int(blocks[(*lead, i // 32, i % 32 // 2)])
        out[index] = rounded(e2m1(byte >> 4 if i % 2 else byte & 15) * scale_of(scales, (*lead, i // 32)))
    return out


# --- random stored tensors --------------------------------------------------------------------------------------------


def random_bits(seed: int, shape: Shape, dtype: str) -> Array:
    raw = np.random.default_rng(seed).integers(0, 256, prod(shape) * dtype_of(dtype).itemsize, np.uint8)
    return raw.view(dtype_of(dtype)).reshape(shape)


@st.composite
def stored(draw: Draw, tensors: int = 1) -> tuple[Stored, Array]:
    """Tensors of codes and scales of one kind, every bit pattern, and the stack of what they decode to."""
    seed = draw(st.integers(0, 1000))
    if draw(st.booleans()):
        shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
        block = tuple(draw(st.lists(st.integers(1, 4), max_size=len(shape))))
        lead = len(shape) - len(block)
        scales = (*shape[:lead], *(-(-n // b) for n, b in zip(shape[lead:], block, strict=True)))
        dtype, op = draw(st.sampled_from(("float8_e4m3fn", "float8_e5m2"))), DequantBlockFp8(block)
        scale_dtype = draw(st.sampled_from(SCALES))
    else:
        shape = (*draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)), 16)
        dtype, op, scales = "uint8", DequantMxfp4(), shape[:-1]  # type: ignore[assignment]
        scale_dtype = draw(st.sampled_from(("uint8", "float8_e8m0fnu")))
    values = [random_bits(seed + 2 * i, shape, dtype) for i in range(tensors)]
    factors = [random_bits(seed + 2 * i + 1, scales, scale_dtype) for i in range(tensors)]
    slow = [
        slow_block_fp8(v, s, op.block) if isinstance(op, DequantBlockFp8) else slow_mxfp4(v, s)
        for v, s in zip(values, factors, strict=True)
    ]
    return Stored(op, values, factors), np.stack(slow)


def decoded_leaf(array: Array) -> Made:
    """A stack of decoded tensors as a leaf: its first axis counts tensors."""
    names = [Axis(f"d{i}", n) for i, n in enumerate(array.shape)]
    each = array.shape[1:]
    axes = [whole(array.shape[0], 0, 1), *(whole(n, prod(each[i + 1 :])) for i, n in enumerate(each))]
    return Made(
        TensorType(tuple(names), "float32"), array, [Part(0, 0, 0, tuple(axes))], [list(array)], f"{array.shape}"
    )


# --- the decoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "slow"), [("float8_e4m3fn", e4m3), ("float8_e5m2", e5m2)])
def test_every_fp8_code_is_what_the_format_says(dtype: str, slow: Callable[[int], float]) -> None:
    assert same(TABLES[dtype][0], np.array([slow(byte) for byte in range(256)], np.float32))


def test_every_scale_exponent_is_exact() -> None:
    assert same(E8M0, np.array([e8m0(byte) for byte in range(256)], np.float32))
    assert float(E8M0[0]) == 2.0**-127


@pytest.mark.parametrize("dtype", SCALES)
def test_scales_become_float32(dtype: str) -> None:
    scales = random_bits(3, (4, 5), dtype)
    assert same(as_float32(scales), scales.astype(np.float32))


def decode_all(how: Stored, block: int, part: Part | None = None) -> Array:
    """The rows of one tensor that a part needs (all, without one), by a decoder with blocks of `block` elements."""
    values, scales = how.values[0], how.scales[0]
    layout = how.op.rows(values.shape)
    size = prod(layout.axes) * layout.length
    part = part or Part(0, 0, 0, (whole(size // layout.length, layout.length), whole(layout.length, 1)))
    rows = plan_rows(part, layout)
    runs = scale_runs(rows.scale_rows())
    flat, by_row = values.reshape(-1), scales.reshape(-1, layout.scales)
    codes = np.concatenate([flat[first : first + length] for first, length in rows.read.runs()])
    read = np.concatenate([by_row[first : first + length] for first, length in runs])
    out = np.full(rows.count * layout.length, 7, np.float32)
    places = places_in(runs, rows.scale_rows())
    Decoder(block).decode(rows, values.dtype.name, codes.view(np.uint8), read.reshape(-1), places, out)
    return out.reshape(rows.count, layout.length)


@relaxed
@given(case=stored(), block=st.sampled_from((2, 4, 6, 32, 64, 1 << 15)))
def test_rows_decode_to_codes_times_scales(case: tuple[Stored, Array], block: int) -> None:
    how, slow = case
    out = decode_all(how, block)
    assert same(out.reshape(slow[0].shape), slow[0])


@relaxed
@given(case=stored(), block=st.sampled_from((2, 8, 64)), data=st.data())
def test_some_rows_decode_with_their_own_scales(case: tuple[Stored, Array], block: int, data: st.DataObject) -> None:
    """Every n-th row from some row on: other scales than those of the rows before must not be used."""
    how, slow = case
    length = how.op.rows(how.values[0].shape).length
    rows = slow.reshape(-1, length)
    first = data.draw(st.integers(0, len(rows) - 1))
    step = data.draw(st.integers(1, len(rows)))
    wanted = rows[first::step]
    part = Part(0, first * length, 0, (whole(len(wanted), step * length), whole(length, 1)))
    assert same(decode_all(how, block, part), wanted)


def test_rows_that_do_not_follow_evenly() -> None:
    """Two of every three rows, read in one run with those between."""
    codes, scales = random_bits(1, (9, 4), "float8_e4m3fn"), random_bits(2, (9, 1), "float8_e8m0fnu")
    how, slow = Stored(DequantBlockFp8((1, 4)), [codes], [scales]), slow_block_fp8(codes, scales, (1, 4))
    part = Part(0, 0, 0, (whole(3, 3 * 4), whole(2, 4), whole(4, 1)))
    for block in (4, 8, 1 << 15):
        assert same(decode_all(how, block, part), slow[[0, 1, 3, 4, 6, 7]])


def test_mxfp4_of_every_byte_under_every_scale() -> None:
    """Subnormal products are exact, those beyond float32 infinite, and scale 255 makes NaN of zeros too."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (256, 1, 1))
    scales = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 16))
    out = decode_all(Stored(DequantMxfp4(), [blocks], [scales]), 1 << 15)
    assert same(out, slow_mxfp4(blocks, scales))
    assert np.isnan(out[255]).all()
    assert float(out[0, 2]) == 0.5 * 2.0**-127


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_of_every_byte_under_every_power_of_two(dtype: str) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1)).view(dtype_of(dtype))
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).reshape(256, 1)
    out = decode_all(Stored(DequantBlockFp8((1, 256)), [codes], [scales]), 1 << 15)
    assert same(out, slow_block_fp8(codes, scales, (1, 256)))


def test_rows_that_share_scales_and_rows_that_do_not_come_out_alike() -> None:
    """Blocks of the size the decoder spreads scales for, a block's last rows and columns cut short."""
    codes, scales = random_bits(1, (300, 200), "float8_e4m3fn"), random_bits(2, (3, 2), "bfloat16")
    op = DequantBlockFp8((128, 128))
    types = (
        TensorType((Axis("a", 300), Axis("b", 200)), "float8_e4m3fn"),
        TensorType((Axis("", 3), Axis("", 2)), "bfloat16"),
    )
    with np.errstate(all="ignore"):
        expected = op.forward([codes, scales], types)
    for block in (1 << 15, 1 << 10, 64):
        assert same(decode_all(Stored(op, [codes], [scales]), block), expected)


# --- through the worker -----------------------------------------------------------------------------------------------


@relaxed
@given(data=st.data())
def test_decoded_sources_go_through_any_ops_in_any_units(data: st.DataObject) -> None:
    """Some tensors, ops, and a target of float32 or bfloat16: the same as decoding all and applying the ops."""
    how, slow = data.draw(st.integers(1, 3).flatmap(lambda n: stored(n)))
    made = decoded_leaf(slow)
    with np.errstate(all="ignore"):
        for _ in range(data.draw(st.integers(0, 4))):
            op = op_for(data.draw, data.draw(st.sampled_from(STEPS)), made.type)
            if op is not None and op.infer([made.type]).size <= 2000:
                made = apply(op, [made])
        if data.draw(st.booleans()) and made.type.dtype != "bfloat16":
            made = apply(Cast("bfloat16"), [made])
        check(made, *data.draw(cuts(made.type.shape)), {0: how})


def block_fp8(shape: Shape, block: Shape) -> tuple[Stored, Made]:
    """A stack of one fp8 tensor with moderate scales, and the leaf it decodes to."""
    codes = random_bits(5, shape, "float8_e4m3fn")
    lead = len(shape) - len(block)
    scales = np.random.default_rng(6).uniform(
        0.5, 2, (*shape[:lead], *(-(-n // b) for n, b in zip(shape[lead:], block, strict=True)))
    )
    how = Stored(DequantBlockFp8(block), [codes], [scales.astype(np.float32)])
    return how, decoded_leaf(slow_block_fp8(codes, how.scales[0], block)[None])


def test_a_unit_reads_its_rows_and_their_scales_alone() -> None:
    """Ten rows of an fp8 tensor in two blocks of rows: one run of codes, one of two rows of scales."""
    how, made = block_fp8((64, 48), (16, 16))
    ran = check(apply(Cast("bfloat16"), [made]), (1, 10, 48), (1, 10, 48), {0: how})
    sizes = [size for _, size in ran.reads]
    assert sizes[:2] == [10 * 48, 1 * 3 * 4]
    assert sizes[2:4] == [10 * 48, 2 * 3 * 4]
    assert ran.bytes_read == sum(sizes)


def test_part_of_a_row_reads_the_whole_row() -> None:
    how, made = block_fp8((6, 8), (2, 4))
    ran = check(made, (1, 6, 2), (1, 6, 4), {0: how})
    assert [size for _, size in ran.reads] == [48, 3 * 2 * 4] * 2


def test_experts_in_one_tensor_keep_their_own_scales() -> None:
    how, made = block_fp8((3, 6, 10), (4, 4))
    check(apply(Transpose(("d1", "d3", "d0", "d2")), [made]), (2, 10, 1, 6), (2, 10, 1, 6), {0: how})


def test_a_grid_of_decoded_tensors_stacks_anywhere() -> None:
    """Layers and experts, two axes of fp8 tensors, on both sides of the tensors' own."""
    codes = [random_bits(i, (5, 6), "float8_e4m3fn") for i in range(6)]
    scales = [np.full((3, 2), i + 1, np.float32) for i in range(6)]
    how = Stored(DequantBlockFp8((2, 3)), codes, scales)
    stack = decoded_leaf(np.stack([slow_block_fp8(c, s, (2, 3)) for c, s in zip(codes, scales, strict=True)]))
    made = apply(ReshapeHeads("d0", (Axis("layer", 2), Axis("expert", 3))), [stack])
    check(apply(Transpose(("expert", "d2", "layer", "d1")), [made]), (2, 3, 1, 5), (2, 6, 2, 5), {0: how})


def test_a_transposed_target_reads_each_row_once() -> None:
    how, made = block_fp8((24, 40), (8, 8))
    ran = check(apply(Transpose(("d2", "d0", "d1")), [made]), (10, 1, 8), (40, 1, 8), {0: how})
    assert [size for _, size in ran.reads] == [8 * 40, 1 * 5 * 4] * 3

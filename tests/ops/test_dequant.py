"""The dequantising ops against the formats as published, computed one element at a time."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.evaluate import Array, same
from tests.ops.strategies import CASES, bits

from ckptc.ops import Axis, Decode, DequantBlockFp8, DequantMxfp4, TensorType
from ckptc.ops.dequant import decode_op

relaxed = settings(max_examples=60, deadline=None)


def e4m3(byte: int) -> float:
    """OCP 8-bit floating point 1.0: bias 7, no infinities, NaN where all exponent and mantissa bits are set."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e5m2(byte: int) -> float:
    """The same: bias 15, infinities and NaN as in IEEE 754."""
    sign, exponent, mantissa = -1.0 if byte >> 7 else 1.0, byte >> 2 & 31, byte & 3
    if exponent == 31:
        return math.nan if mantissa else sign * math.inf
    return sign * (mantissa / 4 * 2.0**-14 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 15))


def e8m0(byte: int) -> float:
    """OCP MX 1.0, 5.4.1: 2^(e - 127), and 255 is NaN."""
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


# OCP MX 1.0, 5.3.3: the values of e2m1 with sign bit 0, written out.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def slow_block_fp8(values: Array, scales: Array, block: tuple[int, ...]) -> Array:
    """DeepSeek-V3, README_WEIGHTS.md: each block times its `weight_scale_inv`; blocks at the edge are cut short."""
    decode = e4m3 if values.dtype == ml_dtypes.float8_e4m3fn else e5m2
    codes, out = values.view(np.uint8), np.zeros(values.shape, np.float32)
    lead = values.ndim - len(block)
    for index in np.ndindex(values.shape):
        at = (*index[:lead], *(i // b for i, b in zip(index[lead:], block, strict=True)))
        scale = e8m0(int(scales.view(np.uint8)[at])) if scales.dtype == ml_dtypes.float8_e8m0fnu else float(scales[at])
        out[index] = np.float32(decode(int(codes[index]))) * np.float32(scale)
    return out


def slow_mxfp4(blocks: Array, scales: Array) -> Array:
    """Two codes a byte, the low four bits first, each times the scale of its group of 32."""
    rows = []
    for lead in np.ndindex(blocks.shape[:-2]):
        row = []
        for group in range(blocks.shape[-2]):
            scale = e8m0(int(scales[(*lead, group)]))
            for byte in blocks[(*lead, group)].tolist():
                for code in (byte & 15, byte >> 4):
                    value = (-1.0 if code & 8 else 1.0) * E2M1[code & 7] * scale
                    row.append(
                        value if abs(value) <= 3.4028235e38 or value != value else math.copysign(math.inf, value)
                    )
        rows.append(row)
    return np.array(rows, np.float32).reshape(*blocks.shape[:-2], -1)


@relaxed
@given(case=CASES[DequantBlockFp8], seed=st.integers(0, 99))
def test_block_fp8_is_value_times_the_scale_of_its_block(
    case: tuple[DequantBlockFp8, tuple[TensorType, ...]], seed: int
) -> None:
    op, ins = case
    values, scales = bits(seed, ins[0]), bits(seed + 1, ins[1])
    with np.errstate(all="ignore"):
        assert same(op.forward([values, scales], ins), slow_block_fp8(values, scales, op.block))


@pytest.mark.parametrize("kind", [DequantBlockFp8, DequantMxfp4], ids=lambda kind: kind.name)
@relaxed
@given(data=st.data(), seed=st.integers(0, 99))
def test_a_row_can_be_decoded_on_its_own(kind: type[Decode], data: st.DataObject, seed: int) -> None:
    op, ins = data.draw(CASES[kind])
    values, scales = bits(seed, ins[0]), bits(seed + 1, ins[1])
    layout = op.rows(ins[0].shape)
    with np.errstate(all="ignore"):
        whole = op.forward([values, scales], ins).reshape(-1, layout.length)
        assert len(whole) == math.prod(layout.axes)
        at = layout.scale_rows(np.arange(len(whole)))
        for row, scale_row in zip(range(len(whole)), scales.reshape(-1, layout.scales)[at], strict=True):
            codes = values.reshape(-1, layout.stored)[row]
            if kind is DequantBlockFp8:
                one = slow_block_fp8(codes, scale_row, (layout.group,))
            else:
                one = slow_mxfp4(codes.reshape(layout.scales, -1), scale_row.view(np.uint8))
            assert same(whole[row], one)


def test_an_op_is_found_by_its_name() -> None:
    assert decode_op("dequant_block_fp8", (2, 3)) == DequantBlockFp8((2, 3))
    assert decode_op("dequant_mxfp4", ()) == DequantMxfp4()


def test_block_fp8_edge_blocks_may_be_incomplete() -> None:
    ins = (
        TensorType((Axis("a", 5), Axis("b", 3)), "float8_e4m3fn"),
        TensorType((Axis("", 3), Axis("", 2)), "float32"),
    )
    values = np.ones((5, 3), ml_dtypes.float8_e4m3fn)
    scales = np.arange(6, dtype=np.float32).reshape(3, 2)
    out = DequantBlockFp8((2, 2)).forward([values, scales], ins)
    assert out.tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3], [2, 2, 3], [4, 4, 5]]


@relaxed
@given(case=CASES[DequantMxfp4], seed=st.integers(0, 99))
def test_mxfp4_is_code_times_the_scale_of_its_group(
    case: tuple[DequantMxfp4, tuple[TensorType, ...]], seed: int
) -> None:
    op, ins = case
    blocks, scales = bits(seed, ins[0]), bits(seed + 1, ins[1])
    with np.errstate(all="ignore"):
        out = op.forward([blocks, scales], ins)
    assert same(out, slow_mxfp4(blocks, scales.view(np.uint8)))


@pytest.mark.parametrize("dtype", ["uint8", "float8_e8m0fnu"])
def test_mxfp4_of_every_byte_under_every_scale(dtype: str) -> None:
    """All codes, all exponents: subnormal results are exact, overflow is infinite, scale 255 is NaN even for zeros."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (256, 1, 1))
    scales = np.tile(np.arange(256, dtype=np.uint8).reshape(256, 1), (1, 16))
    ins = (
        TensorType((Axis("a", 256), Axis("g", 16), Axis("b", 16)), "uint8"),
        TensorType((Axis("a", 256), Axis("g", 16)), dtype),
    )
    with np.errstate(all="ignore"):
        out = DequantMxfp4().forward([blocks, scales.view(getattr(ml_dtypes, dtype, np.uint8))], ins)
        assert same(out, slow_mxfp4(blocks, scales))
    assert np.isnan(out[255]).all()
    assert not np.isnan(out[:255]).any()


def test_mxfp4_reads_the_low_nibble_first() -> None:
    ins = (TensorType((Axis("g", 1), Axis("b", 16)), "uint8"), TensorType((Axis("g", 1),), "uint8"))
    blocks = np.zeros((1, 16), np.uint8)
    blocks[0, 0] = 0x12
    out = DequantMxfp4().forward([blocks, np.full((1,), 127, np.uint8)], ins)
    assert out[:3].tolist() == [1.0, 0.5, 0.0]


def test_mxfp4_gives_the_groups_axis_its_elements() -> None:
    ins = (
        TensorType((Axis("e", 2), Axis("mlp", 3), Axis("b", 16)), "uint8"),
        TensorType((Axis("e", 2), Axis("mlp", 3)), "uint8"),
    )
    assert DequantMxfp4().infer(ins) == TensorType((Axis("e", 2), Axis("mlp", 96)), "float32")


@pytest.mark.parametrize(
    ("decode", "dtype"), [(e4m3, "float8_e4m3fn"), (e5m2, "float8_e5m2"), (e8m0, "float8_e8m0fnu")]
)
def test_the_libraries_decode_bytes_as_published(decode: object, dtype: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    want = np.array([decode(b) for b in range(256)], np.float32)  # type: ignore[operator]
    assert same(every.view(getattr(ml_dtypes, dtype)).astype(np.float32), want)


def test_scales_stay_with_their_rows_of_leading_axes() -> None:
    """A block of the last two axes in a stack of experts: no scale reaches another expert."""
    shape = (3, 4, 4)
    ins = (
        TensorType(tuple(Axis(n, s) for n, s in zip("eab", shape, strict=True)), "float8_e4m3fn"),
        TensorType(tuple(Axis("", s) for s in (3, 2, 2)), "float32"),
    )
    scales = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    out = DequantBlockFp8((2, 2)).forward([np.ones(shape, ml_dtypes.float8_e4m3fn), scales], ins)
    for e, a, b in itertools.product(range(3), range(4), range(4)):
        assert out[e, a, b] == scales[e, a // 2, b // 2]

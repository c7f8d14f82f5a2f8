"""fp8 against the formats as published, computed one element at a time."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.codes.decoding import all_rows, decoded
from tests.ops.codes.published import same_bits
from tests.ops.evaluate import Array, same

from ckptc.ops.codes import Found, check_beside
from ckptc.ops.codes.base import random_bits
from ckptc.ops.codes.fp8 import Fp8
from ckptc.ops.types import OpError

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


def both(code: Fp8, values: Array, scales: Array) -> Array:
    """The weight, by the plain meaning and by the decoder, which agree."""
    with np.errstate(all="ignore"):
        out = code.forward([values, scales], values.shape)
        rows = decoded(code, values.shape, [values, scales], all_rows(code, values.shape))
    assert same(rows.reshape(values.shape), out)
    return out


@relaxed
@given(data=st.data(), seed=st.integers(0, 99))
def test_it_is_value_times_the_scale_of_its_block(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    block = tuple(data.draw(st.lists(st.integers(1, 4), max_size=len(shape))))
    code = Fp8(block)
    values = random_bits(rng, data.draw(st.sampled_from(Fp8.dtypes)), shape)
    scales = random_bits(rng, data.draw(st.sampled_from(("float32", "bfloat16", "float8_e8m0fnu"))), code.grid(shape))
    assert same(both(code, values, scales), slow_block_fp8(values, scales, block))


@pytest.mark.parametrize("dtype", Fp8.dtypes)
def test_every_byte_under_every_power_of_two(dtype: str) -> None:
    values = np.tile(np.arange(256, dtype=np.uint8), (256, 1)).view(getattr(ml_dtypes, dtype))
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).reshape(256, 1)
    assert same(both(Fp8((1, 256)), values, scales), slow_block_fp8(values, scales, (1, 256)))


def test_edge_blocks_may_be_incomplete() -> None:
    values, scales = np.ones((5, 3), ml_dtypes.float8_e4m3fn), np.arange(6, dtype=np.float32).reshape(3, 2)
    out = both(Fp8((2, 2)), values, scales)
    assert out.tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3], [2, 2, 3], [4, 4, 5]]


@pytest.mark.parametrize(
    ("decode", "dtype"), [(e4m3, "float8_e4m3fn"), (e5m2, "float8_e5m2"), (e8m0, "float8_e8m0fnu")]
)
def test_the_libraries_decode_bytes_as_published(decode: object, dtype: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    want = np.array([decode(b) for b in range(256)], np.float32)  # type: ignore[operator]
    assert same(every.view(getattr(ml_dtypes, dtype)).astype(np.float32), want)


def test_scales_stay_with_their_rows_of_leading_axes() -> None:
    """A block of the last two axes in a stack of experts: no scale reaches another expert."""
    scales = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    out = both(Fp8((2, 2)), np.ones((3, 4, 4), ml_dtypes.float8_e4m3fn), scales)
    for e, a, b in itertools.product(range(3), range(4), range(4)):
        assert out[e, a, b] == scales[e, a // 2, b // 2]


def test_one_scale_has_an_axis_or_none() -> None:
    values = np.ones((4, 6), ml_dtypes.float8_e4m3fn)
    for scales in (np.float32(3).reshape(()), np.full(1, 3, np.float32)):
        code = Fp8((4, 6))
        assert (code.forward([values, scales], (4, 6)) == 3).all()


def test_a_block_has_no_more_axes_than_the_weight() -> None:
    with pytest.raises(OpError, match=r"a block \[2, 2\] does not fit a tensor \[5\]"):
        Fp8((2, 2)).stored((5,))


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("ct_fp8_dynamic", Fp8((1, 128))),
        ("fp8_block_qwen3", Fp8((128, 128))),
        ("fp8_block_deepseek3", Fp8((128, 128))),  # the last block of rows is incomplete
    ],
)
def test_published_uploads_decode_bit_for_bit(case: str, code: Fp8) -> None:
    assert same_bits(case) == code


@pytest.mark.parametrize(
    ("config", "weight", "scales", "code"),
    [
        ({}, (256, 384), (2, 3), Fp8((128, 128))),
        ({"weight_block_size": [64, 32]}, (128, 96), (2, 3), Fp8((64, 32))),
        ({}, (256, 384), (256, 1), Fp8((1, 384))),
        ({}, (256, 384), (256,), Fp8((1, 384), True)),
        ({}, (256, 384), (), Fp8((256, 384))),
        ({}, (256, 384), (1,), Fp8((256, 384))),
        ({}, (100, 90), (1, 1), Fp8((100, 90))),
        ({}, (4, 256, 384), (4, 2, 3), Fp8((128, 128))),
    ],
)
def test_the_headers_say_what_a_scale_is_of(
    config: dict[str, object], weight: tuple[int, ...], scales: tuple[int, ...], code: Fp8
) -> None:
    found = {"": Found("float8_e4m3fn", weight), "scales": Found("float32", scales)}
    assert Fp8.read(config, "m", found) == code
    check_beside(code, weight, [found["scales"]])

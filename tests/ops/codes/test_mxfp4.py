"""mxfp4 against the format as published, computed one element at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.ops.codes.decoding import all_rows, decoded
from tests.ops.codes.published import same_bits
from tests.ops.evaluate import Array, same

from ckptc.ops.codes.mxfp4 import Mxfp4
from ckptc.ops.types import OpError

# OCP MX 1.0, 5.3.3: the values of e2m1 with sign bit 0, written out.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e8m0(byte: int) -> float:
    """OCP MX 1.0, 5.4.1: 2^(e - 127), and 255 is NaN."""
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def slow_mxfp4(blocks: Array, scales: Array) -> Array:
    """[.., groups, 16] bytes: two codes each, the low four bits first, each times the scale of its group of 32."""
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


def test_every_byte_under_every_scale() -> None:
    """All codes, all exponents: subnormal results are exact, overflow is infinite, scale 255 is NaN even for zeros."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (256, 1, 1))
    scales = np.tile(np.arange(256, dtype=np.uint8).reshape(256, 1), (1, 16))
    code, shape = Mxfp4(), (256, 512)
    arrays = [blocks.reshape(256, 256), scales]
    with np.errstate(all="ignore"):
        out, slow = code.forward(arrays, shape), slow_mxfp4(blocks, scales)
        assert same(out, slow)
        assert same(decoded(code, shape, arrays, all_rows(code, shape)), slow)
    assert np.isnan(out[255]).all()
    assert not np.isnan(out[:255]).any()
    assert float(out[0, 2]) == 0.5 * 2.0**-127


def test_groups_of_gpt_oss_are_the_matrices_turned() -> None:
    """Blocks [experts, out, groups, 16]; the weight is [experts, in, out]."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 2, 16), np.uint8)
    scales = rng.integers(120, 134, (2, 3, 2), np.uint8)
    out = Mxfp4(True).forward([blocks, scales], (2, 64, 3))
    assert same(out, np.ascontiguousarray(slow_mxfp4(blocks, scales).transpose(0, 2, 1)))


def test_the_low_nibble_is_first() -> None:
    codes = np.zeros((1, 16), np.uint8)
    codes[0, 0] = 0x12
    assert Mxfp4().forward([codes, np.full((1, 1), 127, np.uint8)], (1, 32))[0, :3].tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(("code", "shape"), [(Mxfp4(), (3, 48)), (Mxfp4(True), (48, 32)), (Mxfp4(), (32,))])
def test_rows_are_whole_groups_of_a_matrix(code: Mxfp4, shape: tuple[int, ...]) -> None:
    with pytest.raises(OpError, match=r"whole groups of 32|is of matrices"):
        code.stored(shape)


def test_a_published_upload_decodes_bit_for_bit() -> None:
    assert same_bits("ct_mxfp4") == Mxfp4()

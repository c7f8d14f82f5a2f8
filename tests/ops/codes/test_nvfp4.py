"""nvfp4: the scale of all is a divisor or a factor, and is combined with a group's in float32 first."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tests.ops.codes.published import both, same_bits

from ckptc.ops.codes.nvfp4 import Nvfp4
from ckptc.ops.types import OpError


def test_an_upload_of_compressed_tensors_decodes_bit_for_bit() -> None:
    assert same_bits("ct_nvfp4") == Nvfp4(True)


def test_an_upload_of_modelopt_decodes_to_the_same_numbers() -> None:
    """modelopt makes +0 of code 8, which is -0: zeros have other signs, and nothing else differs."""
    code, out, expected = both("modelopt_nvfp4")
    assert code == Nvfp4(False)
    assert np.array_equal(out.astype(expected.dtype), expected)
    assert (out == 0)[np.signbit(out) != np.signbit(expected.astype(np.float32))].all()


@pytest.mark.parametrize(("divides", "value"), [(True, 6 * (3.5 / 7)), (False, 6 * (3.5 * 7))])
def test_a_number_by_hand(divides: bool, value: float) -> None:
    codes = np.full((1, 8), 0x07, np.uint8)  # 6 and 0
    scales = np.full((1, 1), 3.5, ml_dtypes.float8_e4m3fn)
    out = Nvfp4(divides).forward([codes, scales, np.full(1, 7, np.float32)], (1, 16))
    assert out[0, :2].tolist() == [value, 0]


def test_rows_are_whole_groups() -> None:
    with pytest.raises(OpError, match="whole groups of 16"):
        Nvfp4(True).stored((4, 24))

"""awq: as AutoAWQ packs, and what of it is refused."""

from __future__ import annotations

import numpy as np
import pytest
from tests.ops.codes.published import same_bits

from ckptc.ops.codes import Found, RefusedError
from ckptc.ops.codes.awq import Awq
from ckptc.ops.types import OpError

FOUND = {"": Found("int32", (64, 4)), "scales": Found("float16", (2, 32)), "zero points": Found("int32", (2, 4))}
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def test_a_published_upload_decodes_bit_for_bit() -> None:
    """In float16, as the library multiplies."""
    assert same_bits("awq_gemm_g128") == Awq(128, "float16")


def test_fields_are_columns_in_the_order_of_the_format() -> None:
    word = sum(j << 4 * j for j in range(8))  # field j holds j
    codes = np.full((1, 1), word, np.uint32).view(np.int32)
    out = Awq(1, "float32").forward([codes, np.ones((1, 8), np.float32), np.zeros((1, 1), np.int32)], (8, 1))
    assert [int(out[column, 0]) for column in (0, 2, 4, 6, 1, 3, 5, 7)] == list(range(8))


@pytest.mark.parametrize(
    ("key", "value"), [("version", "gemv"), ("version", "marlin"), ("bits", 8), ("bits", 3), ("zero_point", False)]
)
def test_what_is_not_sure_is_refused_by_its_key(key: str, value: object) -> None:
    assert Awq.read(CONFIG, "m", FOUND) == Awq(32, "float16")
    with pytest.raises(RefusedError, match=f"`{key}`"):
        Awq.read({**CONFIG, key: value}, "m", FOUND)


def test_tensors_of_these_names_may_be_of_another_format() -> None:
    assert Awq.read({**CONFIG, "quant_method": "gptq"}, "m", FOUND) is None


def test_columns_are_whole_words() -> None:
    with pytest.raises(OpError, match="whole words of 8"):
        Awq(32, "float16").stored((12, 64))

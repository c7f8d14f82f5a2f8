"""gptq: words along the inputs, an index of groups, zero points one less in version 1."""

from __future__ import annotations

import numpy as np
import pytest
from tests.ops.codes.published import same_bits

from ckptc.ops.codes import Found, RefusedError
from ckptc.ops.codes.gptq import Gptq
from ckptc.ops.types import OpError

FOUND = {
    "": Found("int32", (8, 32)), "scales": Found("float16", (2, 32)), "zero points": Found("int32", (2, 4)),
    "index": Found("int32", (64,)),
}  # fmt: skip
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize("case", ["gptq_g128", "gptq_g128_asym"])
def test_published_uploads_decode_bit_for_bit(case: str) -> None:
    """In float16, as the library multiplies. Of the second, a zero point of 0 borrowed from its neighbour."""
    assert same_bits(case) == Gptq(4, 128, "float16")


def arrays(index: list[int], zeros: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    codes = np.full((1, 8), sum(j << 4 * j for j in range(8)), np.uint32).view(np.int32)  # input j has code j
    scales = np.array([[1.0] * 8, [10.0] * 8], np.float32)
    words = np.full((2, 1), zeros, np.uint32).view(np.int32)
    return [codes, scales, words, np.array(index, np.int32)]


def test_the_index_says_the_group_of_each_input() -> None:
    out = Gptq(4, 4, "float32", True, False).forward(arrays([0, 1, 0, 1, 1, 1, 0, 0], 0), (8, 8))
    assert out[0].tolist() == [0, 10, 2, 30, 40, 50, 6, 7]


def test_zero_points_of_version_1_are_one_less_as_whole_words() -> None:
    """True zeros 0 0 0 7 …, stored as 15 15 15 6: each borrowed from the next."""
    stored = (0x77777000 - 0x11111111) & 0xFFFFFFFF
    one, two = (Gptq(4, 4, "float32", True, less) for less in (True, False))
    found = one.forward(arrays([0] * 8, stored), (8, 8))
    assert np.array_equal(found, two.forward(arrays([0] * 8, 0x77777000), (8, 8)))
    assert [int(-x) for x in found[:, 0]] == [0, 0, 0, 7, 7, 7, 7, 7]


@pytest.mark.parametrize(
    ("change", "key"),
    [({"bits": b}, "bits") for b in (3, 5, 6, 7, None)]
    + [({"checkpoint_format": "marlin"}, "checkpoint_format"), ({"pack_dtype": "int16"}, "pack_dtype")],
)
def test_what_is_not_sure_is_refused_by_its_key(change: dict[str, object], key: str) -> None:
    assert Gptq.read(CONFIG, "m", FOUND) == Gptq(4, 32, "float16")
    with pytest.raises(RefusedError, match=f"`{key}`"):
        Gptq.read({**CONFIG, **change}, "m", FOUND)


def test_version_2_and_other_codes() -> None:
    assert Gptq.read({**CONFIG, "checkpoint_format": "gptq_v2"}, "m", FOUND) == Gptq(4, 32, "float16", True, False)
    eight = {**FOUND, "": Found("int32", (16, 32)), "zero points": Found("int32", (2, 8))}
    assert Gptq.read({**CONFIG, "bits": 8}, "m", eight) == Gptq(8, 32, "float16")
    assert Gptq.read(CONFIG, "m", eight) == Gptq(8, 32, "float16"), "a module may have other bits than most"
    plain = {k: v for k, v in FOUND.items() if k != "index"}
    assert Gptq.read(CONFIG, "m", plain) == Gptq(4, 32, "float16", False)
    assert Gptq.read({**CONFIG, "quant_method": "awq"}, "m", FOUND) is None


def test_matrices_are_whole_words() -> None:
    with pytest.raises(OpError, match="whole words"):
        Gptq(4, 32, "float16").stored((32, 60))
    with pytest.raises(OpError, match="does not end with a word"):
        Gptq(4, 12, "float16", False).stored((32, 64))

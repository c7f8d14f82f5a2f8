"""nf4: sixteen numbers from a table, scales for blocks of elements, perhaps quantised in turn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.ops.codes.published import same_bits

from ckptc.ops.codes import Found, RefusedError
from ckptc.ops.codes.nf4 import Nf4
from ckptc.ops.types import OpError


def test_a_published_upload_decodes_bit_for_bit() -> None:
    assert same_bits("bnb_nf4_nested") == Nf4(64, 256)


def test_the_high_nibble_is_first() -> None:
    arrays = Nf4(64, 1).random((2, 64), np.random.default_rng(0))
    arrays[0][0, 0], arrays[1], arrays[2] = 0x3A, np.full(2, 2, np.float32), np.arange(16, dtype=np.float32)
    assert Nf4(64, 1).forward(arrays, (2, 64))[0, :2].tolist() == [2 * 3, 2 * 10]


@pytest.mark.parametrize(
    "state",
    [
        b"no JSON",
        b"[]",
        json.dumps({"shape": [64, 2], "blocksize": 64}).encode(),
        json.dumps({"shape": [2, 64], "blocksize": 128}).encode(),
        json.dumps({"shape": [2, 64], "blocksize": 64, "nested_blocksize": 256}).encode(),
    ],
)
def test_a_state_that_says_another_weight_is_refused(state: bytes) -> None:
    code = Nf4(64, 1)
    arrays = code.random((2, 64), np.random.default_rng(0))
    rows = [a.reshape(1, -1) for a in arrays[1:]]
    code.factors((2, 64), np.arange(1), rows)
    with pytest.raises(OpError, match="state of an nf4 weight"):
        code.factors((2, 64), np.arange(1), [*rows[:-1], np.frombuffer(state, np.uint8)[None]])


def test_the_headers_say_the_size_of_blocks() -> None:
    found = {"": Found("uint8", (1024, 1)), "absmax": Found("float32", (16,))}
    assert Nf4.read({}, "m", found) == Nf4(128, 1)
    nested = {**found, "absmax": Found("uint8", (32,)), "nested absmax": Found("float32", (1,))}
    assert Nf4.read({}, "m", nested) == Nf4(64, 256)
    with pytest.raises(OpError, match="no blocks"):
        Nf4.read({}, "m", {**found, "absmax": Found("float32", (17,))})


def test_codes_in_another_storage_are_refused_by_its_key() -> None:
    found = {"": Found("uint8", (1024, 1)), "absmax": Found("float32", (16,))}
    with pytest.raises(RefusedError, match="`bnb_4bit_quant_storage`"):
        Nf4.read({"bnb_4bit_quant_storage": "bfloat16"}, "m", found)

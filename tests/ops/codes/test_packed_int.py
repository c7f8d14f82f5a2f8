"""packed_int: fields of words along a row, zero points in words along a column."""

from __future__ import annotations

import numpy as np
import pytest
from tests.ops.codes.published import same_bits

from ckptc.ops.codes import Found, RefusedError
from ckptc.ops.codes.packed_int import PackedInt
from ckptc.ops.types import OpError


@pytest.mark.parametrize(
    ("case", "code"),
    [("ct_int4_g32_kimi", PackedInt(4, 32)), ("ct_int4_g128_asym", PackedInt(4, 128, True))],
)
def test_published_uploads_decode_bit_for_bit(case: str, code: PackedInt) -> None:
    assert same_bits(case) == code


def test_a_number_by_hand() -> None:
    """Row 9, column 2, of the second word of zero points: (13 - 8 - (11 - 8)) · 0.5."""
    codes = np.zeros((10, 1), np.int32)
    codes[9, 0] = 13 << 8
    zeros = np.zeros((2, 1), np.int32)
    zeros[1, 0] = 11 << 4
    out = PackedInt(4, 8, True).forward([codes, np.full((10, 1), 0.5, np.float32), zeros], (10, 8))
    assert out[9, 2] == (13 - 11) * 0.5
    assert out[9, 3] == (0 - 11) * 0.5 and out[8, 2] == 0


def test_columns_may_be_of_any_group() -> None:
    index = np.array([1, 0, 0, 1, 1, 0, 0, 1], np.int32)
    scales = np.array([[2.0, 3.0]], np.float32)
    out = PackedInt(4, 4, False, True).forward([np.full((1, 1), 0x7FFFFFFF, np.int32), scales, index], (1, 8))
    assert out[0, :7].tolist() == [7 * s for s in (3, 2, 2, 3, 3, 2, 2)]


def config(**weights: object) -> dict[str, object]:
    scheme = {"num_bits": 4, "type": "int", "group_size": 32, **weights}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}}


FOUND = {"": Found("int32", (8, 8)), "scales": Found("bfloat16", (8, 2))}


@pytest.mark.parametrize(
    ("weights", "key"),
    [({"num_bits": bits}, "num_bits") for bits in (3, 5, 6, 7, None)]
    + [({"type": "float"}, "type"), ({"group_size": None}, "group_size"), ({"group_size": True}, "group_size")],
)
def test_what_is_not_sure_is_refused_by_its_key(weights: dict[str, object], key: str) -> None:
    assert PackedInt.read(config(), "m", FOUND) == PackedInt(4, 32)
    with pytest.raises(RefusedError, match=f"`{key}`"):
        PackedInt.read(config(**weights), "m", FOUND)


def test_a_module_is_of_the_group_that_names_it() -> None:
    two = config()
    groups = two["config_groups"]
    assert isinstance(groups, dict)
    groups["group_1"] = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8, "type": "int", "group_size": 16}}
    assert PackedInt.read(two, "model.layers.0.mlp.down_proj", FOUND) == PackedInt(8, 16)
    assert PackedInt.read(two, "model.layers.0.mlp.up_proj", FOUND) == PackedInt(4, 32)


def test_rows_end_with_a_byte() -> None:
    assert PackedInt(4, 32).stored((3, 34)) == (3, 5)
    with pytest.raises(OpError, match="do not end with a byte"):
        PackedInt(4, 32).stored((3, 33))

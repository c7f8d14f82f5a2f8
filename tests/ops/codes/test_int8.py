"""int8: a byte a code."""

from __future__ import annotations

import numpy as np
import pytest

from ckptc.ops.codes import Found
from ckptc.ops.codes.int8 import Int8


def test_numbers_by_hand() -> None:
    codes = np.array([[-128, 127, 3, 4]], np.int8)
    out = Int8(2, True).forward([codes, np.array([[2, 0.5]], np.float32), np.array([[1, -4]], np.int8)], (1, 4))
    assert out.tolist() == [[-258.0, 252.0, 3.5, 4.0]]


@pytest.mark.parametrize(
    ("scales", "code"),
    [((6, 1), Int8(8)), ((6, 2), Int8(4)), ((1,), Int8(8, False, True)), ((6,), None)],
)
def test_the_headers_say_what_a_scale_is_of(scales: tuple[int, ...], code: Int8 | None) -> None:
    found = {"": Found("int8", (6, 8)), "scales": Found("bfloat16", scales)}
    assert Int8.read({}, "m", found) == code

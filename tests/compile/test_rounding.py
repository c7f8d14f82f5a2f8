"""Exactness: what the plan promises of numbers is true of all numbers there are, and says no less than it could."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ckptc.compile.rounding import EXACT, Math, exactness, invert_math
from ckptc.plan.model import Exactness
from ckptc.run.kernel import Conversion, Kernel, Loop

SCALE = (("scale", float(np.float32(2304**0.5))), ("cast", "bfloat16"))
POWER = (("scale", 0.0625), ("cast", "bfloat16"))
SHORT = (("scale", 48.0), ("cast", "bfloat16"))
NORM = (("add", 1.0), ("cast", "float32"))
MOVED: Math = ()


def numbers(dtype: str) -> Any:
    """Every number of a 16-bit dtype, or very many of float32, with magnitudes that weights have."""
    if dtype == "float32":
        values = (np.random.default_rng(1).standard_normal(1 << 18) * np.exp2(np.arange(1 << 18) % 40 - 30)).astype(
            np.float32
        )
    else:
        values = np.arange(1 << 16, dtype=np.uint16).view(getattr(ml_dtypes, dtype, dtype))
    with np.errstate(invalid="ignore"):
        wide = np.abs(values.astype(np.float64))
    return values[np.isfinite(wide) & (wide < 6e4 / 2304) & ((wide > 2.0**-90) | (wide == 0))]


def through(values: Any, forward: Math, stored: str) -> Any:
    """Converted with `forward`, ending in `stored`, and exported, by the executor's own kernel."""
    steps = tuple(s for s in forward if s[0] != "cast")
    there = convert(values, Conversion(values.dtype.name, stored, (*steps, ("cast", stored))))
    return convert(there, Conversion(stored, values.dtype.name, invert_math(forward, values.dtype.name)))


def convert(values: Any, conversion: Conversion) -> Any:
    out = np.empty(values.shape, getattr(ml_dtypes, conversion.target, conversion.target))
    Kernel().copy(values, 0, out, 0, [Loop(values.size, 1, 1)], conversion)
    return out


@pytest.mark.parametrize("original", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "forward", [MOVED, POWER, SHORT, SCALE, NORM], ids=["moved", "power", "short", "scale", "norm"]
)
def test_the_promise_is_kept_by_every_number(original: str, stored: str, forward: Math) -> None:
    promise = exactness(forward, stored, original)
    values = numbers(original)
    if stored.startswith("float8"):  # whose range ends early
        values = values[np.abs(values.astype(np.float64)) < 4]
    found = through(values, forward, stored).astype(np.float64)
    w = values.astype(np.float64)
    apart = np.abs(found - w)
    if stored == "float8_e4m3fn":
        apart, w = apart[np.isfinite(found)], w[np.isfinite(found)]
    if promise == EXACT:
        assert not apart.any()
        return
    bound = promise.relative * np.abs(w) + promise.absolute
    assert (apart <= bound).all(), (promise, float((apart - bound).max()), float(w[np.argmax(apart - bound)]))
    if promise.above is not None:
        assert not apart[np.abs(w) > promise.above].any()


@pytest.mark.parametrize(
    ("forward", "stored", "original", "exact"),
    [
        (MOVED, "bfloat16", "bfloat16", True),
        (MOVED, "float16", "float16", True),
        (MOVED, "float32", "bfloat16", True),
        (MOVED, "bfloat16", "float32", False),
        (MOVED, "float16", "bfloat16", False),
        (POWER, "bfloat16", "bfloat16", True),
        (SHORT, "float32", "bfloat16", True),
        (SHORT, "bfloat16", "bfloat16", False),
        (SCALE, "float32", "bfloat16", True),
        (SCALE, "bfloat16", "bfloat16", False),
        (NORM, "float32", "bfloat16", False),
    ],
)
def test_exactness_is_recognised_not_assumed(forward: Math, stored: str, original: str, exact: bool) -> None:
    assert (exactness(forward, stored, original) == EXACT) is exact


def test_a_norm_in_float32_is_exact_above_a_magnitude() -> None:
    promise = exactness(NORM, "float32", "bfloat16")
    assert promise.above == pytest.approx(2.0**-15, rel=0.01)
    assert promise.absolute == pytest.approx(2.0**-24, rel=0.02)


def test_whole_numbers_are_exact_unless_stored_as_floats() -> None:
    assert exactness((), "int32", "int64") == EXACT
    assert exactness((), "bfloat16", "int64") == Exactness(None, 2.0**-8, 0.0)


def test_a_factor_is_taken_back_by_a_division() -> None:
    """Times the inverse would round twice."""
    values = np.random.default_rng(2).standard_normal(10_000).astype(np.float32)
    found = convert(values, Conversion("float32", "float32", (("unscale", 7.2),)))
    assert found.tobytes() == (values / np.float32(7.2)).tobytes()
    assert found.tobytes() != (values * np.float32(1 / np.float32(7.2))).tobytes()


def test_steps_are_taken_back_in_reverse() -> None:
    forward = (("scale", 3.0), ("add", 1.0), ("cast", "float32"))
    assert invert_math(forward, "bfloat16") == (("add", -1.0), ("unscale", 3.0), ("cast", "bfloat16"))
    assert invert_math((), "int64") == ()

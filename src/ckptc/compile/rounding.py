"""How near an exported tensor is to the one that was converted: exact, exact above a magnitude, or within a bound.

A conversion computes in float32 and rounds to what is stored; an export takes the steps back in reverse and rounds to
the tensor's own dtype. Followed for an element w of that dtype, with u = 2^-precision the most that a rounding moves a
number, relative to it:

- before it rounds at the end, the export has w·(1 + r) + s; each step adds to r and s;
- where nothing was rounded on the way, r = s = 0: moved elements, wide enough stored dtypes, factors that are powers of
  two, or that have so few digits that the product has no more than float32 holds;
- rounding gives w again where the error is below half the distance to w's neighbours, at least u/2·|w|. So the export
  is exact where |w| > s / (u/2 - r), everywhere if s = 0 and r < u/2, and nowhere if r >= u/2;
- elsewhere the difference is at most (r + u·(1 + r))·|w| + s·(1 + u), and half the original's smallest number.

Numbers beyond the range of the stored dtype are not spoken of, nor are magnitudes below NEGLIGIBLE, where floats lose
digits one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from ckptc.ops.types import is_float, numpy_dtype
from ckptc.plan.model import Exactness

Math = tuple[tuple[str, float | str], ...]

EXACT = Exactness()
NEGLIGIBLE = 2.0**-100  # thresholds below it are none: no weight is so small
SMALL = -100  # exponent: a dtype whose normal numbers go on below it holds any weight's magnitude


@dataclass(frozen=True, slots=True)
class _Format:
    """A floating dtype: digits of its significand, the lowest exponent of a normal number, half its smallest number."""

    precision: int
    lowest: int
    tiny: float

    @property
    def unit(self) -> float:
        return 2.0**-self.precision


def _format(dtype: str) -> _Format:
    info: Any = ml_dtypes.finfo(numpy_dtype(dtype))  # type: ignore[no-untyped-call]
    return _Format(int(info.nmant) + 1, int(info.minexp), float(np.float64(info.smallest_subnormal)) / 2)


@lru_cache(maxsize=1024)
def invert_math(math_: Math, dtype: str) -> Math:
    """The steps back, in reverse: a factor becomes a division, a term is taken away, casts only lose digits. `dtype`:
    what is made.
    """
    if not is_float(dtype):
        return ()
    back: list[tuple[str, float | str]] = []
    for step, operand in reversed(math_):
        if step == "scale":
            # A division by the same float32: multiplying by its inverse would round twice.
            back.append(("unscale", operand))
        elif step == "add":
            back.append(("add", -float(operand)))
    return (*back, ("cast", dtype))


@lru_cache(maxsize=1024)
def exactness(forward: Math, stored: str, original: str) -> Exactness:
    """Of elements that were `original`, went through `forward` except for its last cast, are `stored` now, and become
    `original` again.
    """
    if not is_float(original):
        # Whole numbers: nothing is computed with them, and a dtype either holds them or was the wrong one to store
        # them in.
        return Exactness(None, _format(stored).unit, 0.0) if is_float(stored) else EXACT
    if not is_float(stored):
        return Exactness(None, 1.0, 1.0)
    steps = forward[:-1] if forward and forward[-1][0] == "cast" else forward
    track = _Track(_format(original))
    for step, operand in (*steps, ("cast", stored)):
        track.take(step, operand)
    for step, operand in reversed(steps):
        track.back(step, operand)
    return track.result()


_ANY = 1 << 10  # digits of a number of which nothing is known


class _Track:
    """The value a·w + b with an error of at most r·|w| + s, and how many digits it has."""

    def __init__(self, original: _Format) -> None:
        self.original, self.float32 = original, _format("float32")
        self.a, self.b, self.r, self.s = 1.0, 0.0, 0.0, 0.0
        self.digits = original.precision
        self.rounded = False

    def take(self, step: str, operand: float | str) -> None:
        """A step of the conversion."""
        if step == "cast":
            self._round(_format(str(operand)))
            return
        value = float(operand)
        if step == "add":
            self.b += value
            self.digits = _ANY if value else self.digits
        else:
            self._times(value)
            self.digits += _digits(value)
        self._round(self.float32)

    def back(self, step: str, operand: float | str) -> None:
        """The same step undone."""
        if step == "cast":
            return
        value = float(operand)
        if step == "add":
            self.b -= value
            self.digits = _ANY if value else self.digits
        else:
            self._times(1 / value)
            self.digits = _ANY if _digits(value) else self.digits  # a quotient goes on for ever
        self._round(self.float32)

    def _times(self, value: float) -> None:
        self.a, self.b, self.r, self.s = self.a * value, self.b * value, self.r * abs(value), self.s * abs(value)

    def _round(self, to: _Format) -> None:
        """To a dtype: nothing happens to a number that it holds."""
        if self.digits > to.precision:
            self.rounded, self.digits = True, to.precision
            self.r, self.s = self.r + to.unit * (abs(self.a) + self.r), self.s + to.unit * (abs(self.b) + self.s)
        moved = (self.a, self.b) == (1.0, 0.0) and not self.rounded
        if to.lowest > (self.original.lowest if moved else min(self.original.lowest, SMALL)):
            self.s += to.tiny

    def result(self) -> Exactness:
        half, u = self.original.unit / 2, self.original.unit
        above = self.s / (half - self.r) if self.r < half else None
        if above is not None and above < NEGLIGIBLE:
            return EXACT
        relative = self.r + u * (1 + self.r)
        absolute = self.s * (1 + u) + self.original.tiny
        return Exactness(
            None if above is None else _up(above), _up(relative), _up(absolute if absolute > NEGLIGIBLE else 0.0)
        )


def worst(found: Iterable[Exactness]) -> Exactness:
    """The exactness of elements of which some are as near as each of these."""
    all_ = list(found)
    above = None if any(x.above is None for x in all_) else max((x.above or 0.0 for x in all_), default=0.0)
    return Exactness(above, max((x.relative for x in all_), default=0.0), max((x.absolute for x in all_), default=0.0))


def _up(value: float) -> float:
    """A bound in three digits, not below what it was."""
    if value == 0 or math.isinf(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / unit) * unit:.3g}")


def _digits(value: float) -> int:
    """Digits that a float32 factor adds to those of a number: none for a power of two."""
    numerator, _ = abs(float(np.float32(value))).as_integer_ratio()
    return (numerator // (numerator & -numerator)).bit_length() if numerator & (numerator - 1) else 0

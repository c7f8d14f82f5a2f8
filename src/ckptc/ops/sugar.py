"""The words for common rearrangements: each is `rearrange`, or `rearrange` and `slice`, under the name users know."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ckptc.ops.base import Op, Sugar
from ckptc.ops.rearrange import Rearrange, SizedGroup
from ckptc.ops.rename import Rename
from ckptc.ops.slicing import Slice
from ckptc.ops.types import Axis, OpError, TensorType


def _alone(input: TensorType) -> tuple[SizedGroup, ...]:
    return tuple(() if axis.size == 1 and not axis.name else (axis,) for axis in input.axes)


def _split_at(input: TensorType, position: int, into: tuple[Axis, ...]) -> Rearrange:
    axis = input.axes[position]
    if prod(a.size for a in into) != axis.size:
        sizes = " x ".join(str(a) for a in into)
        raise OpError(f"{sizes} is {prod(a.size for a in into)}, the axis is {axis}")
    groups = _alone(input)
    left = (*groups[:position], into, *groups[position + 1 :])
    right = (*groups[:position], *((a,) for a in into), *groups[position + 1 :])
    return Rearrange(left, right)


@dataclass(frozen=True, slots=True)
class Transpose(Sugar):
    """The axes in a new order. Exact."""

    order: tuple[str, ...]
    name = "transpose"

    def expand(self, input: TensorType) -> tuple[Op, ...]:
        if len(self.order) != len(input.axes):
            raise OpError(f"`transpose` names {len(self.order)} axes, the input has {len(input.axes)}: {input.names()}")
        return (Rearrange(_alone(input), tuple((input.axes[input.find(n)],) for n in self.order)),)

    def describe(self) -> str:
        return f"transpose {' '.join(self.order)}"


@dataclass(frozen=True, slots=True)
class ReshapeHeads(Sugar):
    """A fused axis as heads and what is in a head: [rows] -> [heads, head_dim]. Exact."""

    axis: str
    into: tuple[Axis, ...]
    name = "reshape_heads"

    def expand(self, input: TensorType) -> tuple[Op, ...]:
        return (_split_at(input, input.find(self.axis), self.into),)

    def describe(self) -> str:
        return f"reshape_heads {self.axis} -> {' '.join(str(a) for a in self.into)}"


@dataclass(frozen=True, slots=True)
class SplitLast(Sugar):
    """The last axis as several: [..., n] -> [..., a, b] with n = a·b. Exact."""

    into: tuple[Axis, ...]
    name = "split_last"

    def expand(self, input: TensorType) -> tuple[Op, ...]:
        if not input.axes:
            raise OpError("`split_last` needs an axis, the input is a scalar")
        return (_split_at(input, len(input.axes) - 1, self.into),)

    def describe(self) -> str:
        return f"split_last {' '.join(str(a) for a in self.into)}"


@dataclass(frozen=True, slots=True)
class Split(Sugar):
    """One of `parts` equal parts of an axis, which keeps its name: [parts·n] -> [n]. The other parts are other rules' business."""

    axis: str
    parts: int
    take: int
    name = "split"

    def expand(self, input: TensorType) -> tuple[Op, ...]:
        size = input.axes[input.find(self.axis)].size
        if self.parts < 1 or size % self.parts:
            raise OpError(f"`{self.axis}` is {size}, which {self.parts} equal parts do not divide")
        if not 0 <= self.take < self.parts:
            raise OpError(f"there is no part {self.take} of {self.parts}; parts count from 0")
        n = size // self.parts
        return (Slice(((self.axis, self.take * n, (self.take + 1) * n),)),)

    def describe(self) -> str:
        return f"split {self.axis} part {self.take} of {self.parts}"


@dataclass(frozen=True, slots=True)
class Interleave(Sugar):
    """Equal parts that lie side by side become alternating elements: a0 a1 b0 b1 -> a0 b0 a1 b1. Exact."""

    axis: str
    parts: int
    name = "interleave"

    def expand(self, input: TensorType) -> tuple[Op, ...]:
        position = input.find(self.axis)
        size = input.axes[position].size
        if self.parts < 1 or size % self.parts:
            raise OpError(f"`{self.axis}` is {size}, which {self.parts} equal parts do not divide")
        # Names with a character no mapping can use, so that they meet no axis of the input.
        part, element = Axis(f"{self.axis}.part", self.parts), Axis(f"{self.axis}.element", size // self.parts)
        groups = _alone(input)
        left = (*groups[:position], (part, element), *groups[position + 1 :])
        right = (*groups[:position], (element, part), *groups[position + 1 :])
        return (Rearrange(left, right), Rename(position, self.axis))

    def describe(self) -> str:
        return f"interleave {self.axis} by {self.parts}"


@dataclass(frozen=True, slots=True)
class PermuteRope(Sugar):
    """Rotary halves side by side become adjacent pairs: x0…xh y0…yh -> x0 y0 x1 y1 …, along one axis of even size. Exact.

    Checkpoints on the Hub rotate element i with i + head_dim/2; MaxText's Llama rotary embedding rotates neighbours.
    """

    axis: str
    name = "permute_rope"

    def expand(self, input: TensorType) -> tuple[Op, ...]:
        return Interleave(self.axis, 2).expand(input)

    def describe(self) -> str:
        return f"permute_rope {self.axis}"

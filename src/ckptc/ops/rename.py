"""`rename`: an axis under another name; nothing moves. Only other ops use it, to give an axis its name back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptc.ops.base import Array, Op, Parts, one
from ckptc.ops.types import Axis, TensorType, replace_axis


@dataclass(frozen=True, slots=True)
class Rename(Op):
    """The axis at `position` called `to`. Shape and dtype stay. Exact."""

    position: int
    to: str
    name = "rename"

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        input = one(inputs, self.name)
        return replace_axis(input, self.position, Axis(self.to, input.axes[self.position].size))

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        return arrays[0]

    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        return parts[0]

    def describe(self) -> str:
        return f"rename axis {self.position} to {self.to}"

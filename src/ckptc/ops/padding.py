"""`pad` and `resize`: an axis at another size, with zeros at its end, or cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckptc.ops.base import Array, Op, Parts, Sugar, one
from ckptc.ops.nest import AxisMap, Factor, Part, whole
from ckptc.ops.slicing import Slice
from ckptc.ops.types import Axis, OpError, TensorType, replace_axis


@dataclass(frozen=True, slots=True)
class Pad(Op):
    """The axis at a new size, zeros where there was nothing. Shape rule: `size` is at least the old one. The dtype stays. Exact."""

    axis: str
    size: int
    name = "pad"

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        input = one(inputs, self.name)
        position = input.find(self.axis)
        if self.size < input.axes[position].size:
            raise OpError(f"`pad` lengthens: axis {input.axes[position]} is longer than {self.size} already")
        return replace_axis(input, position, Axis(self.axis, self.size))

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        out = np.zeros(self.infer(inputs).shape, dtype=arrays[0].dtype)
        out[tuple(slice(0, n) for n in arrays[0].shape)] = arrays[0]
        return out

    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        position = inputs[0].find(self.axis)
        old = inputs[0].axes[position].size
        if old == self.size:
            return parts[0]
        added = AxisMap(old, (Factor(self.size - old, 1, 0),) if self.size - old > 1 else ())
        axes = tuple(added if i == position else whole(a.size, 0) for i, a in enumerate(inputs[0].axes))
        return [*parts[0], Part(None, 0, 0, axes)]

    def describe(self) -> str:
        return f"pad {self.axis} to {self.size}"


@dataclass(frozen=True, slots=True)
class Resize(Sugar):
    """`pad` where the axis is shorter than `size`, a slice of its beginning where it is longer. The dtype stays.

    Exact where it pads; where it cuts, what is cut is lost, and the rule says why (`partial`).
    """

    axis: str
    size: int
    name = "resize"

    def expand(self, input: TensorType) -> tuple[Op, ...]:
        if self.size < 1:
            raise OpError(f"`resize` to {self.size} leaves nothing")
        if self.size < input.axes[input.find(self.axis)].size:
            return (Slice(((self.axis, 0, self.size),)),)
        return (Pad(self.axis, self.size),)

    def describe(self) -> str:
        return f"resize {self.axis} to {self.size}"

"""`concat` and `stack`: several arrays as one, along an axis they have or along a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from ckptc.ops.base import Array, Op, Parts
from ckptc.ops.nest import AxisMap
from ckptc.ops.types import Axis, OpError, TensorType, replace_axis


def _alike(inputs: Sequence[TensorType], op: str, skip: int | None = None) -> None:
    if len(inputs) < 2:
        raise OpError(f"`{op}` joins the parts of a list in `from`; there is one")
    first = inputs[0]
    for other in inputs[1:]:
        same = len(first.axes) == len(other.axes) and all(
            i == skip or a == b for i, (a, b) in enumerate(zip(first.axes, other.axes, strict=True))
        )
        if not same or first.dtype != other.dtype:
            raise OpError(f"`{op}` joins arrays of one type, but there are {first} and {other}")


@dataclass(frozen=True, slots=True)
class Concat(Op):
    """One after the other along `axis`. Shape rule: that axis is the sum, all others are equal. One dtype. Exact.

    The parts may call that axis by different names; one of them calls it `axis`, and so does the result.
    """

    axis: str
    name = "concat"
    arity = None

    def _position(self, inputs: Sequence[TensorType]) -> int:
        named = next((t for t in inputs if any(a.name == self.axis for a in t.axes)), inputs[0])
        return named.find(self.axis)

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        position = self._position(inputs)
        _alike(inputs, self.name, position)
        return replace_axis(inputs[0], position, Axis(self.axis, sum(t.axes[position].size for t in inputs)))

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        return np.concatenate(arrays, axis=self._position(inputs))

    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        position, offset, out = self._position(inputs), 0, []
        for type_, own in zip(inputs, parts, strict=True):
            for part in own:
                moved = AxisMap(part.axes[position].start + offset, part.axes[position].factors)
                out.append(replace(part, axes=(*part.axes[:position], moved, *part.axes[position + 1 :])))
            offset += type_.axes[position].size
        return out

    def describe(self) -> str:
        return f"concat {self.axis}"


@dataclass(frozen=True, slots=True)
class Stack(Op):
    """One beside the other along a new leading axis `axis`. Shape rule: its size is the number of inputs. One type. Exact."""

    axis: str
    name = "stack"
    arity = None

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        _alike(inputs, self.name)
        if any(a.name == self.axis for a in inputs[0].axes):
            raise OpError(f"there is an axis `{self.axis}` already: {inputs[0].names()}")
        return inputs[0].with_axes((Axis(self.axis, len(inputs)), *inputs[0].axes))

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        return np.stack(arrays)

    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        return [replace(p, axes=(AxisMap(i, ()), *p.axes)) for i, own in enumerate(parts) for p in own]

    def describe(self) -> str:
        return f"stack {self.axis}"

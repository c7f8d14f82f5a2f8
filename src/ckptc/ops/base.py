"""What an op is: a shape rule, a dtype rule, a forward, and its effect on index nests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import numpy as np

from ckptc.ops.nest import Part
from ckptc.ops.types import OpError, TensorType

Array = np.ndarray[Any, np.dtype[Any]]
Parts = list[Part]


class Op(ABC):
    """One step from arrays to an array. Ops are frozen records; sizes are already numbers.

    `infer` is the shape and dtype rule and raises OpError when the input does not fit. `forward` is the plain meaning, in numpy, on whole
    arrays: what verification and tests trust. `lower` says the same on index nests, which is what the executor runs, and
    what the way back is derived from (`ckptc.compile.invert`).
    """

    name: ClassVar[str]
    arity: ClassVar[int | None] = 1  # number of inputs; None: two or more

    @abstractmethod
    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        """The output's type. Raises OpError."""

    @abstractmethod
    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        """The output, from arrays whose shapes and dtypes are `inputs`."""

    @abstractmethod
    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        """The output's parts, from the inputs' parts."""

    @abstractmethod
    def describe(self) -> str:
        """The op as a mapping would say it, with numbers: `scale 0.0625`."""


class Sugar(Op):
    """An op that says in one word what others say together: everything but its name is theirs."""

    @abstractmethod
    def expand(self, input: TensorType) -> tuple[Op, ...]:
        """The ops it stands for. Raises OpError when the input does not fit."""

    @final
    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        input = one(inputs, self.name)
        return infer_chain(self.expand(input), input)

    @final
    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        array, type_ = arrays[0], inputs[0]
        for op in self.expand(type_):
            array, type_ = op.forward([array], [type_]), op.infer([type_])
        return array

    @final
    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        out, type_ = parts[0], inputs[0]
        for op in self.expand(type_):
            out, type_ = op.lower([out], [type_]), op.infer([type_])
        return out


def infer_chain(ops: Sequence[Op], input: TensorType) -> TensorType:
    """The type after a chain of one-input ops."""
    for op in ops:
        input = op.infer([input])
    return input


def one(inputs: Sequence[TensorType], op: str) -> TensorType:
    """The only input's type. Raises OpError when there are several."""
    if len(inputs) != 1:
        raise OpError(
            f"`{op}` takes one input, `from` has {len(inputs)} parts: join them with `concat` or `stack` first"
        )
    return inputs[0]

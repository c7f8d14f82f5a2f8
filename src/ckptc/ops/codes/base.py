"""What a code is: how a weight is stored as codes and what stands beside them, and how rows of it become numbers again.

A module's weight that is quantised is several tensors: the codes, and tensors beside them (scales, zero points, tables).
To rules it is one tensor of plain numbers, of its logical shape. A code says how the two go together, so that a range of
the weight can be decoded on its own:

- `layout`: the decoded weight as rows. A row's codes lie together in the stored tensor, and each tensor beside it has a
  row for it, which several rows may share;
- `place`: where the rows hold the elements of the logical weight, for formats that store it the other way round;
- `table` and `factors`: what a byte of codes stands for, and by what it is multiplied. `ckptc.run.decode` does the rest;
- `forward`: the same in plain numpy, for a whole tensor: what verification and tests trust;
- `uploads` and `read`: what the tensors are called in published checkpoints, and which code `quantization_config` means.

Decoding is not undone: a checkpoint goes back to the Hub with plain numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ckptc.ops.nest import AxisMap, whole
from ckptc.ops.types import OpError, numpy_dtype

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Setting = int | bool | str | tuple[int, ...]
FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Beside:
    """A tensor that decoding needs beside the codes."""

    role: str
    dtypes: tuple[str, ...]  # that it may be stored in
    shape: Shape  # as stored
    blocks: Shape  # along each axis that counts rows of the weight, how many in succession have the same row of it
    most: bool = False  # whether `shape` is the most it may have: bytes of text, say

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class RowLayout:
    """A decoded tensor as rows: the stretch that is decoded on its own."""

    axes: Shape  # sizes of the axes that count rows
    length: int  # elements of a row, decoded
    stored: int  # elements of the stored tensor for a row
    beside: tuple[Beside, ...]

    def count(self, beside: Beside) -> int:
        """Rows of a tensor beside the codes."""
        return prod(-(-n // b) for n, b in zip(self.axes, beside.blocks, strict=True))

    def each(self, beside: Beside) -> int:
        """Elements of a row of a tensor beside the codes."""
        return beside.size // self.count(beside)

    def rows_of(self, beside: Beside, rows: Array) -> Array:
        """The rows of a tensor beside the codes that rows of the weight have: int64[n] -> int64[n]."""
        out, weight = np.zeros_like(rows), 1
        for size, block in zip(reversed(self.axes), reversed(beside.blocks), strict=True):
            rows, at = np.divmod(rows, size)
            out += at // block * weight
            weight *= -(-size // block)
        return out


class Factors(NamedTuple):
    """What the numbers of some rows are multiplied by, and what is taken from them before: one for each group of a row.

    Of one row each, or one for all: float32[rows or 1, groups].
    """

    scales: Array
    zeros: Array | None
    group: int  # elements of a row that share them; the last group may be short


@dataclass(frozen=True, slots=True)
class Upload:
    """What the tensors of a quantised weight are called: suffixes, where the logical weight's name is without its own."""

    codes: str
    weight: str  # the logical weight's
    beside: Mapping[str, str]  # by role
    unused: tuple[str, ...] = ()  # tensors of the module that say nothing of its weight


class Found(NamedTuple):
    """Dtype and shape of a stored tensor."""

    dtype: str
    shape: Shape


class RefusedError(ValueError):
    """An upload that cannot be read without guessing. `key`: of `quantization_config`, or the name of a tensor."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"`{key}` {reason}")
        self.key = key


class Code(ABC):
    """A way of storing weights. Codes are frozen records of settings that are numbers, flags or words."""

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]  # that codes may be stored in
    methods: ClassVar[tuple[str, ...]]  # values of `quant_method` of uploads that use it
    uploads: ClassVar[tuple[Upload, ...]]
    examples: ClassVar[tuple[tuple[Code, Shape], ...]] = ()  # with logical shapes; set below each class
    unit: ClassVar[int] = 1  # elements of a row whose bytes `order` needs together
    by_row: ClassVar[bool] = False  # whether factors depend on more than the rows of the tensors beside

    @classmethod
    @abstractmethod
    def read(cls, config: Mapping[str, Any], module: str, found: Mapping[str, Found]) -> Self | None:
        """The code of a module whose tensors are `found`, by role; that of the codes is "". None: it is another's.

        Raises RefusedError where `config`, the upload's `quantization_config`, says what is not known for sure.
        """

    @abstractmethod
    def stored(self, shape: Shape) -> Shape:
        """The shape of the tensor of codes of a weight of this shape. Raises OpError where it has none."""

    @abstractmethod
    def layout(self, shape: Shape) -> RowLayout:
        """The rows of a weight of this shape. Raises OpError as `stored` does."""

    @abstractmethod
    def table(self, dtype: str, beside: Sequence[Array]) -> Array:
        """float32[256, n]: the n numbers that each byte of codes stands for. `beside`: as of `factors`."""

    @abstractmethod
    def factors(self, shape: Shape, rows: Array, beside: Sequence[Array]) -> Factors:
        """Of some rows, by number. `beside`: [rows or 1, elements of a row] of each tensor beside the codes."""

    @abstractmethod
    def forward(self, arrays: Sequence[Array], shape: Shape) -> Array:
        """The weight, float32 of the logical shape, of the tensor of codes and those beside it, whole."""

    def place(self, shape: Shape) -> tuple[AxisMap, ...]:
        """Of each logical axis, where the decoded rows, one after the other, hold it."""
        return tuple(whole(n, prod(shape[i + 1 :])) for i, n in enumerate(shape))

    def order(self, codes: Array) -> Array:
        """Bytes of codes in the order of the elements they hold: uint8[rows, n] -> uint8[rows, n]."""
        return codes

    @property
    def rounds(self) -> str | None:
        """The dtype in which the format's library multiplies, and to which products are rounded; None: float32."""
        return None

    def settings(self) -> tuple[tuple[str, Setting], ...]:
        """The record's fields, by name."""
        return tuple((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]

    def describe(self) -> str:
        """As a summary says it: `int4 in groups of 32`."""
        return self.name

    def random(self, shape: Shape, rng: np.random.Generator) -> list[Array]:
        """Stored tensors of some weight, any bits: the codes and what is beside them. For tests and measurements."""
        first = random_bits(rng, self.dtypes[0], self.stored(shape))
        beside = self.layout(shape).beside
        return [first, *(random_bits(rng, str(rng.choice(b.dtypes)), b.shape) for b in beside)]


def random_bits(rng: np.random.Generator, dtype: str, shape: Shape) -> Array:
    """Any bits as an array: infinities and NaN too."""
    kind = numpy_dtype(dtype)
    out: Array = rng.integers(0, 256, prod(shape) * kind.itemsize, np.uint8).view(kind).reshape(shape)
    return out


def matrix(shape: Shape, name: str) -> tuple[int, int]:
    """A weight's outputs and inputs. Raises OpError for what is no matrix."""
    if len(shape) != 2:
        raise OpError(f"{name} is of matrices, the rule's tensor is {list(shape)}")
    return shape[0], shape[1]


def per(total: int, size: int) -> int:
    """How many groups of `size` there are in `total`, the last one perhaps short."""
    return -(-total // size)


def check_beside(code: Code, shape: Shape, found: Sequence[Found]) -> None:
    """Raises OpError where tensors beside the codes are none of this code and shape."""
    wanted = code.layout(shape).beside
    if len(wanted) != len(found):
        raise OpError(f"{code.name} has {len(wanted)} tensors beside its codes, not {len(found)}")
    for beside, tensor in zip(wanted, found, strict=True):
        if tensor.dtype not in beside.dtypes:
            raise OpError(f"the {beside.role} of {code.name} is {' or '.join(beside.dtypes)}, found {tensor.dtype}")
        fits = tensor.shape == beside.shape or beside.size == prod(tensor.shape) == 1
        fits = fits or (beside.most and prod(tensor.shape) <= beside.size)
        if not fits:
            raise OpError(
                f"the {beside.role} of {code.name} {list(shape)} is {list(beside.shape)}, found {list(tensor.shape)}"
            )

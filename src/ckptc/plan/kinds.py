"""Outputs of a plan: kinds, rows, and each output with all that its kind says.

Outputs of different layers and experts differ in their names, in which stored tensors they read, and where in those they
begin. All else is said once, of their kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Annotated

from msgspec import Meta, Struct

from ckptc.ops.nest import Part
from ckptc.ops.types import itemsize

Box = tuple[tuple[int, int], ...]  # [low, high) for each axis
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Sizes = tuple[Positive, ...]
Name = Annotated[str, Meta(min_length=1)]
Digest = Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]
MeshAxis = Annotated[str, Meta(pattern="^[A-Za-z0-9_]+$")]
Spec = tuple[tuple[MeshAxis, ...], ...]


class Record(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An object of JSON. What has its default is left out."""


class Row(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A list of JSON, its fields in their order: for tables of thousands."""


class Beside(Record, frozen=True):
    """Tensors that decoding needs beside the codes, one for each tensor of codes (`ckptc.ops.codes`)."""

    dtype: str
    shape: Sizes


class Decode(Record, frozen=True):
    """How codes become numbers: a code by name with its settings, and what is beside the tensors of codes."""

    code: str
    settings: tuple[tuple[str, int | bool | str | tuple[int, ...]], ...]
    shape: Sizes  # of the weight that a tensor decodes to
    beside: tuple[Beside, ...]


class Stored(Record, frozen=True):
    """What is alike of the stored tensors that outputs of a kind read: `count` equally shaped ones."""

    dtype: str
    shape: Sizes
    count: Positive = 1
    chunk: Sizes | None = None  # of arrays of chunks, what is read and decoded as one; None: any range can be read
    decode: Decode | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor as stored."""
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def chunk_bytes(self) -> int:
        return prod(self.chunk or self.shape) * itemsize(self.dtype)

    @property
    def elements(self) -> int:
        """Elements of one tensor, decoded."""
        return prod(self.decode.shape if self.decode else self.shape)

    @property
    def rows(self) -> int:
        """How many stored tensors an output names for it: these, and as many of each that is beside codes."""
        return self.count * (1 + len(self.decode.beside if self.decode else ()))


class Exactness(Record, frozen=True):
    """How near an output is to the tensor that was converted, if nothing has changed it since.

    Equal bit for bit where the original's magnitude is above `above` (None: nowhere), else |difference| is at most
    `relative` · |original| + `absolute`. Exact altogether: `above` is 0.
    """

    above: float | None = 0.0
    relative: float = 0.0
    absolute: float = 0.0


class Content(Struct, frozen=True):
    """What outputs of a kind hold, however it is stored."""

    shape: tuple[int, ...]
    dtype: str
    sources: tuple[Stored, ...]
    parts: tuple[Part, ...]


class Kind(Record, frozen=True):
    """What outputs that differ in their names and tensors alone have in common."""

    rule: str
    shape: Sizes
    dtype: str
    chunk: Sizes  # what is made and written at once: of an Orbax checkpoint, a storage chunk
    unit: Sizes  # what is read at once: whole chunks, or up to the output's edge
    sources: tuple[Stored, ...]
    parts: Annotated[tuple[Part, ...], Meta(min_length=1)]  # cover an output once; `base` counts from where it begins
    ops: tuple[str, ...] = ()  # the rule's ops as text, for people
    exactness: Exactness | None = None  # of tensors that are made back
    shards: Sizes = ()  # of an Orbax checkpoint, shards along each axis, for the sharding metadata
    axes: tuple[str | None, ...] = ()  # logical axis names, where the mapping or the target gives them
    spec: Spec = ()  # of each axis, the mesh axes that shard it; () without a mesh, or for none
    indivisible: Spec = ()  # and those that would, but that do not divide it; () for none
    link: tuple[Count, ...] | None = None  # the axes, slowest first, in the order that chunks are stored in; then
    # chunks that lie so in a source file are linked, not made (`ckptc.plan.links`)
    stored: Sizes = ()  # the chunk as it is stored, where that is larger than `chunk`, which is then what is written of
    # it at once (`ckptc.plan.stored`)

    @property
    def size(self) -> int:
        """Number of elements of one output."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def content(self) -> Content:
        return Content(self.shape, self.dtype, self.sources, self.parts)

    def units(self) -> Iterator[Box]:
        """The units' boxes, row-major."""
        return boxes(tuple((0, n) for n in self.shape), self.unit)


def boxes(box: Box, step: Sequence[int]) -> Iterator[Box]:
    """Boxes of the shape `step`, or up to the edge, that cover `box` from its corner on: row-major."""
    for corner in product(*(range(low, high, s) for (low, high), s in zip(box, step, strict=True))):
        yield tuple((c, min(c + s, high)) for c, s, (_, high) in zip(corner, step, box, strict=True))


class Output(Row, frozen=True):
    """One output."""

    name: Name  # a tensor's name, or an array's path joined with slashes
    kind: Count  # position in `Plan.kinds`
    tensors: tuple[
        Count, ...
    ]  # of each of the kind's sources: positions in `Plan.tensors`; then of each that is beside codes
    begins: tuple[Count, ...] = ()  # of each of the sources, the element where the output begins; (): all at the first


class Operand(Struct, frozen=True):
    """Stored tensors that one output reads: positions in `Plan.tensors`."""

    stored: Stored
    tensors: tuple[int, ...]
    beside: tuple[tuple[int, ...], ...] = ()  # where they are codes, those of each sort that is beside them
    begin: int = 0  # the element where the output begins in each


class Array(Struct, frozen=True):
    """An output with what its kind says: as `Kind` has it."""

    name: str
    kind: Kind
    sources: tuple[Operand, ...]

    @staticmethod
    def of(kind: Kind, output: Output) -> Array:
        operands, at = [], 0
        for number, s in enumerate(kind.sources):
            values, *beside = (output.tensors[n : n + s.count] for n in range(at, at + s.rows, s.count))
            operands.append(Operand(s, values, tuple(beside), output.begins[number] if output.begins else 0))
            at += s.rows
        return Array(output.name, kind, tuple(operands))

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.name.split("/"))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kind.shape

    @property
    def dtype(self) -> str:
        return self.kind.dtype

    @property
    def nbytes(self) -> int:
        return self.kind.nbytes

    @property
    def size(self) -> int:
        return self.kind.size

    @property
    def chunk(self) -> tuple[int, ...]:
        return self.kind.chunk

    @property
    def unit(self) -> tuple[int, ...]:
        return self.kind.unit

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.kind.parts

    @property
    def rule(self) -> str:
        return self.kind.rule

    @property
    def ops(self) -> tuple[str, ...]:
        return self.kind.ops

    @property
    def shards(self) -> tuple[int, ...]:
        return self.kind.shards

    @property
    def axes(self) -> tuple[str | None, ...]:
        return self.kind.axes

    @property
    def spec(self) -> Spec:
        return self.kind.spec

    @property
    def stored(self) -> tuple[int, ...]:
        return self.kind.stored

    @property
    def link(self) -> tuple[int, ...] | None:
        return self.kind.link

    def units(self) -> Iterator[Box]:
        return self.kind.units()


def tabulated(arrays: Sequence[Array]) -> tuple[tuple[Kind, ...], tuple[Output, ...]]:
    """The kinds, and a row for each output: `Array.of`, undone."""
    kinds: dict[Kind, int] = {}
    rows = []
    for a in arrays:
        tensors = tuple(n for x in a.sources for column in (x.tensors, *x.beside) for n in column)
        begins = tuple(x.begin for x in a.sources) if any(x.begin for x in a.sources) else ()
        rows.append(Output(a.name, kinds.setdefault(a.kind, len(kinds)), tensors, begins))
    return tuple(kinds), tuple(rows)

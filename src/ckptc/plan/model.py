"""The plan's records.

A plan is concrete: which bytes of which files become which boxes of which arrays, through which arithmetic. It is compact because a stack of
thousands of tensors is one `Part` with a loop over its list of tensors (`ckptc.ops.nest`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from ckptc.ops.nest import Part
from ckptc.ops.types import itemsize

if TYPE_CHECKING:
    from ckptc.plan.outputs import Outputs

FORMAT = 2  # raised when a plan of an older ckptc can no longer be run

Box = tuple[tuple[int, int], ...]  # [low, high) for each axis


class File(Struct, frozen=True, forbid_unknown_fields=True):
    """A shard file as it was when the plan was made. `name` is relative to the source directory."""

    name: str
    size: int  # bytes
    header: str  # "sha256:<hex>" of its header
    content: str = (
        ""  # what tells it from other weights under this header: "<kind>:<value>", such as a digest of samples
    )


class Tensor(Struct, frozen=True, forbid_unknown_fields=True):
    """A source tensor. Without a checkpoint at hand `file` is -1 and the offsets count from the tensor's own start."""

    name: str
    file: int
    begin: int  # absolute byte offsets in the file
    end: int


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """Equally shaped tensors that an array reads: positions in `Plan.tensors`. With `decode`, they are stored codes."""

    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[int, ...]
    decode: Decode | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor as stored."""
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def kind(self) -> Source:
        """The source without its tensors: all that arrays of different layers have in common."""
        return replace(self, tensors=(), decode=self.decode and self.decode.kind)

    @property
    def elements(self) -> int:
        """Elements of one tensor, decoded."""
        return prod(self.decode.shape if self.decode else self.shape)


class Beside(Struct, frozen=True, forbid_unknown_fields=True):
    """Tensors that decoding needs beside the codes, one for each tensor of codes (`ckptc.ops.codes`)."""

    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[int, ...]


class Decode(Struct, frozen=True, forbid_unknown_fields=True):
    """How codes become numbers: a code by name with its settings, and what is beside the tensors of codes."""

    code: str
    settings: tuple[tuple[str, int | bool | str | tuple[int, ...]], ...]
    shape: tuple[int, ...]  # of the weight that a tensor decodes to
    beside: tuple[Beside, ...]

    @property
    def kind(self) -> Decode:
        """The same without its tensors."""
        return replace(self, beside=tuple(replace(b, tensors=()) for b in self.beside))


class Exactness(Struct, frozen=True, forbid_unknown_fields=True):
    """How near an exported tensor is to the one that was converted, if nothing has changed it since.

    Equal bit for bit where the original's magnitude is above `above` (None: nowhere), else |difference| is at most
    `relative` · |original| + `absolute`. Exact altogether: `above` is 0.
    """

    above: float | None = 0.0
    relative: float = 0.0
    absolute: float = 0.0


class Content(Struct, frozen=True, forbid_unknown_fields=True):
    """What an array holds, however it is stored. Its sources are kinds: arrays that differ in their tensors alone have
    equal contents, and what follows from those is worked out once."""

    shape: tuple[int, ...]
    dtype: str
    sources: tuple[Source, ...]
    parts: tuple[Part, ...]


class Array(Struct, frozen=True, forbid_unknown_fields=True):
    """A target array: what it is, how it is stored, and what it is made of."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]  # storage chunk; the last along an axis may be cut short
    unit: tuple[int, ...]  # what is read and written at once: whole chunks, or up to the array's edge
    shards: tuple[int, ...]  # shards along each axis, for the sharding metadata
    axes: tuple[str | None, ...]  # logical axis names, where the mapping or the target gives them
    rule: str
    ops: tuple[str, ...]  # the rule's ops as text, for people
    sources: tuple[Source, ...]
    parts: tuple[Part, ...]  # cover the array once; `Part.source` is a position in `sources`
    spec: tuple[tuple[str, ...], ...] = ()  # of each axis, the mesh axes that shard it; () without a mesh, or for none
    indivisible: tuple[tuple[str, ...], ...] = ()  # and those that would, but that do not divide it; () for none
    link: tuple[int, ...] | None = None  # the axes, slowest first, in the order that chunks are stored in; then chunks
    # that lie so in a source file are linked, not made (`ckptc.plan.links`)
    stored: tuple[int, ...] = ()  # the chunk as it is stored, where that is larger than `chunk`, which is then what is
    # written of it at once (`ckptc.plan.stored`)

    @property
    def name(self) -> str:
        return "/".join(self.path)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def content(self) -> Content:
        return Content(self.shape, self.dtype, tuple(s.kind for s in self.sources), self.parts)

    def units(self) -> Iterator[Box]:
        """The units' boxes, row-major."""
        return boxes(self.shape, self.unit)


def boxes(shape: tuple[int, ...], unit: tuple[int, ...]) -> Iterator[Box]:
    """Boxes of the shape `unit`, or up to the edge, that cover `shape`: row-major."""
    for corner in product(*(range(0, n, u) for n, u in zip(shape, unit, strict=True))):
        yield tuple((c, min(c + u, n)) for c, u, n in zip(corner, unit, shape, strict=True))


class LeftOut(Struct, frozen=True, forbid_unknown_fields=True):
    """Source tensors that are not converted: the mapping's pattern and reason, and how many there are."""

    pattern: str
    reason: str
    tensors: int
    bytes: int


class Totals(Struct, frozen=True, forbid_unknown_fields=True):
    arrays: int
    tensors: int
    parameters: int  # elements of all target arrays
    read_bytes: int
    write_bytes: int
    peak_memory_bytes: int  # of a worker's buffers, of which each has room for the largest use of it
    linked_bytes: int = 0  # of `write_bytes`, what is not written: it stays in the source's files
    reread_bytes: int = 0  # of `read_bytes`, what is read a second time, or a third


class Made(Struct, frozen=True, forbid_unknown_fields=True):
    """What made the plan, by name and digest ("sha256:<hex>")."""

    ckptc: str
    model: str
    family: str
    repo: str
    mapping: str  # digest of the mapping's text
    source: str | None  # digest of all files' names, sizes, headers and contents; None without a checkpoint
    kind: str = "import"  # or "export": from Orbax to safetensors


class Choices(Struct, frozen=True, forbid_unknown_fields=True):
    """The options the plan was compiled with, and the dims they gave."""

    layout: str
    dtype: str
    multimodal: bool
    shards: int
    memory: int
    naming: str  # which of the mapping's `sources`
    dims: tuple[tuple[str, int | float | str | bool], ...]
    mesh: tuple[tuple[str, int], ...] = ()  # axes of the device mesh that arrays are sharded for, and their sizes
    compression: str = "none"  # of chunks: or "zstd:<level>", "blosc-lz4"
    link: bool = False  # whether chunks that lie in source files stay there
    scan_axis: int = 1  # the axis that stacked layers are
    pipeline: str = ""  # how layers are divided into stages: "stages=4,layers_per_stage=2"


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    made: Made
    choices: Choices
    files: tuple[File, ...]
    tensors: tuple[Tensor, ...]
    arrays: tuple[Array, ...]  # in the order of their paths; none of an export, which has `outputs`
    left_out: tuple[LeftOut, ...]
    totals: Totals
    outputs: Outputs | None = None  # of an export

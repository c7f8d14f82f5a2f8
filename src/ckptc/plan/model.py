"""The plan's records: stored tensors -> parts -> outputs, whichever direction.

    sources   where stored tensors lie: safetensors files, or an Orbax checkpoint; there may be several
    tensors   a row a stored tensor: a range of a file, or an array of chunks, of which any box can be read
    kinds     what outputs that differ in their names and tensors alone have in common: shape, dtype, units, parts
    outputs   a row an output: its name, its kind, which stored tensors it reads, and where in them it begins
    layout    what the outputs become: an Orbax checkpoint, or a set of safetensors files

A plan is concrete: which elements of which tensors become which boxes of which outputs, through which arithmetic. It is
compact because a stack of thousands of tensors is one `Part` with a loop over its list of tensors (`ckptc.ops.nest`),
and because layers that are alike share a kind.

The records are their own JSON (`ckptc.plan.json`): types and bounds are checked when it is read.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from ckptc.ops.nest import AxisMap
from ckptc.plan.kinds import (
    Array,
    Beside,
    Box,
    Content,
    Count,
    Decode,
    Digest,
    Exactness,
    Kind,
    MeshAxis,
    Name,
    Operand,
    Output,
    Positive,
    Record,
    Row,
    Sizes,
    Spec,
    Stored,
    boxes,
    tabulated,
)

FORMAT = 4  # raised when a plan of an older ckptc can no longer be run


class File(Record, frozen=True):
    """A file as it was when the plan was made."""

    name: Name  # relative to the source's directory, with forward slashes
    size: Count  # bytes
    header: Digest  # of a safetensors file's header; of all of a file of metadata, and of a companion
    content: str = ""  # what tells it from other weights under this header, such as "sampled-sha256:<hex>"; "": nothing


class Source(Record, frozen=True):
    """A checkpoint that tensors are read from."""

    format: Literal["safetensors", "orbax"]
    files: tuple[File, ...] = ()  # that hold tensors, or an Orbax checkpoint's metadata
    digest: Digest | None = None  # of all of them; None of a plan that was made without a checkpoint and cannot be run
    name: str = ""  # where it lies for every machine: hf://org/repo@commit; of a directory, nothing


class Tensor(Row, frozen=True):
    """A stored tensor: bytes `begin` to `end` of a file; or, of an Orbax checkpoint, the array of this name, all of its
    bytes. Without a checkpoint at hand `file` is -1 and the offsets count from the tensor's own start."""

    name: str
    file: Annotated[int, Meta(ge=-1)]  # position among the source's files; -1: no range of a file
    begin: Count
    end: Count
    source: Count = 0  # position in `Plan.sources`

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Orbax(Record, frozen=True, tag_field="format", tag="orbax"):
    """An Orbax checkpoint: outputs are its arrays, in the order of their paths."""

    mesh: tuple[tuple[MeshAxis, Positive], ...] = ()  # the device mesh that arrays are sharded for
    compression: str = "none"  # of chunks: or "zstd:<level>", "blosc-lz4"
    link: bool = False  # whether chunks that lie in source files stay there


class OutputFile(Row, frozen=True):
    """One safetensors file: the next `count` outputs, one after the other, behind `header` bytes."""

    name: str
    size: Count  # bytes
    header: Count  # bytes
    count: Positive


class Safetensors(Record, frozen=True, tag_field="format", tag="safetensors"):
    """A set of safetensors files, and what goes beside them: outputs are their tensors, in the order of the files."""

    files: tuple[OutputFile, ...]
    config: dict[str, Any]  # config.json
    companions: tuple[File, ...] = ()  # copied from the original's directory


class Padding(Record, frozen=True):
    """A region of a stored array that no output has a place for: it should hold `value` everywhere."""

    tensor: Count  # position in `Plan.tensors`
    array: Stored
    axes: tuple[AxisMap, ...]  # the region's indices along each axis
    axis: Count  # along which its rows are counted
    value: float

    @property
    def rows(self) -> int:
        return self.axes[self.axis].size if self.axes else 1


class LeftOut(Record, frozen=True):
    """Source tensors that are not converted: the mapping's pattern and reason, and how many there are."""

    pattern: str
    reason: str
    tensors: Annotated[int, Meta(ge=0)] = 0
    bytes: Annotated[int, Meta(ge=0)] = 0


class Totals(Record, frozen=True):
    arrays: Count  # outputs
    tensors: Count  # stored ones that are read
    parameters: Count  # elements of all outputs
    read_bytes: Count
    write_bytes: Count
    peak_memory_bytes: Count  # of a worker's buffers, of which each has room for the largest use of it
    linked_bytes: Annotated[int, Meta(ge=0)] = 0  # of `write_bytes`, what stays in the source's files
    reread_bytes: Annotated[int, Meta(ge=0)] = 0  # of `read_bytes`, what is read a second time, or a third


class Made(Record, frozen=True):
    """What made the plan, by name and digest."""

    ckptc: str
    model: str
    family: str
    repo: str
    mapping: Digest  # of the mapping's text


class Choices(Record, frozen=True):
    """The options the plan was compiled with, and the dims they gave."""

    layout: str  # of layers: scanned, unscanned
    dtype: str
    multimodal: bool
    memory: Count
    naming: str  # which of the mapping's `sources`
    dims: dict[str, int | float | str | bool | list[Any]]
    shards: Count = 0
    scan_axis: Annotated[int, Meta(ge=0)] = 1  # the axis that stacked layers are
    pipeline: str = ""  # how layers are divided into stages: "stages=4,layers_per_stage=2"


class Plan(Record, frozen=True, dict=True):
    made: Made
    choices: Choices
    totals: Totals
    sources: Annotated[tuple[Source, ...], Meta(min_length=1)]
    layout: Orbax | Safetensors
    left_out: tuple[LeftOut, ...]
    kinds: tuple[Kind, ...]
    outputs: tuple[Output, ...]
    tensors: tuple[Tensor, ...]
    batches: tuple[tuple[Count, ...], ...] = ()  # outputs of one kind that are made together, from chunks they share;
    # (): each by itself
    padding: tuple[Padding, ...] = ()
    twins: tuple[Output, ...] = ()  # where sources hold an output again: what they say, to be compared
    notes: tuple[str, ...] = ()  # for people: what differs from the original, and why

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The outputs, each with all that its kind says."""
        return tuple(Array.of(self.kinds[o.kind], o) for o in self.outputs)

    @property
    def source(self) -> str | None:
        """The digest of the first source; None of a plan that names no bytes to read."""
        return self.sources[0].digest

    @property
    def digest(self) -> str:
        """`sha256:` and 64 hex digits, of everything that the plan says."""
        from ckptc.plan.json import digest

        return digest(self)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Writes the plan's JSON file, whole or not at all. An earlier plan is replaced; anything else only with `force`.

        Raises InputError: `output-exists`, `unwritable-output`.
        """
        from ckptc.plan.json import dumps
        from ckptc.plan.on_disk import write_plan

        write_plan(Path(path), dumps(self), force)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """The plan of a file that `save` or `ckptc compile -o` wrote.

        Raises InputError: `unreadable-plan`, `invalid-plan`, `plan-format`, `edited-plan`.
        """
        from ckptc.plan.on_disk import read_plan

        return read_plan(Path(path))[0]


__all__ = [
    "FORMAT",
    "Array",
    "Beside",
    "Box",
    "Choices",
    "Content",
    "Count",
    "Decode",
    "Digest",
    "Exactness",
    "File",
    "Kind",
    "LeftOut",
    "Made",
    "MeshAxis",
    "Name",
    "Operand",
    "Orbax",
    "Output",
    "OutputFile",
    "Padding",
    "Plan",
    "Positive",
    "Record",
    "Row",
    "Safetensors",
    "Sizes",
    "Source",
    "Spec",
    "Stored",
    "Tensor",
    "Totals",
    "boxes",
    "tabulated",
]

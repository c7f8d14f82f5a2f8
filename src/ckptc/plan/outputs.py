"""What an export writes: tensors by kinds, safetensors files laid out byte by byte before anything is read, and what goes
beside them.

Tensors of different layers and experts differ in their names, in which stored arrays hold them, and where in those they
begin. All else is said once, of their kind: so a plan of tens of thousands of tensors is a table with a short row for
each.

A file is `u64 N` (little-endian), `N` bytes of JSON, the tensors' bytes. The JSON is padded with spaces to a multiple
of eight, so that tensors begin aligned; in files that are not small, so far that they begin with a page. Format: the section "Format" of the README at
https://github.com/huggingface/safetensors; names and index as `save_pretrained` of transformers writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from msgspec import Struct

from ckptc.ops.nest import AxisMap, Part
from ckptc.ops.types import itemsize
from ckptc.plan.model import Box, Exactness, File, boxes

INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}
PAGE = 4096  # bytes
SMALL = 1 << 20  # bytes of tensors: files of fewer are not padded to pages

# The format's names of dtypes, by ours.
DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}


class Stored(Struct, frozen=True, forbid_unknown_fields=True):
    """What is alike of the stored arrays that a kind of tensors reads."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]  # what is decoded as one; the last along an axis may reach beyond the array

    @property
    def chunk_bytes(self) -> int:
        return prod(self.chunk) * itemsize(self.dtype)


class Kind(Struct, frozen=True, forbid_unknown_fields=True):
    """What tensors that differ in their names and places alone have in common."""

    shape: tuple[int, ...]
    dtype: str
    unit: tuple[int, ...]  # what is made and written at once, or up to the tensor's edge
    rule: str
    ops: tuple[str, ...]  # the rule's ops, undone, as text, for people
    sources: tuple[Stored, ...]
    parts: tuple[Part, ...]  # cover a tensor once; `base` counts from where the tensor begins in the stored array
    exactness: Exactness

    @property
    def size(self) -> int:
        """Number of elements of one tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)

    def units(self) -> Iterator[Box]:
        """The units' boxes, row-major."""
        return boxes(self.shape, self.unit)


class Exported(NamedTuple):
    """One tensor. `places`: for each of its kind's sources, which stored array it is (a position in `Plan.tensors`),
    and at which of its elements, row-major, the tensor begins: flat, array and element by turns.
    """

    name: str
    kind: int  # position in `Outputs.kinds`
    places: tuple[int, ...]

    @property
    def arrays(self) -> tuple[int, ...]:
        return self.places[::2]

    @property
    def begins(self) -> tuple[int, ...]:
        return self.places[1::2]


class OutputFile(Struct, frozen=True, forbid_unknown_fields=True):
    """One safetensors file: the next `count` tensors, one after the other, behind `header` bytes."""

    name: str
    size: int  # bytes
    header: int  # bytes
    count: int


class Padding(Struct, frozen=True, forbid_unknown_fields=True):
    """A region of a stored array that no tensor has a place for: it should hold `value` everywhere."""

    tensor: int  # position in `Plan.tensors`
    array: Stored
    axes: tuple[AxisMap, ...]  # the region's indices along each axis
    axis: int  # along which its rows are counted
    value: float

    @property
    def rows(self) -> int:
        return self.axes[self.axis].size if self.axes else 1


class Outputs(Struct, frozen=True, forbid_unknown_fields=True):
    """All that an export writes."""

    kinds: tuple[Kind, ...]
    tensors: tuple[Exported, ...]  # in the order of the files
    files: tuple[OutputFile, ...]
    batches: tuple[tuple[int, ...], ...]  # tensors of one kind and array, made together from chunks they share
    config: Mapping[str, Any]  # config.json
    companions: tuple[File, ...]  # copied from the original's directory; `header` is the digest of all of the file
    padding: tuple[Padding, ...] = ()
    twins: tuple[Exported, ...] = ()  # where stored arrays hold a tensor again: what the others say, to be compared
    notes: tuple[str, ...] = ()  # for people: what differs from the original, and why

    def named(self) -> Iterator[tuple[str, Kind]]:
        """Every tensor's name and kind, in the order of the files."""
        return ((t.name, self.kinds[t.kind]) for t in self.tensors)

    def places(self) -> list[tuple[int, int]]:
        """For every tensor the file it is in and the absolute byte where it begins there."""
        out, sizes, tensors = [], [k.nbytes for k in self.kinds], iter(self.tensors)
        for number, file in enumerate(self.files):
            at = file.header
            for _ in range(file.count):
                out.append((number, at))
                at += sizes[next(tensors).kind]
        return out

    def of_file(self, number: int) -> Sequence[Exported]:
        """The tensors of a file."""
        first = sum(f.count for f in self.files[:number])
        return self.tensors[first : first + self.files[number].count]


def lay_out(
    tensors: Sequence[Exported], kinds: Sequence[Kind], most: int
) -> tuple[tuple[Exported, ...], tuple[OutputFile, ...]]:
    """The files for tensors in this order, none of more than `most` bytes of them unless a single tensor is larger.

    Within a file the tensors of whole pages come first: all of them begin at a page, and can be written and mapped
    without a copy. Of the others those of wider elements come first, as the format's reference writer has them, so that
    each begins at a multiple of its element's size, which readers that map files rely on. Returns the tensors in that
    order, too.
    """
    groups: list[list[Exported]] = []
    sizes, widths = [k.nbytes for k in kinds], [itemsize(k.dtype) for k in kinds]
    size = 0
    for tensor in tensors:
        if not groups or size + sizes[tensor.kind] > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += sizes[tensor.kind]
    files = []
    for number, group in enumerate(groups):
        group.sort(key=lambda t: (sizes[t.kind] % PAGE != 0, -widths[t.kind]))
        name = "model.safetensors" if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        length = len(header(group, kinds))
        files.append(OutputFile(name, length + sum(sizes[t.kind] for t in group), length, len(group)))
    return tuple(t for group in groups for t in group), tuple(files)


def header(tensors: Sequence[Exported], kinds: Sequence[Kind]) -> bytes:
    """The length field and the JSON of a file that holds these tensors, one after the other."""
    types = [f'{{"dtype":"{DTYPES[k.dtype]}","shape":{json.dumps(k.shape, separators=(",", ":"))}' for k in kinds]
    sizes = [k.nbytes for k in kinds]
    entries = [f'"__metadata__":{json.dumps(METADATA, separators=(",", ":"))}']
    at = 0
    for name, kind, _ in tensors:
        end = at + sizes[kind]
        entries.append(f'{json.dumps(name, ensure_ascii=False)}:{types[kind]},"data_offsets":[{at},{end}]}}')
        at = end
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-(8 + len(text)) % (PAGE if at >= SMALL else 8))
    return len(text).to_bytes(8, "little") + text


def index(outputs: Outputs) -> str:
    """The text of `model.safetensors.index.json`."""
    where = {t.name: outputs.files[file].name for t, (file, _) in zip(outputs.tensors, outputs.places(), strict=True)}
    kinds = [kind for _, kind in outputs.named()]
    total = {"total_parameters": sum(k.size for k in kinds), "total_size": sum(k.nbytes for k in kinds)}
    return json.dumps({"metadata": total, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"


def config_text(config: Mapping[str, Any]) -> str:
    """The text of config.json."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"

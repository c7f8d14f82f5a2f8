"""What an export writes: safetensors files laid out byte by byte before anything is read, and what goes beside them.

A file is `u64 N` (little-endian), `N` bytes of JSON, the tensors' bytes. The JSON is padded with spaces to a multiple
of eight, so that tensors begin aligned. Format: the section "Format" of the README at
https://github.com/huggingface/safetensors; names and index as `save_pretrained` of transformers writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptc.ops.types import itemsize
from ckptc.plan.model import Array, Box, File

INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}

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


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file: the arrays `first` … in the plan's order, and the absolute byte where each begins."""

    name: str
    size: int  # bytes
    first: int  # position in `Plan.arrays`
    begins: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Padding:
    """A region of a stored array that no tensor has a place for: it should hold `value` everywhere."""

    tensor: int  # position in `Plan.tensors`
    shape: tuple[int, ...]  # of the array
    dtype: str
    box: Box
    axis: int  # along which its rows are counted
    value: float


@dataclass(frozen=True, slots=True)
class Outputs:
    """All that an export writes, beside the arrays themselves."""

    files: tuple[OutputFile, ...]
    batches: tuple[tuple[int, ...], ...]  # arrays made together, since the chunks they read are the same ones
    config: Mapping[str, Any]  # config.json
    companions: tuple[File, ...]  # copied from the original's directory; `header` is the digest of all of the file
    padding: tuple[Padding, ...] = ()
    twins: tuple[Array, ...] = ()  # where stored arrays hold a tensor twice: what the others say, to be compared
    chunks: Mapping[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # of stored arrays, by position in `Plan.tensors`
    notes: tuple[str, ...] = ()  # for people: what differs from the original, and why


def lay_out(arrays: Sequence[Array], most: int) -> tuple[tuple[Array, ...], tuple[OutputFile, ...]]:
    """The files for arrays in this order, none of more than `most` bytes of tensors unless a single tensor is larger.

    Within a file the arrays of wider elements come first, as the format's reference writer has them, so that each
    begins at a multiple of its element's size, which readers that map files rely on. Returns the arrays in that order,
    too.
    """
    groups: list[list[Array]] = []
    size = 0
    for array in arrays:
        if not groups or size + array.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(array)
        size += array.nbytes
    out, first = [], 0
    for k, group in enumerate(groups):
        group.sort(key=lambda a: -itemsize(a.dtype))
        name = "model.safetensors" if len(groups) == 1 else f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors"
        at = len(header(group))
        begins = []
        for array in group:
            begins.append(at)
            at += array.nbytes
        out.append(OutputFile(name, at, first, tuple(begins)))
        first += len(group)
    return tuple(a for group in groups for a in group), tuple(out)


def header(arrays: Sequence[Array]) -> bytes:
    """The length field and the JSON of a file that holds these arrays, one after the other."""
    entries: dict[str, Any] = {"__metadata__": METADATA}
    at = 0
    for array in arrays:
        entries[array.name] = {
            "dtype": DTYPES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(files: Sequence[OutputFile], arrays: Sequence[Array]) -> str:
    """The text of `model.safetensors.index.json`."""
    where = {arrays[f.first + k].name: f.name for f in files for k in range(len(f.begins))}
    total = {"total_parameters": sum(a.size for a in arrays), "total_size": sum(a.nbytes for a in arrays)}
    return json.dumps({"metadata": total, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"


def config_text(config: Mapping[str, Any]) -> str:
    """The text of config.json."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"

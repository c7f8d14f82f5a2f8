"""Safetensors files laid out byte by byte before anything is read: what each begins with, and where each tensor lies.

A file is `u64 N` (little-endian), `N` bytes of JSON, the tensors' bytes. The JSON is padded with spaces to a multiple
of eight, so that tensors begin aligned; in files that are not small, so far that they begin with a page. Format: the section "Format" of the README at
https://github.com/huggingface/safetensors; names and index as `save_pretrained` of transformers writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ckptc.ops.types import itemsize
from ckptc.plan.model import Kind, Output, OutputFile, Plan, Safetensors

CONFIG = "config.json"
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


def lay_out(
    outputs: Sequence[Output], kinds: Sequence[Kind], most: int
) -> tuple[tuple[Output, ...], tuple[OutputFile, ...]]:
    """The files for tensors in this order, none of more than `most` bytes of them unless a single tensor is larger.

    Within a file the tensors of whole pages come first: all of them begin at a page, and can be written and mapped
    without a copy. Of the others those of wider elements come first, as the format's reference writer has them, so that
    each begins at a multiple of its element's size, which readers that map files rely on. Returns the tensors in that
    order, too.
    """
    groups: list[list[Output]] = []
    sizes, widths = [k.nbytes for k in kinds], [itemsize(k.dtype) for k in kinds]
    size = 0
    for output in outputs:
        if not groups or size + sizes[output.kind] > most:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += sizes[output.kind]
    files = []
    for number, group in enumerate(groups):
        group.sort(key=lambda t: (sizes[t.kind] % PAGE != 0, -widths[t.kind]))
        name = "model.safetensors" if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        length = len(header(group, kinds))
        files.append(OutputFile(name, length + sum(sizes[t.kind] for t in group), length, len(group)))
    return tuple(t for group in groups for t in group), tuple(files)


def header(outputs: Sequence[Output], kinds: Sequence[Kind]) -> bytes:
    """The length field and the JSON of a file that holds these tensors, one after the other."""
    types = [f'{{"dtype":"{DTYPES[k.dtype]}","shape":{json.dumps(k.shape, separators=(",", ":"))}' for k in kinds]
    sizes = [k.nbytes for k in kinds]
    entries = [f'"__metadata__":{json.dumps(METADATA, separators=(",", ":"))}']
    at = 0
    for output in outputs:
        end = at + sizes[output.kind]
        name = json.dumps(output.name, ensure_ascii=False)
        entries.append(f'{name}:{types[output.kind]},"data_offsets":[{at},{end}]}}')
        at = end
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-(8 + len(text)) % (PAGE if at >= SMALL else 8))
    return len(text).to_bytes(8, "little") + text


def headers(plan: Plan, layout: Safetensors) -> list[bytes]:
    """What each file begins with."""
    out, first = [], 0
    for file in layout.files:
        out.append(header(plan.outputs[first : first + file.count], plan.kinds))
        first += file.count
    return out


def places(plan: Plan, layout: Safetensors) -> list[tuple[int, int]]:
    """For every output the file it is in and the absolute byte where it begins there."""
    out, sizes, outputs = [], [k.nbytes for k in plan.kinds], iter(plan.outputs)
    for number, file in enumerate(layout.files):
        at = file.header
        for _ in range(file.count):
            out.append((number, at))
            at += sizes[next(outputs).kind]
    return out


def texts(plan: Plan, layout: Safetensors) -> dict[str, str]:
    """The index, where there are several files, and config.json: by name."""
    out = {}
    if len(layout.files) > 1:
        located = places(plan, layout)
        where = {t.name: layout.files[file].name for t, (file, _) in zip(plan.outputs, located, strict=True)}
        kinds = [plan.kinds[t.kind] for t in plan.outputs]
        total = {"total_parameters": sum(prod(k.shape) for k in kinds), "total_size": sum(k.nbytes for k in kinds)}
        out[INDEX] = json.dumps({"metadata": total, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"
    out[CONFIG] = config_text(layout.config)
    return out


def config_text(config: Mapping[str, Any]) -> str:
    """The text of config.json."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"

"""The header of one safetensors file: parsed, validated, turned into records.

A file is `u64 N` (little-endian), `N` bytes of JSON, then the tensors' bytes, nothing else:

    {"__metadata__": {"format": "pt"}, "wte": {"dtype": "F16", "shape": [4, 2], "data_offsets": [0, 16]}, …}

`data_offsets` are `[begin, end)` in bytes from the end of the header; values are little-endian, row-major and
packed. These statements, and every rule checked below, are those of the format's own description (the section
"Format" of the README at https://github.com/huggingface/safetensors): UTF-8 JSON object, no duplicate keys,
text-to-text `__metadata__`, at most 100 MB of header, no overlap, no hole, nothing after the last tensor.
Stricter than the reference reader in three ways, because each could hide a misread tensor: duplicate keys are
refused (the description forbids them, the reader keeps the last), so are fields of a tensor other than the
three, and so is a `__metadata__` that is null.

Only `read_header` touches the disk; everything else is pure. All problems of a file are raised together, as
one `InputError`; a malformed file never raises anything else.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptc.diagnostics import Diagnostic, InputError, did_you_mean
from ckptc.ir.source import SourceFile, SourceTensor
from ckptc.storage.formats.json_stream import MAX_VALUE, Groups, JsonReader, blocks_of, refuse_lfs_pointer
from ckptc.storage.source.files import (
    MAX_HEADER,
    header_blocks,
    is_text,
    listed,
    problem,
    read_start,
    refuse,
    shown,
)

MAX_REPORTED = 20  # problems spelled out per file; the rest are counted
MAX_COUNTED = 10_000  # problems per file after which no more are looked for

# The format's names (`Dtype` of the reference implementation, 0.8) -> canonical name, bytes per element.
DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "C64": ("complex64", 8),
}
# Elements smaller than a byte have no numpy array to be read into: bits per element, for the message.
SUB_BYTE: Mapping[str, int] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

_SAVE_AGAIN = "the file was not written by safetensors; save it again with a released version"
_INCOMPLETE = "the download is incomplete; download the file again"
_LIMIT = 1 << 63  # of sizes and offsets: what the operating system can address
# An entry as all known writers spell it. Others are decoded like any JSON.
_USUAL = re.compile(
    r' ?"(?!__metadata__")([^"\\\x00-\x1f]*)": ?\{"dtype": ?"([A-Z0-9_]+)", ?"shape": ?\[((?:N(?:, ?N){0,7})?)\], ?'
    r'"data_offsets": ?\[(N), ?(N)\]\},'.replace("N", "(?:0|[1-9][0-9]{0,18})")
)
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))


@dataclass(frozen=True, slots=True)
class Header:
    """What one file's header states."""

    file: SourceFile
    tensors: tuple[SourceTensor, ...]  # in the order of their bytes
    metadata: Mapping[str, str]  # `__metadata__`, empty when absent


def read_header(path: Path, name: str | None = None, file: int = 0) -> Header:
    """Read and parse the header of the file at `path`; `name` is what records and messages call it.

    Raises as `read_start` (no such file, not readable) and as `parse_header`.
    """
    name = path.name if name is None else name
    size, head = read_start(path, name)
    return finish_header(header_blocks(path, name, head), name, size, head, file)


def finish_header(blocks: Iterator[bytes], name: str, size: int, head: bytes, file: int) -> Header:
    """As `read_header`, of a file of `size` bytes that begins with `head`. `blocks`: all of its header, from the length on."""
    return _parse(name, size, header_end(name, size, head), blocks, file)


# -- the header ----------------------------------------------------------------------------------------------


def header_end(name: str, size: int, head: bytes) -> int:
    """The byte where tensor data begins in a file of `size` bytes that starts with `head`.

    Raises `lfs-pointer`, `header-truncated` or `header-too-large`.
    """
    refuse_lfs_pointer(name, head)
    if size < 8 or len(head) < 8:
        raise refuse(
            "header-truncated",
            f"{shown(name)} is too short to be a safetensors file",
            "8 bytes of header length, then the header",
            f"{min(size, len(head))} bytes",
            _INCOMPLETE,
        )
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise refuse(
            "header-too-large",
            f"{shown(name)} does not start like a safetensors file: its header would be {length} bytes",
            f"a header of at most {MAX_HEADER} bytes",
            f"a file that starts {head[:16]!r}",
            "check what the file is: a renamed pickle or a saved web page looks like this",
        )
    if 8 + length > size:
        raise refuse(
            "header-truncated",
            f"{shown(name)} is truncated: its header ends at byte {8 + length} but the file at byte {size}",
            f"at least {8 + length} bytes",
            f"{size} bytes",
            _INCOMPLETE,
        )
    return 8 + length


def parse_header(name: str, size: int, head: bytes, file: int = 0) -> Header:
    """The records of the file `name`, `size` bytes long, that starts with `head` (its header, or more).

    `file` is the index that the tensors will carry. Raises `InputError` with every problem found, up to
    `MAX_REPORTED` in full.
    """
    start = header_end(name, size, head)
    return _parse(name, size, start, blocks_of(head[:start]), file)


def _parse(name: str, size: int, start: int, blocks: Iterable[bytes], file: int) -> Header:
    """As `parse_header`; `blocks` are the `start` bytes of length field and header, and read once."""
    digest, problems = hashlib.sha256(), _Problems(name)
    reader = JsonReader(_json(name, start, blocks, digest), name, "header")
    reader.object()
    metadata: dict[str, str] = {}
    tensors: list[SourceTensor] = []
    for key, usual in reader.entries(_USUAL):
        if key == "__metadata__":
            metadata = _metadata(name, reader, problems)
            continue
        made: SourceTensor | Diagnostic | None = _usual(key, usual, start, file) if usual else None
        if made is None:
            made = _tensor(name, key, _entry(usual) if usual else reader.value(), start, file)
        if isinstance(made, SourceTensor):
            tensors.append(made)
        else:
            problems.add(made)
    reader.end()
    tensors.sort(key=lambda t: (t.begin, t.end, t.name))
    if not problems.tensors:  # else the holes are those of the tensors refused above
        for found in _layout_problems(name, size, start, tensors):
            problems.add(found)
    problems.refuse()
    return Header(SourceFile(name, size, "sha256:" + digest.hexdigest()), tuple(tensors), metadata)


def _json(name: str, start: int, blocks: Iterable[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    """The header's JSON, from blocks with the length field before it; all of them are digested."""
    done = 0
    for block in blocks:
        digest.update(block)
        yield block[8:] if done == 0 else block
        done += len(block)
    if done < start:  # the file shrank while it was read
        header_end(name, done, start.to_bytes(8, "little") if done >= 8 else b"")


def _metadata(name: str, reader: JsonReader, problems: _Problems) -> dict[str, str]:
    """`__metadata__`, which is read here; empty where it is not a map of text to text."""
    found: Any = {}
    if reader.opens():
        length = 0
        for key in reader.members():
            found[key] = reader.value()
            length += len(key) + len(found[key]) if type(found[key]) is str else 0
            if length > MAX_VALUE:
                raise reader.too_large(f"at most {MAX_VALUE} characters of `__metadata__`", "more")
    else:
        found = reader.value()
    if type(found) is not dict or not all(type(value) is str for value in found.values()):
        message = f"`__metadata__` of {shown(name)} is not a map of text to text"
        expected = "an object of strings"
        problems.add(problem("header-metadata", message, expected, reprlib.repr(found), _SAVE_AGAIN), of_a_tensor=False)
        return {}
    return found


class _Problems:
    """What is wrong with a file, the first in full and then a count, so that a damaged file of thousands of tensors stays
    readable. Of very many, the rest is not looked for.
    """

    def __init__(self, name: str) -> None:
        self._name, self._first, self._code = name, list[Diagnostic](), ""
        self._count = self.tensors = 0

    def add(self, found: Diagnostic, of_a_tensor: bool = True) -> None:
        self._count += 1
        self.tensors += of_a_tensor
        if len(self._first) < MAX_REPORTED:
            self._first.append(found)
        else:
            self._code = self._code or found.code
            if self._count == MAX_COUNTED:
                self.refuse(f"over {MAX_COUNTED - MAX_REPORTED}")

    def refuse(self, more: str | None = None) -> None:
        """Raises when there are any."""
        if self._code:
            message = f"{shown(self._name)} has {more or self._count - MAX_REPORTED} more problems like these"
            self._first.append(Diagnostic(self._code, message, None, (), _SAVE_AGAIN))
        if self._first:
            raise InputError(self._first)


def _usual(key: str, groups: Groups, start: int, file: int) -> SourceTensor | None:
    """The record of an entry in its usual spelling; None where something may be wrong with it."""
    code, extents, begin_text, end_text = groups
    known = DTYPES.get(code)
    if known is None:
        return None
    dtype, count = known
    shape = tuple(map(int, extents.split(","))) if extents else ()
    for extent in shape:
        count *= extent
    begin, end = int(begin_text), int(end_text)
    if count != end - begin or begin > end or end >= _LIMIT:
        return None
    return SourceTensor(key, dtype, shape, file, start + begin, start + end)


def _entry(groups: Groups) -> dict[str, Any]:
    """What `json` makes of the text."""
    dtype, shape, begin, end = groups
    extents = [int(extent) for extent in shape.split(",")] if shape else []
    return {"dtype": dtype, "shape": extents, "data_offsets": [int(begin), int(end)]}


def _where(key: str, name: str) -> str:
    return f"{shown(key)} in {shown(name)}"


def _tensor(name: str, key: str, entry: Any, start: int, file: int) -> SourceTensor | Diagnostic:
    """One entry of the header as a record, or what is wrong with it. Runs for every tensor."""
    if type(entry) is not dict or entry.keys() != _FIELDS:
        message = f"tensor {_where(key, name)} is not described as a tensor"
        found = f"an object of {listed(list(entry)) or 'nothing'}" if type(entry) is dict else reprlib.repr(entry)
        expected = "an object of `dtype`, `shape` and `data_offsets`"
        return problem("header-entry", message, expected, found, _SAVE_AGAIN)
    if not key.isprintable() and not is_text(key):
        message = f"the name of tensor {_where(key, name)} is not text"
        return problem("header-tensor-name", message, "text that UTF-8 can encode", shown(key), _SAVE_AGAIN)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = DTYPES.get(dtype) if type(dtype) is str else None
    if known is None:
        return _dtype_problem(_where(key, name), dtype)
    count = known[1]
    if type(shape) is list:
        for extent in shape:
            if type(extent) is not int or extent < 0 or count >= _LIMIT:
                count = -1
                break
            count *= extent
    if type(shape) is not list or not 0 <= count < _LIMIT:
        message = f"tensor {_where(key, name)} has an invalid shape"
        expected = "a list of non-negative integers, of less than 2^63 bytes together"
        return problem("header-shape", message, expected, reprlib.repr(shape), _SAVE_AGAIN)
    begin, end = offsets if type(offsets) is list and len(offsets) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < _LIMIT:
        message = f"tensor {_where(key, name)} has invalid data_offsets"
        expected = "[begin, end] with 0 <= begin <= end < 2^63"
        return problem("header-offsets", message, expected, reprlib.repr(offsets), _SAVE_AGAIN)
    if end - begin != count:
        message = f"tensor {_where(key, name)} has data_offsets that do not fit its dtype and shape"
        expected = f"{count} bytes, for {dtype} {reprlib.repr(shape)}"
        found = f"{end - begin} bytes, data_offsets {offsets}"
        return problem("header-size-mismatch", message, expected, found, _SAVE_AGAIN)
    return SourceTensor(key, known[0], tuple(shape), file, start + begin, start + end)


def _dtype_problem(where: str, dtype: Any) -> Diagnostic:
    if type(dtype) is str and dtype in SUB_BYTE:
        message = f"tensor {where} has elements smaller than a byte"
        found = f"{dtype}, {SUB_BYTE[dtype]} bits per element"
        help = "use a checkpoint that stores packed values as U8, as published mxfp4 checkpoints do"
        return problem("unsupported-dtype", message, "whole bytes per element", found, help)
    hint = did_you_mean(dtype[:40], DTYPES) if type(dtype) is str else None
    found = shown(dtype) if type(dtype) is str else reprlib.repr(dtype)
    expected = f"one of {', '.join(DTYPES)}"
    return problem("unknown-dtype", f"tensor {where} has an unknown dtype", expected, found, hint or _SAVE_AGAIN)


def _layout_problems(name: str, size: int, start: int, tensors: list[SourceTensor]) -> Iterator[Diagnostic]:
    """Overlaps, holes and a wrong end. `tensors` are sorted: each must begin where the one before it ends."""
    cursor, last = start, None  # the end of the bytes accounted for, and the tensor that ends there
    for tensor in tensors:
        if tensor.begin != cursor:
            overlap, before = tensor.begin < cursor, shown(last.name) if last else "the header"
            code = "header-overlap" if overlap else "header-gap"
            what = "overlaps" if overlap else "leaves unused bytes after"
            message = f"tensor {shown(tensor.name)} in {shown(name)} {what} {before}"
            expected = f"it begins at byte {cursor}, where {before} ends"
            found = f"it begins at byte {tensor.begin}"
            yield problem(code, message, expected, found, _SAVE_AGAIN)
        if tensor.end >= cursor:
            cursor, last = tensor.end, tensor
    if cursor > size:
        message = (
            f"{shown(name)} is truncated: its header declares tensor data through byte {cursor} "
            f"but the file is only {size} bytes"
        )
        yield problem("source-truncated", message, f"{cursor} bytes", f"{size} bytes", _INCOMPLETE)
    elif cursor < size:
        message = f"{shown(name)} has {size - cursor} bytes after its last tensor"
        expected = f"{cursor} bytes, where {shown(last.name) if last else 'the header'} ends"
        yield problem("header-trailing-bytes", message, expected, f"{size} bytes", _SAVE_AGAIN)

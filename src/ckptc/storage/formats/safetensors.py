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

import json
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ckptc.diagnostics import Diagnostic, InputError, Span, did_you_mean, fail
from ckptc.ir.source import SourceFile, SourceTensor
from ckptc.storage.source.files import MAX_HEADER, header_digest, is_text, problem, read_start, refuse, shown

MAX_REPORTED = 20  # problems spelled out per file; the rest are counted

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
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_LFS_MAGIC = b"version https://git-lfs"
_CONSTANT = re.compile(r'"(?:[^"\\]++|\\.)*+"|(NaN|-?Infinity)')  # strings first: one may say NaN


@dataclass(frozen=True, slots=True)
class Header:
    """What one file's header states."""

    file: SourceFile
    tensors: tuple[SourceTensor, ...]  # in the order of their bytes
    metadata: Mapping[str, str]  # `__metadata__`, empty when absent


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names for a message: the first few, then how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def read_header(path: Path, name: str | None = None, file: int = 0) -> Header:
    """Read and parse the header of the file at `path`; `name` is what records and messages call it.

    Raises as `read_start` (no such file, not readable) and as `parse_header`.
    """
    name = path.name if name is None else name
    size, head = read_start(path, name)
    return parse_header(name, size, head, file)


# -- JSON ----------------------------------------------------------------------------------------------------


def refuse_lfs_pointer(name: str, data: bytes) -> None:
    """Raise `lfs-pointer` when `data` is what git leaves in place of a large file it did not download.

    Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md, lines `version`, `oid`, `size`.
    """
    if not data.startswith(_LFS_MAGIC):
        return
    stated = re.search(rb"^size (\d{1,20})$", data[:1024], re.MULTILINE)
    raise refuse(
        "lfs-pointer",
        f"{shown(name)} is a Git LFS pointer, not the file itself",
        f"{stated[1].decode()} bytes" if stated else "the file's content",
        "the short text that stands for it until it is downloaded",
        "fetch the content with `git lfs pull`, or download the checkpoint with `hf download`",
    )


def strict_json(data: bytes, name: str, kind: str, span_file: str | None = None) -> dict[str, Any]:
    """The JSON object in `data`, with nothing left to interpretation.

    `kind` ("header", "index", "config") begins the codes of what is raised: `<kind>-json` for anything RFC
    8259 does not allow (NaN, Infinity, bytes that are not UTF-8) or that does not fit (nesting, numbers),
    `<kind>-duplicate-key`, `<kind>-not-object`. With `span_file` diagnostics carry the place in that text
    file.
    """
    text = ""
    duplicates: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            duplicates.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return made

    def invalid(reason: str, at: int | None = None) -> InputError:
        span, notes = None, ["expected: JSON as RFC 8259 defines it", f"found: {reason}"]
        if at is not None and span_file is not None:
            line_start = text.rfind("\n", 0, at) + 1
            span = Span(span_file, text.count("\n", 0, at) + 1, at - line_start + 1)
        elif at is not None:
            notes[1] += f" at character {at}: {text[max(0, at - 20) : at + 20]!r}"
        what = "the header of " if kind == "header" else ""
        help = "correct the file, or download it again from where the checkpoint was published"
        message = f"{what}{shown(name)} is not valid JSON"
        return fail(f"{kind}-json", message, span=span, notes=notes, help=help)

    def constant(word: str) -> NoReturn:
        at = next((m.start(1) for m in _CONSTANT.finditer(text) if m[1]), None)
        raise invalid(f"{word}, which is not a JSON number", at)

    def finite(digits: str) -> float:
        number = float(digits)
        if number in (float("inf"), float("-inf")):
            raise invalid(f"the number {digits[:40]}, too large for a float")
        return number

    refuse_lfs_pointer(name, data)
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=finite)
    except UnicodeDecodeError as error:
        raise invalid(f"byte 0x{data[error.start]:02x} at offset {error.start}, which is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise invalid(error.msg[:1].lower() + error.msg[1:], error.pos) from None
    except RecursionError:
        raise invalid("lists or objects nested too deeply to be read") from None
    except ValueError:  # Python bounds the digits of an integer
        raise invalid("an integer of thousands of digits") from None
    if duplicates:
        raise refuse(
            f"{kind}-duplicate-key",
            f"{shown(name)} gives the same key twice in one JSON object",
            "each key once",
            f"{listed(duplicates)} more than once",
            "keep one of them; which one is meant cannot be known from the file",
        )
    if type(value) is not dict:
        raise refuse(
            f"{kind}-not-object",
            f"{shown(name)} holds JSON that is not an object",
            "an object, {…}",
            reprlib.repr(value),
            "replace it with the file the checkpoint was published with",
        )
    return value


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
    if len(head) < start:  # the file shrank while it was read
        header_end(name, len(head), head)
    document = strict_json(head[8:start], name, "header")
    problems: list[Diagnostic] = []
    metadata = document.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        message = f"`__metadata__` of {shown(name)} is not a map of text to text"
        found = reprlib.repr(metadata)
        problems.append(problem("header-metadata", message, "an object of strings", found, _SAVE_AGAIN))
        metadata = {}
    tensors: list[SourceTensor] = []
    for key, entry in document.items():
        made = _tensor(name, key, entry, start, file)
        if isinstance(made, SourceTensor):
            tensors.append(made)
        else:
            problems.append(made)
    tensors.sort(key=lambda t: (t.begin, t.end, t.name))
    if len(tensors) == len(document):  # else the holes are those of the tensors refused above
        problems += _layout_problems(name, size, start, tensors)
    if problems:
        raise InputError(_bounded(name, problems))
    return Header(SourceFile(name, size, header_digest(head[:start])), tuple(tensors), metadata)


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


def _layout_problems(name: str, size: int, start: int, tensors: list[SourceTensor]) -> list[Diagnostic]:
    """Overlaps, holes and a wrong end. `tensors` are sorted: each must begin where the one before it ends."""
    problems = []
    cursor, last = start, None  # the end of the bytes accounted for, and the tensor that ends there
    for tensor in tensors:
        if tensor.begin != cursor:
            overlap, before = tensor.begin < cursor, shown(last.name) if last else "the header"
            code = "header-overlap" if overlap else "header-gap"
            what = "overlaps" if overlap else "leaves unused bytes after"
            message = f"tensor {shown(tensor.name)} in {shown(name)} {what} {before}"
            expected = f"it begins at byte {cursor}, where {before} ends"
            found = f"it begins at byte {tensor.begin}"
            problems.append(problem(code, message, expected, found, _SAVE_AGAIN))
        if tensor.end >= cursor:
            cursor, last = tensor.end, tensor
    if cursor > size:
        message = (
            f"{shown(name)} is truncated: its header declares tensor data through byte {cursor} "
            f"but the file is only {size} bytes"
        )
        problems.append(problem("source-truncated", message, f"{cursor} bytes", f"{size} bytes", _INCOMPLETE))
    elif cursor < size:
        message = f"{shown(name)} has {size - cursor} bytes after its last tensor"
        expected = f"{cursor} bytes, where {shown(last.name) if last else 'the header'} ends"
        problems.append(problem("header-trailing-bytes", message, expected, f"{size} bytes", _SAVE_AGAIN))
    return problems


def _bounded(name: str, problems: list[Diagnostic]) -> list[Diagnostic]:
    """At most `MAX_REPORTED` problems and a count: a damaged file of thousands of tensors stays readable."""
    if len(problems) <= MAX_REPORTED:
        return problems
    more = len(problems) - MAX_REPORTED
    last = problems[MAX_REPORTED]
    message = f"{shown(name)} has {more} more problems like these"
    return [*problems[:MAX_REPORTED], Diagnostic(last.code, message, None, (), _SAVE_AGAIN)]

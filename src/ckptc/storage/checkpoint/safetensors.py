"""Opening a checkpoint's directory: which files belong to it, what tensors they hold, its config.json.

    config.json ───────────────────────────────────────────────────────────────┐
    model.safetensors.index.json ─► the files it names ─┬─► headers ─► checks ─┴─► Checkpoint
    or, without one, the *.safetensors that lie there ──┘

The layout is the one that `save_pretrained` of transformers writes ("Big models" in its documentation): a
lone `model.safetensors`, or shards and an index whose `weight_map` says which file holds each tensor. Where
there is an index it decides, and other safetensors files are left alone: hubs publish a
`consolidated.safetensors` beside shards.

Headers are read, several at once, and samples of the weights, which tell these from others under the same headers.
Everything wrong with the directory is collected and raised together.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.source import Checkpoint, SourceFile, SourceTensor
from ckptc.storage.formats.json_stream import MAX_MEMBERS, JsonReader, refuse_lfs_pointer, strict_json
from ckptc.storage.formats.safetensors import Header, finish_header
from ckptc.storage.source.content import content_of
from ckptc.storage.source.files import (
    BLOCK,
    HEADER_THREADS,
    listed,
    open_regular,
    pread,
    problem,
    read_start,
    refuse,
    resolve,
    shown,
    unreadable,
)

CONFIG = "config.json"
MODELOPT, QUANTIZATION = "hf_quant_config.json", "quantization_config"
INDEX = "model.safetensors.index.json"
LONE = "model.safetensors"
# The largest published checkpoints have some 90,000 tensors in 200 files, an index of 10 MB, a config of 1 MB.
MAX_INDEX = 100_000_000  # bytes
MAX_CONFIG = 10_000_000  # bytes
MAX_HEADERS = 200_000_000  # bytes, of all files
MAX_FILES = 20_000
AHEAD = 256  # files whose first 64 KiB are held
SHOWN = 8  # names that a message lists
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # what `torch.save` is usually pointed at
_SHARD = re.compile(r"(.*)-([0-9]{1,6})-of-([0-9]{1,6})\.safetensors", re.DOTALL)
_USUAL = re.compile(r'[ \n]*"([^"\\\x00-\x1f]*)": ?"([^"\\\x00-\x1f]*)",')  # an entry of an index
_Read = TypeVar("_Read")


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of the checkpoint in `directory`. Tensors come in the order of files, then of bytes.

    `config` is empty when there is no config.json: whether it is needed is the mapping's business. Raises one
    `InputError` with every problem found.
    """
    entries = _entries(directory)
    problems: list[Diagnostic] = []
    config: Mapping[str, Any] = {}
    weight_map: Mapping[str, str] | None = None
    names: list[str] = []
    try:
        config = read_config(directory) or {}
    except InputError as error:
        problems += error.diagnostics
    try:
        weight_map = read_index(directory)
        names = _find_files(directory, entries, problems) if weight_map is None else sorted(set(weight_map.values()))
    except InputError as error:
        problems += error.diagnostics
    assigned: defaultdict[str, list[str]] = defaultdict(list)
    for tensor, name in (weight_map or {}).items():
        assigned[name].append(tensor)
    headers = _read_headers(directory, names, assigned, problems)
    tensors = _merge(names, headers, problems)
    if weight_map is not None:
        _compare_with_index(names, headers, tensors, assigned, problems)
    if problems:
        raise InputError(problems)
    return Checkpoint(_identified(directory, list(headers.values())), tensors, config)


def _identified(directory: Path, headers: Sequence[Header]) -> tuple[SourceFile, ...]:
    """The files, with what tells their content from others'."""

    def identified(header: Header) -> SourceFile:
        file = header.file
        return replace(file, content=content_of(resolve(directory, file.name), file.name))

    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        return tuple(threads.map(identified, headers))


def _entries(directory: Path) -> list[str]:
    """The names in a directory, sorted. Raises `missing-directory`, or `source-unreadable`."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise refuse(
            "missing-directory",
            f"{directory} is not a directory",
            "a directory with config.json and *.safetensors",
            "a file" if isinstance(error, NotADirectoryError) else "nothing",
            "give the directory that holds the weights",
        ) from None
    except OSError as error:
        raise unreadable(str(directory), error) from None


def _tensors(names: Sequence[str]) -> str:
    return f"tensor {shown(names[0])}" if len(names) == 1 else f"{len(names)} tensors"


# -- JSON files ----------------------------------------------------------------------------------------------


def _json_blocks(path: Path, name: str, kind: str, most: int) -> Iterator[bytes]:
    """The blocks of a JSON file of at most `most` bytes."""
    try:
        descriptor, size = open_regular(path, name)
    except InputError as error:
        raise InputError([_as_missing_file(one, []) for one in error.diagnostics]) from None
    try:
        if size > most:
            message = f"{shown(name)} is too large to be what its name says"
            help = "copy it again from where the checkpoint was published"
            raise refuse(f"{kind}-json", message, f"at most {most} bytes", f"{size} bytes", help)
        at = 0
        while block := pread(descriptor, min(BLOCK, size - at), at):
            if at == 0:
                refuse_lfs_pointer(name, block)
            yield block
            at += len(block)
    except OSError as error:
        raise unreadable(name, error) from None
    finally:
        os.close(descriptor)


def read_config(directory: Path) -> dict[str, Any] | None:
    """The object in config.json, None when there is no such file. Raises `missing-file` for a dangling link.

    Where it says nothing of quantisation and `hf_quant_config.json` does, as older uploads of modelopt have it, that is
    its `quantization_config`.
    """
    config = _read_config(directory, CONFIG)
    if config is None or QUANTIZATION in config:
        return config
    quantised = _read_config(directory, MODELOPT)
    found = (quantised or {}).get("quantization")
    if not isinstance(found, dict):
        return config
    return {**config, QUANTIZATION: {"quant_method": "modelopt", **found}}


def _read_config(directory: Path, name: str) -> dict[str, Any] | None:
    path = directory / name
    if not os.path.lexists(path):
        return None
    return strict_json(_json_blocks(path, name, "config", MAX_CONFIG), name, "config", str(path))


def read_index(directory: Path) -> dict[str, str] | None:
    """The index's `weight_map`, tensor name to file name; None when there is no index.

    Raises `index-invalid` for any other shape, and `missing-file` for a dangling link. The file names are judged when
    they are opened.
    """
    path = directory / INDEX
    if not os.path.lexists(path):
        return None
    reader = JsonReader(_json_blocks(path, INDEX, "index", MAX_INDEX), INDEX, "index", str(path))
    reader.object()
    weight_map: dict[str, str] = {}
    files: dict[str, str] = {}  # each name once, however many tensors are in the file
    found: str | None = "None"  # in place of a map of text to text
    for key in reader.members():
        if key != "weight_map":
            reader.value()
            continue
        if not reader.opens():
            found = reprlib.repr(reader.value())
            continue
        weight_map, wrong = {}, None
        for tensor, usual in reader.entries(_USUAL):
            name = usual[0] if usual else reader.value()
            if type(name) is str:
                weight_map[tensor] = files.setdefault(name, name)
            elif wrong is None:
                wrong = f"{shown(tensor)}: {reprlib.repr(name)}"
        found = wrong or (None if weight_map else "{}")
    reader.end()
    if found is not None:
        message = f"{shown(INDEX)} does not say which file holds each tensor"
        expected = "`weight_map`, an object that gives each tensor's name the name of a file"
        help = "copy the index again from where the checkpoint was published"
        raise refuse("index-invalid", message, expected, found, help)
    if len(files) > MAX_FILES:
        help = "check what the file is, and where it comes from"
        raise refuse(
            "index-invalid",
            f"{shown(INDEX)} names more files than any checkpoint has",
            f"at most {MAX_FILES} files",
            f"{len(files)} files",
            help,
        )
    return weight_map


# -- the directory without an index --------------------------------------------------------------------------


def _find_files(directory: Path, entries: Sequence[str], problems: list[Diagnostic]) -> list[str]:
    """`model.safetensors` if it is there, else every *.safetensors; in name order.

    Raises `pickle-checkpoint` or `no-safetensors` when there are none.
    """
    if LONE in entries:
        return [LONE]
    # Names with a leading dot are other programs' leavings, such as `._model.safetensors` of macOS archives.
    names = [entry for entry in entries if entry.endswith(".safetensors") and not entry.startswith(".")]
    if names:
        problems += _incomplete_series(names)
        return names
    pickles = [entry for entry in entries if entry.endswith(_PICKLES)]
    if pickles:
        raise refuse(
            "pickle-checkpoint",
            f"{directory} holds pickled weights, which are programs and are never opened",
            "*.safetensors",
            listed(pickles),
            "use a safetensors revision of the checkpoint, or save it again as safetensors with transformers",
        )
    help = "give the directory that holds the weights, or fetch them with `hf download`"
    if "snapshots" in entries:  # https://huggingface.co/docs/huggingface_hub/guides/manage-cache
        help = "this is a repository in the Hugging Face cache: give one of the directories in `snapshots`"
    raise refuse(
        "no-safetensors",
        f"{directory} holds no safetensors files",
        "model.safetensors, or *.safetensors with an index",
        listed(entries) or "nothing",
        help,
    )


def _incomplete_series(names: Sequence[str]) -> list[Diagnostic]:
    """`missing-file` where some of `…-00001-of-00004` and so on are absent; counting from 0 is allowed."""
    series: defaultdict[tuple[str, str, int], set[int]] = defaultdict(set)
    for name in names:
        if match := _SHARD.fullmatch(name):
            series[match[1], match[3], len(match[2])].add(int(match[2]))
    problems = []
    for (stem, total, width), present in series.items():
        first = 0 if 0 in present else 1
        numbers = range(first, int(total) + first)
        count = len(numbers) - sum(number in numbers for number in present)
        if count:
            absent = islice((number for number in numbers if number not in present), SHOWN)
            absent_names = [f"{stem}-{number:0{width}}-of-{total}.safetensors" for number in absent]
            message = f"{count} of {int(total)} numbered files do not exist: {listed(absent_names, SHOWN, count)}"
            found = f"{len(present)} of them, and no {shown(INDEX)}"
            help = "download the missing files, and the index"
            problems.append(problem("missing-file", message, f"{int(total)} files", found, help))
    return problems


# -- headers -------------------------------------------------------------------------------------------------


def _read_headers(
    directory: Path, names: Sequence[str], assigned: Mapping[str, Sequence[str]], problems: list[Diagnostic]
) -> dict[int, Header]:
    """The headers that could be read, by index into `names`."""

    def start(name: str) -> tuple[int, bytes] | InputError:
        try:
            return read_start(resolve(directory, name), name)
        except InputError as error:
            return error

    headers: dict[int, Header] = {}
    tensors = size = 0
    for file, (name, read) in enumerate(_ahead(start, names)):
        if isinstance(read, InputError):
            held = assigned.get(name, [])
            problems += [_as_missing_file(one, held) for one in read.diagnostics]
            continue
        length = int.from_bytes(read[1][:8], "little")
        size += length if length <= read[0] else 0  # else it is refused for that
        try:
            headers[file] = finish_header(resolve(directory, name), name, *read, file)
            tensors += len(headers[file].tensors)
        except InputError as error:
            problems += error.diagnostics
        if tensors > MAX_MEMBERS or size > MAX_HEADERS:
            found = f"{tensors} tensors, in {size} bytes of headers, in the first {file + 1} of {len(names)} files"
            help = "check what the files are, and where they come from"
            message = f"{shown(name)} and the files before it hold more than any checkpoint does"
            expected = f"at most {MAX_MEMBERS} tensors, in at most {MAX_HEADERS} bytes of headers"
            raise InputError([*problems, problem("header-too-large", message, expected, found, help)])
    return headers


def _ahead(read: Callable[[str], _Read], names: Sequence[str]) -> Iterator[tuple[str, _Read]]:
    """Each name with what `read` gives, in order. A few are read at once, and no more than some hundred are held."""
    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        for begin in range(0, len(names), AHEAD):
            some = names[begin : begin + AHEAD]
            yield from zip(some, threads.map(read, some), strict=True)


def _as_missing_file(found: Diagnostic, held: Sequence[str]) -> Diagnostic:
    """`source-missing` is for a file that was there once; one that an incomplete checkpoint lacks is
    `missing-file`. `held`: the tensors that the index says it holds.
    """
    if found.code != "source-missing":
        return found
    message = found.message
    if held:
        message += f", but {shown(INDEX)} says that it holds {_tensors(held)}"
    help = "the download is incomplete; fetch the checkpoint again with `hf download`"
    return Diagnostic("missing-file", message, None, found.notes, help)


def _merge(names: Sequence[str], headers: Mapping[int, Header], problems: list[Diagnostic]) -> dict[str, SourceTensor]:
    """The tensors of all files by name; `duplicate-tensor` for each pair of files that share some."""
    tensors: dict[str, SourceTensor] = {}
    shared: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for header in headers.values():
        for tensor in header.tensors:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                shared[first.file, tensor.file].append(tensor.name)
    for (first_file, file), both in shared.items():
        message = f"{shown(names[file])} and {shown(names[first_file])} both hold {_tensors(both)}"
        help = "remove the file that does not belong to the checkpoint, or add the index that leaves it out"
        problems.append(problem("duplicate-tensor", message, "each tensor in one file", listed(both), help))
    return tensors


def _compare_with_index(
    names: Sequence[str],
    headers: Mapping[int, Header],
    tensors: Mapping[str, SourceTensor],
    assigned: Mapping[str, Sequence[str]],
    problems: list[Diagnostic],
) -> None:
    """The index and the headers must state the same tensors for each file that could be read.

    `missing-tensor` for those only the index states, `unlisted-tensor` for those only a header states.
    """
    known = {tensor for held in assigned.values() for tensor in held}
    help = "the index and the files are from different downloads; fetch the checkpoint again"
    for file, header in headers.items():
        name = names[file]
        held = {tensor.name for tensor in header.tensors}
        absent = sorted(tensor for tensor in assigned[name] if tensor not in held)
        if absent:
            message = f"{shown(name)} lacks {_tensors(absent)} that {shown(INDEX)} says it holds"
            moved = [f"{shown(one)} in {shown(names[tensors[one].file])}" for one in absent if one in tensors]
            found = ", ".join(moved[:8]) or "not in any file that could be read"
            problems.append(problem("missing-tensor", message, listed(absent), found, help))
        unlisted = sorted(tensor for tensor in held if tensor not in known)
        if unlisted:
            message = f"{shown(name)} holds {_tensors(unlisted)} that {shown(INDEX)} does not list"
            problems.append(problem("unlisted-tensor", message, "all listed", listed(unlisted), help))

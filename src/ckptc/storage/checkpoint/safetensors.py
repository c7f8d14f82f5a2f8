"""Opening a checkpoint of safetensors files: which files belong to it, what tensors they hold, its config.json.

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

import re
import reprlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ckptc.diagnostics import Diagnostic, InputError
from ckptc.ir.source import Checkpoint, SourceFile, SourceTensor
from ckptc.storage.formats.json_stream import MAX_MEMBERS, JsonReader, refuse_lfs_pointer, strict_json
from ckptc.storage.formats.safetensors import Header, finish_header
from ckptc.storage.source.base import Source, as_source
from ckptc.storage.source.files import HEADER_THREADS, listed, problem, refuse, shown

CONFIG = "config.json"
MODELOPT, QUANTIZATION = "hf_quant_config.json", "quantization_config"
INDEX = "model.safetensors.index.json"
LONE = "model.safetensors"
# The largest published checkpoints have some 90,000 tensors in 200 files, an index of 10 MB, a config of 1 MB.
MAX_INDEX = 100_000_000  # bytes
MAX_CONFIG = 10_000_000  # bytes
MAX_HEADERS = 200_000_000  # bytes, of all files
MAX_FILES = 20_000
SHOWN = 8  # names that a message lists
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # what `torch.save` is usually pointed at
_SHARD = re.compile(r"(.*)-([0-9]{1,6})-of-([0-9]{1,6})\.safetensors", re.DOTALL)
_USUAL = re.compile(r'[ \n]*"([^"\\\x00-\x1f]*)": ?"([^"\\\x00-\x1f]*)",')  # an entry of an index


def open_checkpoint(source: Source | Path) -> Checkpoint:
    """Reads the headers of the checkpoint in a source, or a directory. Tensors come in the order of files, then of bytes.

    `config` is empty when there is no config.json: whether it is needed is the mapping's business. Raises one
    `InputError` with every problem found.
    """
    source = as_source(source)
    entries = source.names()
    problems: list[Diagnostic] = []
    config: Mapping[str, Any] = {}
    weight_map: Mapping[str, str] | None = None
    names: list[str] = []
    try:
        config = read_config(source) or {}
    except InputError as error:
        problems += error.diagnostics
    try:
        weight_map = read_index(source)
        names = _find_files(source, entries, problems) if weight_map is None else sorted(set(weight_map.values()))
    except InputError as error:
        problems += error.diagnostics
    assigned: defaultdict[str, list[str]] = defaultdict(list)
    for tensor, name in (weight_map or {}).items():
        assigned[name].append(tensor)
    headers = _read_headers(source, names, assigned, problems)
    tensors = _merge(names, headers, problems)
    if weight_map is not None:
        _compare_with_index(names, headers, tensors, assigned, problems)
    if problems:
        raise InputError(problems)
    name = str(source) if source.local is None else ""
    return Checkpoint(_identified(source, list(headers.values())), tensors, config, name)


def _identified(source: Source, headers: Sequence[Header]) -> tuple[SourceFile, ...]:
    """The files, with what tells their content from others'."""
    with ThreadPoolExecutor(HEADER_THREADS) as threads:
        return tuple(threads.map(lambda header: source.identified(header.file), headers))


def _tensors(names: Sequence[str]) -> str:
    return f"tensor {shown(names[0])}" if len(names) == 1 else f"{len(names)} tensors"


# -- JSON files ----------------------------------------------------------------------------------------------


def _json_blocks(source: Source, name: str, kind: str, most: int) -> Iterator[bytes] | None:
    """The blocks of a JSON file of at most `most` bytes; None where there is none. Raises `missing-file` for a dangling
    link."""
    found = source.read(name, most)
    return None if found is None else _checked(found, name, kind)


def _checked(blocks: Iterator[bytes], name: str, kind: str) -> Iterator[bytes]:
    first = True
    try:
        for block in blocks:
            if first:
                refuse_lfs_pointer(name, block)
            first = False
            yield block
    except InputError as error:
        raise InputError([_as_json(_as_missing_file(one, []), kind) for one in error.diagnostics]) from None


def _as_json(found: Diagnostic, kind: str) -> Diagnostic:
    return replace(found, code=f"{kind}-json") if found.code == "too-large" else found


def read_config(source: Source | Path) -> dict[str, Any] | None:
    """The object in config.json, None when there is no such file. Raises `missing-file` for a dangling link.

    Where it says nothing of quantisation and `hf_quant_config.json` does, as older uploads of modelopt have it, that is
    its `quantization_config`.
    """
    source = as_source(source)
    config = _read_config(source, CONFIG)
    if config is None or QUANTIZATION in config:
        return config
    quantised = _read_config(source, MODELOPT)
    found = (quantised or {}).get("quantization")
    if not isinstance(found, dict):
        return config
    return {**config, QUANTIZATION: {"quant_method": "modelopt", **found}}


def _read_config(source: Source, name: str) -> dict[str, Any] | None:
    blocks = _json_blocks(source, name, "config", MAX_CONFIG)
    return None if blocks is None else strict_json(blocks, name, "config", _path(source, name))


def _path(source: Source, name: str) -> str:
    """What diagnostics call a file."""
    return str(source.local / name) if source.local is not None else f"{source}/{name}"


def read_index(source: Source | Path) -> dict[str, str] | None:
    """The index's `weight_map`, tensor name to file name; None when there is no index.

    Raises `index-invalid` for any other shape, and `missing-file` for a dangling link. The file names are judged when
    they are opened.
    """
    source = as_source(source)
    blocks = _json_blocks(source, INDEX, "index", MAX_INDEX)
    if blocks is None:
        return None
    reader = JsonReader(blocks, INDEX, "index", _path(source, INDEX))
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


def _find_files(source: Source, entries: Sequence[str], problems: list[Diagnostic]) -> list[str]:
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
            f"{source} holds pickled weights, which are programs and are never opened",
            "*.safetensors",
            listed(pickles),
            "use a safetensors revision of the checkpoint, or save it again as safetensors with transformers",
        )
    help = "give the directory that holds the weights, or fetch them with `hf download`"
    if "snapshots" in entries:  # https://huggingface.co/docs/huggingface_hub/guides/manage-cache
        help = "this is a repository in the Hugging Face cache: give one of the directories in `snapshots`"
    raise refuse(
        "no-safetensors",
        f"{source} holds no safetensors files",
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
    source: Source, names: Sequence[str], assigned: Mapping[str, Sequence[str]], problems: list[Diagnostic]
) -> dict[int, Header]:
    """The headers that could be read, by index into `names`."""
    headers: dict[int, Header] = {}
    tensors = size = 0
    for file, (name, read) in enumerate(source.starts(names)):
        if isinstance(read, InputError):
            held = assigned.get(name, [])
            problems += [_as_missing_file(one, held) for one in read.diagnostics]
            continue
        length = int.from_bytes(read[1][:8], "little")
        size += length if length <= read[0] else 0  # else it is refused for that
        try:
            headers[file] = finish_header(source.header(name, read[1]), name, *read, file)
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

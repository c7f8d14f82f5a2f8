"""The original of a model on the Hub, as far as it is at hand: its config, the names and dtypes of its tensors, the
files beside them.

None of its weights are read: a directory with nothing but config.json and the tokenizer will do, and an index names
the tensors. A conversion keeps these files in its checkpoint, below `items/hf/`, so that an export needs nothing else:

    config.json, tokenizer and generation files     as they are at the source
    tensors.json                                    {"dtypes": {dtype: [names of the tensors that were converted]}}

They lie in `items`, since Orbax takes every directory beside it for an item of its own: its managers that restore all
items then refuse the step (orbax-checkpoint 0.11.26 to 0.12.8, both APIs).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckptc.diagnostics import InputError, fail
from ckptc.ir.saved import Original
from ckptc.ir.source import SourceFile, stated_dtype
from ckptc.storage.checkpoint.safetensors import CONFIG, INDEX, open_checkpoint, read_config, read_index
from ckptc.storage.checkpoint.steps import find_step, require_directory
from ckptc.storage.source.base import Source
from ckptc.storage.source.files import open_regular, pread, resolve

# What `save_pretrained` of tokenizers, processors and generation writes, and what publishers put beside it. Never
# weights.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.jinja",
    "*preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "LICENSE*",
    "NOTICE*",
)
KEPT = "hf"  # below the items of a checkpoint
TENSORS = "tensors.json"
MOST = 512 << 20  # bytes of a file that is kept: no tokenizer is larger
_BLOCK = 1 << 20


def find_original(given: Path) -> Path:
    """The directory with an original's files: the one given, or what a checkpoint that was given has kept.

    Raises `missing-directory`.
    """
    require_directory(given, "give the directory with the original's config.json")
    if not (given / CONFIG).exists():
        with suppress(InputError):
            kept = find_step(given).items / KEPT
            return kept if (kept / CONFIG).is_file() else given
    return given


def open_original(directory: Path, dims: Mapping[str, Any] | None = None) -> Original:
    """What is known of the original in `directory`. `dims`: sizes that a checkpoint was converted with.

    Raises `missing-directory`, `missing-config`, `orbax-json`, and what reading files raises.
    """
    require_directory(directory, "give the directory with the original's config.json")
    config = read_config(directory)
    if config is None:
        raise fail("missing-config", f"{directory} has no {CONFIG}", help="download the original's config.json into it")
    names = sorted(os.listdir(directory))
    dtypes: dict[str, str] | None = None
    if any(name.endswith(".safetensors") for name in names):
        dtypes = {name: t.dtype for name, t in open_checkpoint(directory).tensors.items()}
    elif INDEX in names:
        dtypes = dict.fromkeys(read_index(directory) or {}, stated_dtype(config))
    elif TENSORS in names:
        dtypes = _kept_dtypes(directory)
    companions = tuple(identify(directory, name) for name in names if _companion(directory, name))
    return Original(config, dtypes, companions, dims or {})


def _kept_dtypes(directory: Path) -> dict[str, str]:
    try:
        found = json.loads(_read(directory, TENSORS))["dtypes"]
        return {str(name): str(dtype) for dtype, names in found.items() for name in names}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        help = "copy the checkpoint again, or give the original with `--config-from DIR`"
        raise fail("orbax-json", f"{directory / TENSORS} does not list the tensors' dtypes", help=help) from None


def to_keep(source: Source) -> list[str]:
    """The files in a source that a checkpoint of it keeps. Raises what opening one of them raises."""
    directory = source.local
    if directory is None:
        return [name for name in source.names() if name == CONFIG or is_companion(name)]
    names = [CONFIG, *(name for name in sorted(os.listdir(directory)) if _companion(directory, name))]
    found = []
    for name in names:
        if (directory / name).is_file():
            descriptor, size = open_regular(resolve(directory, name), name)
            os.close(descriptor)
            found += [name] if size <= MOST else []
    return found


def kept(source: Source, names: Sequence[str], dtypes: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, bytes]]:
    """The files to keep, by their names below `items/hf/`. `names`: of `to_keep`; `dtypes`: tensors by dtype."""
    for name in names:
        yield name, b"".join(source.read(name, MOST) or ())
    yield TENSORS, json.dumps({"dtypes": dtypes}, indent=0).encode()


def _read(directory: Path, name: str) -> bytes:
    descriptor, size = open_regular(resolve(directory, name), name)
    try:
        return pread(descriptor, min(size, MOST), 0)
    finally:
        os.close(descriptor)


def _companion(directory: Path, name: str) -> bool:
    return is_companion(name) and (directory / name).is_file()


def is_companion(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)


def identify(directory: Path, name: str) -> SourceFile:
    """A file's size and the digest of all of it. Raises what `open_regular` raises."""
    descriptor, size = open_regular(resolve(directory, name), name)
    try:
        digest, at = hashlib.sha256(), 0
        while part := pread(descriptor, _BLOCK, at):
            digest.update(part)
            at += len(part)
    finally:
        os.close(descriptor)
    return SourceFile(name, size, "sha256:" + digest.hexdigest())

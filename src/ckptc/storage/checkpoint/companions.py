"""The original of a model on the Hub, as far as it is at hand: its config, the names and dtypes of its tensors, the
files beside them.

None of its weights are read: a directory with nothing but config.json and the tokenizer will do, and an index names
the tensors.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from pathlib import Path

from ckptc.diagnostics import fail
from ckptc.ir.saved import Original
from ckptc.ir.source import SourceFile
from ckptc.storage.checkpoint.safetensors import CONFIG, INDEX, open_checkpoint, read_config, read_index
from ckptc.storage.checkpoint.steps import require_directory
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
PLAIN = ("bfloat16", "float16", "float32")  # what a config may say of all tensors
_BLOCK = 1 << 20


def open_original(directory: Path) -> Original:
    """What is known of the original in `directory`. Raises `missing-directory`, `missing-config`, and what reading
    files raises.
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
        stated = str(config.get("torch_dtype") or config.get("dtype"))
        dtypes = dict.fromkeys(read_index(directory) or {}, stated if stated in PLAIN else "bfloat16")
    return Original(config, dtypes, tuple(identify(directory, name) for name in names if _companion(directory, name)))


def _companion(directory: Path, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS) and (directory / name).is_file()


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

"""Records of what a checkpoint holds, as its headers state it. Pure data: `ckptc.storage` reads them, `ckptc.compile` uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One shard file. `name` is relative to the checkpoint's directory, with forward slashes."""

    name: str
    size: int  # bytes
    header_digest: str  # "sha256:<hex>" of the 8-byte length and the JSON header, as stored
    content: str = ""  # what tells it from other weights under this header, such as "sampled-sha256:<hex>"; "": nothing


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a shard file. `begin` and `end` are absolute byte offsets in that file."""

    name: str
    dtype: str  # the canonical name, as numpy and ml_dtypes spell it: bfloat16, float32, float8_e4m3fn, uint8, int64, …
    shape: tuple[int, ...]
    file: int  # index into Checkpoint.files
    begin: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """What compile knows of a checkpoint: its files in name order, its tensors by name, its config.json."""

    files: tuple[SourceFile, ...]
    tensors: Mapping[str, SourceTensor]
    config: Mapping[str, Any]
    name: str = ""  # where it lies for every machine, such as hf://org/repo@commit; "" of a directory


DTYPE_KEYS = ("dtype", "torch_dtype")  # of a config.json; the second is the older, and wins
PLAIN = ("bfloat16", "float16", "float32")  # dtypes that weights are published in as they are


def stated_dtype(config: Mapping[str, Any]) -> str:
    """What a config.json says its tensors are, itself or in its section of the text model; else bfloat16."""
    section = config.get("text_config")
    places = (config, section) if isinstance(section, Mapping) else (config,)
    found = (str(place[key]) for place in places for key in reversed(DTYPE_KEYS) if place.get(key))
    return next((dtype for dtype in found if dtype in PLAIN), "bfloat16")

"""Records of an Orbax checkpoint, as its metadata states it. Pure data: `ckptc.storage` reads them, `ckptc.compile` uses
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from ckptc.ir.source import SourceFile
from ckptc.ops.types import itemsize

OPTIMIZER = ("opt_state", "optimizer")
_NO_PARAMETER = re.compile(r"rngs?|dropout.*|.*_rng", re.IGNORECASE)  # parts of paths, of states of random numbers
_COUNTERS = ("step", "count")  # the last parts, but for NNX's `value`


def is_parameter(path: Sequence[str]) -> bool:
    """Whether the array of this path in a training state is the model's: no optimizer's, no counter, no state of random
    numbers.
    """
    last = path[-2] if path[-1] == "value" and len(path) > 1 else path[-1]
    return path[0] not in OPTIMIZER and last not in _COUNTERS and not any(map(_NO_PARAMETER.fullmatch, path))


@dataclass(frozen=True, slots=True)
class SavedArray:
    """One array of the tree that was saved."""

    path: tuple[str, ...]  # keys as saved, list positions as digits
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]  # what is read and decoded as one; the last along an axis may reach beyond the array

    @property
    def name(self) -> str:
        """The path joined with slashes."""
        return "/".join(self.path)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Saved:
    """What compile knows of an Orbax checkpoint."""

    files: tuple[SourceFile, ...]  # metadata files; the digest is that of all of the file
    arrays: tuple[SavedArray, ...]  # in the order of their paths
    optimizer: int  # how many arrays of optimizer state there are besides
    custom: Mapping[str, Any] = field(default_factory=dict)  # `custom_metadata`, such as MaxText's `scan_layers`
    place: str = ""  # of the items below the directory that was given: `3/items`

    @property
    def converted(self) -> Mapping[str, Any]:
        """What a conversion by ckptc has noted: `model`, `family`, `dims`, `multimodal`; nothing of other checkpoints."""
        noted = self.custom.get("ckptc")
        return noted if isinstance(noted, dict) else {}

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def of(record: Mapping[str, Any]) -> Saved:
        """What was recorded."""
        files = tuple(SourceFile(**f) for f in record["files"])
        arrays = tuple(
            SavedArray(tuple(a["path"]), tuple(a["shape"]), a["dtype"], tuple(a["chunk"])) for a in record["arrays"]
        )
        return Saved(files, arrays, record["optimizer"], record["custom"], record["place"])


@dataclass(frozen=True)
class Original:
    """The checkpoint on the Hub that a model began as, as far as it is at hand."""

    config: Mapping[str, Any]
    dtypes: Mapping[str, str] | None  # of its tensors by name; None where neither headers nor an index are at hand
    companions: tuple[SourceFile, ...]  # tokenizer and generation files; the digest is that of all of the file
    dims: Mapping[str, Any] = field(default_factory=dict)  # that the checkpoint was converted with, where it says so

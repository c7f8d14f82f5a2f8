"""An Orbax checkpoint, read back box by box: opened by Orbax's own metadata, through TensorStore.

`items/_METADATA` names the tree's leaves and the storage drivers, `zarr.json` of each array its shape, dtype and
chunks. Nothing that was known when the checkpoint was written is used, so this reads what Orbax itself has written too.

Memory: what is asked for, chunks that a box only touches, and a cache of 32 MiB for the index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import InputError, fail
from ckptc.regular import open_file
from ckptc.storage.checkpoint.steps import MAX_JSON, METADATA, STEP_METADATA

_CACHE = 32 << 20  # bytes
Box = tuple[tuple[int, int], ...]  # [low, high) for each axis


@dataclass(frozen=True)
class RestoredArray:
    """One array of a checkpoint, as it is stored."""

    name: str  # path joined with slashes
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    store: Any  # tensorstore.TensorStore

    def start(self, box: Box) -> Pending:
        """Begins to read a box."""
        return Pending(self.name, self.store[tuple(slice(low, high) for low, high in box)].read())


@dataclass(frozen=True)
class Pending:
    """A box that is being read."""

    name: str
    future: Any

    def result(self) -> npt.NDArray[Any]:
        """The elements. Raises `damaged-output` when they cannot be read."""
        try:
            return np.asarray(self.future.result())
        except Exception as error:  # TensorStore has no common class: ValueError, OSError, and its own
            raise damaged(self.name, error) from None


def damaged(what: str, error: Exception) -> InputError:
    """`damaged-output`, to raise: in TensorStore's words, without its references to its own source."""
    reason = str(error).split(" [")[0]
    return fail("damaged-output", f"{what} cannot be read: {reason}", help="convert the checkpoint again")


def custom_metadata_of(step: Path) -> dict[str, Any]:
    """The custom metadata of a checkpoint; empty when there is none, or no checkpoint."""
    try:
        custom = _json(step / STEP_METADATA).get("custom_metadata")
    except InputError:
        return {}
    return custom if isinstance(custom, dict) else {}


def open_restored(items: Path) -> dict[str, RestoredArray]:
    """The arrays in a directory of items by name, without its scalar `step`. Raises `no-checkpoint`, `damaged-output`."""
    import tensorstore as ts

    metadata = _json(items / METADATA)
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "cache_pool#index": {"total_bytes_limit": _CACHE}})
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    opening = []
    leaves = metadata.get("tree_metadata")
    for leaf in leaves.values() if isinstance(leaves, dict) else ():
        keys = _keys(leaf)
        if keys is None:
            continue
        place = ".".join(keys)
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{items.absolute()}/"}
        if metadata.get("use_ocdbt"):
            kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{place}/", "cache_pool": "cache_pool#index"}
        else:
            kvstore["path"] += f"{place}/"
        spec = {"driver": driver, "kvstore": kvstore}
        opening.append(("/".join(keys), ts.open(spec, read=True, open=True, context=context)))
    out = {}
    for name, future in opening:
        try:
            store: Any = future.result()
        except Exception as error:
            raise damaged(name, error) from None
        chunk = tuple(int(n) for n in store.chunk_layout.read_chunk.shape)
        shape = tuple(int(n) for n in store.shape)
        out[name] = RestoredArray(name, shape, str(store.dtype.name), chunk, store)
    if not out:
        raise fail("damaged-output", f"{items} has no arrays", help="convert the checkpoint again")
    return out


def _keys(leaf: Any) -> list[str] | None:
    """The path of a leaf that is an array; None for scalars, and for places without a value."""
    try:
        if leaf["value_metadata"]["value_type"] not in ("jax.Array", "np.ndarray"):
            return None
        return [str(k["key"]) for k in leaf["key_metadata"]]
    except (KeyError, TypeError):
        return None


def _json(path: Path) -> Mapping[str, Any]:
    help = "is it a checkpoint, and did the run that wrote it end?"
    try:
        with open_file(path) as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise fail("damaged-output", f"{path} is too large to be metadata")
        found = json.loads(data)
    except OSError as error:
        raise fail("no-checkpoint", f"cannot read {path}: {error.strerror}", help=help) from None
    except (ValueError, RecursionError):
        raise fail("damaged-output", f"{path} is not JSON", help=help) from None
    if not isinstance(found, dict):
        raise fail("damaged-output", f"{path} is not a JSON object", help=help)
    return found

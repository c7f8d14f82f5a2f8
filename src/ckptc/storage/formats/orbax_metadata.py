"""What an Orbax checkpoint says of its arrays, as JSON: the tree, the shardings, the shapes of shards and chunks.

Field names and values are what orbax-checkpoint 0.12.8 writes for MaxText's train state.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptc.storage.formats import zarr3

Mesh = tuple[tuple[str, int], ...]  # axes of a device mesh and their sizes; devices are numbered row-major

AXIS = "checkpoint_sharding_axis"  # the mesh axis that MaxText's converter shards along
ONE_DEVICE: Mesh = ((AXIS, 1),)
_DICT_KEY = 2  # Orbax's KeyType.DICT


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of the checkpoint."""

    path: tuple[str, ...]  # keys of the nested dicts: ("params", "params", "decoder", "decoder_norm", "scale")
    shape: tuple[int, ...]
    dtype: str  # as numpy and ml_dtypes spell it: bfloat16, float32, int32, float8_e4m3fn, …
    chunk: tuple[int, ...]  # elements of a storage chunk; chunks at the edge are stored whole
    partition: tuple[int, ...]  # shards along each axis, for the metadata
    spec: tuple[tuple[str, ...], ...] | None = None  # of each axis, mesh axes that shard it; None: AXIS, where it is
    order: tuple[int, ...] | None = None  # axes, slowest first, as chunks are stored; None: as they are
    compression: str = "none"  # of chunks, as `ckptc.storage.formats.compression` has it

    @property
    def name(self) -> str:
        """Orbax's name of the array: its path joined with dots."""
        return ".".join(self.path)

    @property
    def shard(self) -> tuple[int, ...]:
        """The shape of one shard, "write_shape" in Orbax's words."""
        return zarr3.grid(self.shape, self.partition)


def tree_metadata(arrays: Sequence[ArraySpec]) -> dict[str, Any]:
    """`_METADATA` of MaxText's train state: a scalar `step`, the arrays, an `opt_state` without leaves."""
    array: dict[str, Any] = {"value_type": "jax.Array", "skip_deserialize": False}
    values: dict[tuple[str, ...], dict[str, Any]] = {
        ("step",): {"value_type": "scalar", "skip_deserialize": False},
        **{a.path: array | {"write_shape": a.shard} for a in arrays},
        ("opt_state",): {"value_type": "Dict", "skip_deserialize": True},
    }
    leaves = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in path],
            "value_metadata": value,
        }
        for path, value in values.items()
    }
    return {
        "tree_metadata": leaves,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def sharding_metadata(arrays: Sequence[ArraySpec], mesh: Mesh = ONE_DEVICE) -> dict[str, str]:
    """`_sharding`: by the base64 of its name, what Orbax records of an array that the devices of a mesh hold.

    It matters to a restore that is given no sharding. Orbax then wants devices of the recorded ids: a
    checkpoint that records 16, Orbax's own too, cannot be restored that way on a smaller machine. Every
    machine has a device 0, hence one device by default, which is also what MaxText's converter records when
    it has one. The partition spec names the axis to shard in any case.
    """
    names, sizes = [name for name, _ in mesh], [size for _, size in mesh]
    devices: list[Any] = [{"id": i} for i in range(prod(sizes))]
    for size in reversed(sizes[1:]):  # nested as the mesh is
        devices = [devices[i : i + size] for i in range(0, len(devices), size)]
    named = {}
    for a in arrays:
        sharding = {
            "sharding_type": "NamedSharding",
            "shape": sizes,
            "axis_names": names,
            "axis_types": ["AxisType.Auto"] * len(mesh),
            "partition_spec": _partition_spec(a),
            "device_mesh": {"mesh": devices},
        }
        named[base64.b64encode(a.name.encode()).decode()] = json.dumps(sharding)
    return dict(sorted(named.items()))


def _partition_spec(a: ArraySpec) -> list[str | list[str] | None]:
    """As JAX has it: None, one axis, or several. Of a spec that was given, trailing Nones stay."""
    if a.spec is not None:
        return [None if not over else over[0] if len(over) == 1 else list(over) for over in a.spec]
    axes: list[str | list[str] | None] = [AXIS if n > 1 else None for n in a.partition]
    while axes[1:] and axes[-1] is None:
        axes.pop()
    return axes


def array_metadatas(arrays: Sequence[ArraySpec]) -> dict[str, Any]:
    """`array_metadatas/process_K`: the shapes of a shard and of a chunk of each array."""
    shapes = [{"param_name": a.name, "write_shape": a.shard, "chunk_shape": a.chunk} for a in arrays]
    return {"array_metadatas": [{"array_metadata": {**s, "ext_metadata": None}} for s in shapes]}

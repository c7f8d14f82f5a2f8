"""Compression of chunks, as zarr v3's codecs: their metadata, and chunks' bytes as TensorStore encodes them.

    none         a chunk is its elements' bytes
    zstd:LEVEL   the codec `zstd` of the zarr extensions, level 1 to 22; Orbax itself has level 3
    blosc-lz4    the codec `blosc`: the elements' bits transposed, so that equal exponents stand together, then LZ4

A chunk is encoded by writing it to an array of one chunk in TensorStore's memory, and taking the value from there: so
the bytes are TensorStore's own, and no compressor is needed besides. TensorStore copies nothing on the way in.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

NONE = "none"
_BLOSC = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
_KEY = "c/0"  # of the only chunk


def codecs(compression: str, itemsize: int) -> list[dict[str, Any]]:
    """The codecs that follow `bytes`, as TensorStore writes them in `zarr.json`. `itemsize`: bytes of an element.

    Raises:
        ValueError: an unknown compression.
    """
    name, _, level = compression.partition(":")
    if compression == NONE:
        return []
    if name == "zstd" and level.isdecimal():
        return [{"name": "zstd", "configuration": {"level": int(level), "checksum": False}}]
    if compression == "blosc-lz4":
        return [{"name": "blosc", "configuration": {**_BLOSC, "typesize": itemsize}}]
    raise ValueError(f"{compression} is no compression")


class Encoder:
    """Encodes chunks. Not for several threads.

    TensorStore, which starts threads, is loaded by the first chunk: workers are forked before.
    """

    def __init__(self) -> None:
        # By compression, bytes of a chunk, bytes of an element: the array, and its values as they are stored.
        self._stores: dict[tuple[str, int, int], tuple[Any, Any]] = {}
        self._context: Any = None

    def encode(self, compression: str, data: memoryview, itemsize: int) -> memoryview:
        """The bytes to store for a chunk: `data` are its elements' bytes, of `itemsize` bytes each."""
        key = compression, data.nbytes, itemsize
        if key not in self._stores:
            self._stores[key] = self._open(*key)
        store, values = self._stores[key]
        elements: npt.NDArray[np.uint8] = np.frombuffer(data, dtype=np.uint8)
        # Nothing refers to the elements once they are encoded: there is no cache.
        store.write(elements, can_reference_source_data_indefinitely=True).result()
        encoded = memoryview(values[_KEY])
        del values[_KEY]
        return encoded

    def _open(self, compression: str, count: int, itemsize: int) -> tuple[Any, Any]:
        import tensorstore as ts

        if self._context is None:
            # No more threads than this one works: each worker has a core.
            limits = {"data_copy_concurrency": {"limit": 1}, "cache_pool": {"total_bytes_limit": 0}}
            self._context = ts.Context(limits)
        metadata = {
            "shape": [count],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [count]}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [{"name": "bytes"}, *codecs(compression, itemsize)],
            "fill_value": 0,
        }
        store = ts.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "memory", "path": f"{compression}/{count}/{itemsize}/"},
                "metadata": metadata,
                "store_data_equal_to_fill_value": True,
                "create": True,
            },
            context=self._context,
        ).result()
        return store, store.kvstore

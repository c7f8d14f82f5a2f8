"""Compressed chunks are those that TensorStore makes, and checkpoints of them are Orbax's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from ckptc.storage.checkpoint import orbax_writer as orbax
from ckptc.storage.checkpoint.orbax_writer import ItemsWriter
from ckptc.storage.formats import compression, zarr3
from ckptc.storage.formats.compression import Encoder, codecs
from ckptc.storage.formats.orbax_metadata import ArraySpec
from ckptc.storage.sink.directory import Directory
from restoring import v1_load

COMPRESSIONS = ("zstd:3", "zstd:22", "blosc-lz4")
SHAPE, CHUNK = (64, 96), (32, 48)


def weights(shape: Sequence[int], dtype: str) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(7)
    return np.asarray(rng.standard_normal(shape) * 20).astype(zarr3.numpy_dtype(dtype))


def tensorstores(spec: dict[str, Any], expected: np.ndarray[Any, Any]) -> ts.TensorStore:
    store = ts.open({"driver": "zarr3", "kvstore": "memory://", **spec}, create=True).result()
    store.write(expected).result()
    return store


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn", "int64"])
def test_chunks_and_metadata_are_what_tensorstore_stores(name: str, dtype: str) -> None:
    expected = weights(SHAPE, dtype)
    array, encoder = zarr3.Array("w", SHAPE, dtype, CHUNK, compression=name), Encoder()
    grid = {"name": "regular", "configuration": {"chunk_shape": CHUNK}}
    chain = [zarr3.bytes_codec(dtype), *codecs(name, expected.itemsize)]
    metadata = {"shape": SHAPE, "chunk_grid": grid, "data_type": dtype, "codecs": chain}
    stored = tensorstores({"metadata": metadata}, expected).kvstore
    assert stored["zarr.json"] == array.metadata
    for i, j in np.ndindex(2, 2):
        part = expected[i * 32 : i * 32 + 32, j * 48 : j * 48 + 48]
        encoded = encoder.encode(name, array.data((i, j), part), array.itemsize)
        assert bytes(encoded) == stored[f"c/{i}/{j}"]
    assert len(stored["c/0/0"]) < 32 * 48 * array.itemsize or array.itemsize == 1


def test_a_chunk_is_encoded_as_it_is_now_and_nothing_stays_in_memory() -> None:
    encoder, data = Encoder(), bytearray(1000)
    zeros = bytes(encoder.encode("zstd:3", memoryview(data), 2))
    data[:] = bytes(range(250)) * 4
    other = bytes(encoder.encode("zstd:3", memoryview(data), 2))
    assert zeros != other, "a chunk of zeros is stored, and the buffer's new content seen"
    (_, values) = encoder._stores["zstd:3", 1000, 2]
    assert values.list().result() == [b"zarr.json"]


@pytest.mark.parametrize("name", ["zstd", "zstd:x", "lz4", "blosc", ""])
def test_other_compressions_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no compression"):
        codecs(name, 2)


def test_tensorstore_is_loaded_by_the_first_chunk_alone() -> None:
    script = "import sys, ckptc.storage.checkpoint.orbax_writer; sys.exit('tensorstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    script = "import sys; from ckptc.storage.formats.compression import Encoder; Encoder(); sys.exit('tensorstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# -- checkpoints ---------------------------------------------------------------------------------------------

PLAIN = (
    ArraySpec(("params", "params", "w"), (70, 40), "bfloat16", (32, 40), (1, 1)),
    ArraySpec(("params", "params", "v"), (12,), "float32", (4,), (1,)),
    ArraySpec(("params", "params", "s"), (), "float32", (), ()),
)
INDICES = [(0, (i, 0)) for i in range(3)] + [(1, (i,)) for i in range(3)] + [(2, ())]


def specs(name: str) -> tuple[ArraySpec, ...]:
    return tuple(replace(a, compression=name) for a in PLAIN)


def put(writer: ItemsWriter, array: int, index: tuple[int, ...]) -> orbax.Entry:
    a = PLAIN[array]
    box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, a.chunk, strict=True))
    return writer.write_chunk(array, index, np.asarray(weights(a.shape, a.dtype)[box]))


def finished(directory: Path, name: str) -> Path:
    orbax.finish(Directory(directory), specs(name), custom_metadata={}, final="0")
    return directory


def assert_restored(directory: Path) -> None:
    for tree in (
        ocp.StandardCheckpointer().restore(directory / "items"),
        v1_load(directory),
    ):
        for a in PLAIN:
            found = tree["params"]["params"][a.path[-1]]
            assert np.asarray(found).tobytes() == weights(a.shape, a.dtype).tobytes(), a.name


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_restores_compressed_arrays(tmp_path: Path, name: str) -> None:
    writer = ItemsWriter(Directory(tmp_path), specs(name))
    entries = [put(writer, *where) for where in INDICES]
    writer.close()
    assert_restored(finished(tmp_path, name))
    assert [e.offset for e in entries] == np.cumsum([0, *(e.length for e in entries)])[:-1].tolist()
    assert entries[0].length < 32 * 40 * 2


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_threads_compress_at_the_same_time(tmp_path: Path) -> None:
    writer = ItemsWriter(Directory(tmp_path), specs("zstd:3"))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda where: put(writer, *where), INDICES))
    writer.close()
    assert_restored(finished(tmp_path, "zstd:3"))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_new_writer_goes_on_after_compressed_chunks(tmp_path: Path) -> None:
    writer = ItemsWriter(Directory(tmp_path), specs("blosc-lz4"))
    for where in INDICES[:4]:
        put(writer, *where)
    state = writer.state()
    put(writer, *INDICES[4])  # and is cut off: no journal records it
    again = ItemsWriter(Directory(tmp_path), specs("blosc-lz4"), resume=state)
    for where in INDICES[4:]:
        put(again, *where)
    again.close()
    assert_restored(finished(tmp_path, "blosc-lz4"))


def test_chunks_of_another_compression_are_an_error(tmp_path: Path) -> None:
    writer = ItemsWriter(Directory(tmp_path), specs("blosc-lz4"))
    for where in INDICES:
        put(writer, *where)
    writer.close()
    with pytest.raises(RuntimeError, match="is not that of the arrays to finish"):
        finished(tmp_path, "zstd:3")
    with pytest.raises(RuntimeError):
        finished(tmp_path, compression.NONE)

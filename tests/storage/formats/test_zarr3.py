"""zarr v3 as TensorStore writes and reads it: metadata text, keys, the bytes of chunks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import tensorstore as ts

from ckptc.storage.formats import zarr3

SOME_DTYPES = [
    "bfloat16",
    "float32",
    "int32",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "uint8",
    "bool",
    "complex64",
]
SHAPES = [((), ()), ((7,), (7,)), ((7, 5, 3), (2, 5, 2)), ((4, 6), (4, 3)), ((3,), (8,)), ((1, 1), (1, 1))]


def values(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(7)
    return np.asarray(rng.integers(0, 2 if dtype == "bool" else 100, shape)).astype(zarr3.numpy_dtype(dtype))


def tensorstore_metadata(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    return {"shape": shape, "chunk_grid": grid, "data_type": dtype, "codecs": [{"name": "bytes"}]}


@pytest.mark.parametrize("dtype", sorted(zarr3.DTYPES))
@pytest.mark.parametrize(("shape", "chunk"), SHAPES)
def test_metadata_is_tensorstores_own_text(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> None:
    spec = {"driver": "zarr3", "kvstore": "memory://", "metadata": tensorstore_metadata(shape, dtype, chunk)}
    array = ts.open(spec, create=True).result()
    assert array.kvstore.read("zarr.json").result().value == zarr3.array_metadata(shape, dtype, chunk)


def test_other_codecs_can_be_stated() -> None:
    codecs = [
        zarr3.bytes_codec("float32"),
        {"name": "zstd", "configuration": {"checksum": False, "level": 3}},
    ]
    metadata = tensorstore_metadata((4,), "float32", (2,)) | {"codecs": codecs}
    array = ts.open({"driver": "zarr3", "kvstore": "memory://", "metadata": metadata}, create=True).result()
    stored = array.kvstore.read("zarr.json").result().value
    assert stored == zarr3.array_metadata((4,), "float32", (2,), codecs=codecs)


def test_orbaxs_codecs_can_be_stated() -> None:
    inner = [
        zarr3.bytes_codec("bfloat16"),
        {"name": "zstd", "configuration": {"checksum": False, "level": 3}},
    ]
    index = [zarr3.bytes_codec("uint64"), {"name": "crc32c"}]
    configuration = {"chunk_shape": [48], "codecs": inner, "index_codecs": index}
    sharding = [{"name": "sharding_indexed", "configuration": configuration}]
    # What Orbax 0.12.8 stored for an array of 48 elements.
    assert zarr3.array_metadata((48,), "bfloat16", (48,), codecs=sharding) == (
        b'{"chunk_grid":{"configuration":{"chunk_shape":[48]},"name":"regular"},"chunk_key_encoding":'
        b'{"name":"default"},"codecs":[{"configuration":{"chunk_shape":[48],"codecs":[{"configuration":'
        b'{"endian":"little"},"name":"bytes"},{"configuration":{"checksum":false,"level":3},"name":"zstd"}],'
        b'"index_codecs":[{"configuration":{"endian":"little"},"name":"bytes"},{"name":"crc32c"}]},'
        b'"name":"sharding_indexed"}],"data_type":"bfloat16","fill_value":0.0,"node_type":"array",'
        b'"shape":[48],"zarr_format":3}'
    )


@pytest.mark.parametrize("dtype", SOME_DTYPES)
@pytest.mark.parametrize(("shape", "chunk"), SHAPES)
def test_tensorstore_reads_the_chunks(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]) -> None:
    array, expected = zarr3.Array("w", shape, dtype, chunk), values(shape, dtype)
    context = ts.Context()
    store = ts.KvStore.open("memory://", context=context).result()
    store.write(array.metadata_key, array.metadata).result()
    for index in itertools.product(*map(range, array.grid)):
        part = expected[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))]
        store.write(array.key(index), bytes(array.data(index, np.asarray(part)))).result()
    read = ts.open({"driver": "zarr3", "kvstore": "memory://w/"}, context=context).result().read().result()
    assert read.dtype == expected.dtype and read.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", SOME_DTYPES)
@pytest.mark.parametrize(("shape", "chunk"), SHAPES)
def test_chunks_are_the_bytes_that_tensorstore_stores(
    shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...]
) -> None:
    array, expected = zarr3.Array("w", shape, dtype, chunk), values(shape, dtype)
    metadata = tensorstore_metadata(shape, dtype, chunk)
    spec = {"driver": "zarr3", "kvstore": "memory://w/", "metadata": metadata}
    stored = ts.open(spec | {"store_data_equal_to_fill_value": True}, create=True).result()
    stored.write(expected).result()
    keys = [f"w/{key.decode()}" for key in stored.kvstore.list().result() if key != b"zarr.json"]
    assert sorted(keys) == sorted(array.keys())
    for index in itertools.product(*map(range, array.grid)):
        part = expected[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))]
        raw = stored.kvstore.read(array.key(index).removeprefix("w/")).result().value
        assert raw == bytes(array.data(index, np.asarray(part)))


def test_contiguous_data_is_not_copied() -> None:
    array = zarr3.Array("w", (4, 6), "bfloat16", (2, 6))
    whole = values((2, 6), "bfloat16")
    assert np.shares_memory(np.frombuffer(array.data((0, 0), whole), np.uint8), whole.view(np.uint8))
    raw = bytearray(24)
    array.data((1, 0), memoryview(raw))[0] = 7
    assert raw[0] == 7


def test_strided_data_is_stored_in_row_major_order() -> None:
    array = zarr3.Array("w", (4, 6), "float32", (4, 6))
    transposed = values((6, 4), "float32").T
    assert bytes(array.data((0, 0), transposed)) == np.ascontiguousarray(transposed).tobytes()


@pytest.mark.parametrize(
    "data",
    [
        memoryview(bytes(23)),
        memoryview(bytes(25)),
        np.zeros((3, 2), np.float32),  # the bytes fit, the shape does not
        np.zeros((2, 3), np.float64),
        np.zeros((2, 3), ">f4"),
        np.zeros((2, 2), np.float32),  # a part, but of a chunk that is not at the edge
    ],
)
def test_data_of_another_form_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"chunk \(0, 0\) of w"):
        zarr3.Array("w", (5, 5), "float32", (2, 3)).data((0, 0), data)


def test_parts_at_the_edge_are_padded_with_zeros() -> None:
    array = zarr3.Array("w", (5, 5), "float32", (2, 3))
    padded = np.frombuffer(array.data((2, 1), np.ones((1, 2), np.float32)), np.float32).reshape(2, 3)
    assert padded.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_keys_and_cells_agree() -> None:
    chunks = zarr3.Chunks([zarr3.Array("v", (5,), "int8", (2,)), zarr3.Array("w", (5, 22, 1), "int8", (2, 2, 1))])
    array = chunks.arrays[1]
    assert array.grid == (3, 11, 1)
    for cell, (key, index) in enumerate(zip(array.keys(), np.ndindex(array.grid), strict=True)):
        assert array.key(index) == key and array.cell(index) == cell
        assert chunks.locate(key) == (1, cell)
    assert array.key((2, 10, 0)) == "w/c/2/10/0"


@pytest.mark.parametrize("key", ["w/c/3", "w/c/-1", "w/c", "w/c/0/0", "w/c/x", "u/c/0", "w/zarr.json", "w/d/0", "w"])
def test_keys_of_no_chunk_are_refused(key: str) -> None:
    with pytest.raises(ValueError):
        zarr3.Chunks([zarr3.Array("w", (3,), "int8", (1,))]).locate(key)


def test_arrays_come_in_the_order_of_their_keys() -> None:
    names = ["a.b", "a.b.c", "a.b-c", "a", "a.b0"]
    chunks = zarr3.Chunks([zarr3.Array(name, (12,), "int8", (1,)) for name in names])
    for name, i in itertools.product(names, range(12)):
        chunks.add(f"{name}/c/{i}", 100 + i, 1, file=3)
    keys = []
    for array, there in chunks.by_key():
        assert [place for _, *place in sorted(there, key=lambda cell: cell[1])] == [[100 + i, 1, 3] for i in range(12)]
        keys += [*(key for key, *_ in there), array.metadata_key.encode()]
    assert keys == sorted(keys)
    assert len(keys) == len(names) * 13


@pytest.mark.parametrize(
    ("shape", "dtype", "chunk", "message"),
    [
        ((4,), "float32", (0,), "do not fit"),
        ((4, 4), "float32", (4,), "do not fit"),
        ((4,), "float12", (4,), "`float12` is not a zarr v3 data type; known are bfloat16, bool"),
    ],
)
def test_arrays_that_zarr_cannot_hold_are_refused(
    shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        zarr3.Array("w", shape, dtype, chunk)


@pytest.mark.parametrize("name", ["", "a/b"])
def test_names_that_keys_cannot_begin_with_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of an array"):
        zarr3.Array(name, (1,), "int8", (1,))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint8"])
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 2, 1), (0, 1, 2)])
def test_chunks_may_be_stored_with_their_axes_in_another_order(order: tuple[int, ...], dtype: str) -> None:
    """Those at the edge, too: TensorStore reads what was given."""
    shape, chunk, expected = (7, 5, 3), (2, 5, 2), values((7, 5, 3), dtype)
    ours = zarr3.Array("w", shape, dtype, chunk, order)
    store = ts.KvStore.open("memory://").result()
    store.write("zarr.json", ours.metadata).result()
    for index in itertools.product(*map(range, ours.grid)):
        box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))
        store.write(zarr3.chunk_key(index), bytes(ours.data(index, expected[box]))).result()
    array = ts.open({"driver": "zarr3"}, kvstore=store, open=True).result()
    found = np.asarray(array.read().result())
    assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes()

"""Plain arrays are read from their files as TensorStore reads them: any box, chunk by chunk, whatever is missing; and
an index that lies is found out.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptc.diagnostics import InputError
from ckptc.storage.checkpoint import orbax_chunks, orbax_index
from ckptc.storage.checkpoint.orbax_chunks import PlainReader
from ckptc.storage.checkpoint.orbax_index import PlainIndex, layout_of, list_chunks
from ckptc.storage.formats import ocdbt
from ckptc.storage.formats.zarr3 import array_metadata, numpy_dtype

SHARD_INDEX = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def codecs(dtype: str, order: list[int] | None, inner: list[int] | None) -> list[dict[str, Any]]:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    out = [{"name": "transpose", "configuration": {"order": order}}] if order else []
    out += [little]
    if inner is None:
        return out
    configuration = {"chunk_shape": inner, "codecs": out, "index_codecs": SHARD_INDEX}
    return [{"name": "sharding_indexed", "configuration": configuration}]


def create(
    root: Path,
    name: str,
    shape: list[int],
    chunk: list[int],
    dtype: str = "float32",
    order: list[int] | None = None,
    inner: list[int] | None = None,
    **config: Any,
) -> Any:
    """An array in an OCDBT database, made by TensorStore. `config`: of the database."""
    store = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{root}/"},
        "path": f"{name}/",
        "config": {"compression": {"id": "zstd"}, **config},
    }
    metadata = {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": codecs(dtype, order, inner),
    }
    return ts.open({"driver": "zarr3", "kvstore": store, "metadata": metadata}, create=True, open=True).result()


def values(shape: list[int], dtype: str) -> Any:
    bits = np.random.default_rng(7).integers(1, 100, shape)
    return bits.astype(numpy_dtype(dtype))


def read(reader: PlainReader, name: str, axes: list[tuple[int, int, int]], dtype: str, as_stored: bool = False) -> Any:
    order = (reader.order(tuple(name.split("."))) if as_stored else None) or tuple(range(len(axes)))
    out = np.full([axes[a][2] for a in order], 99, numpy_dtype(dtype)).transpose(np.argsort(order))
    reader.read(tuple(name.split(".")), axes, out)
    return out


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(0, 3))
    sizes = st.integers(1, 9)
    shape = [draw(sizes) for _ in range(rank)]
    chunk = [draw(st.integers(1, 6)) for _ in range(rank)]
    sharded = draw(st.booleans())
    per = [draw(st.integers(1, 3)) for _ in range(rank)]
    axes = []
    for n in shape:
        start, stride = draw(st.integers(0, n - 1)), draw(st.integers(1, 3))
        axes.append((start, stride, draw(st.integers(1, (n - 1 - start) // stride + 1))))
    return {
        "shape": shape,
        "chunk": [c * p for c, p in zip(chunk, per, strict=True)] if sharded else chunk,
        "inner": chunk if sharded else None,
        "order": draw(st.none() | st.permutations(range(rank))) if rank else None,
        "dtype": draw(st.sampled_from(["bfloat16", "float32", "int8", "float8_e4m3fn", "complex128", "bool"])),
        "axes": axes,
        "written": [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape],
        "as stored": draw(st.booleans()),
        "inline": draw(st.sampled_from([0, 40, 1024])),
        "worth": draw(st.sampled_from([1, 8, 1 << 18])),
        "scratch": draw(st.sampled_from([1, 30, 1 << 20])),
    }


@given(arrays())
@settings(max_examples=300, deadline=None)
def test_boxes_are_what_tensorstore_reads(tmp_path_factory: pytest.TempPathFactory, case: dict[str, Any]) -> None:
    """Chunks at the edge, chunks that were never written, values that lie in the index, shards, axes stored in another
    order; in runs of whatever length.
    """
    root = tmp_path_factory.mktemp("plain")
    store = create(
        root,
        "a.w",
        case["shape"],
        case["chunk"],
        case["dtype"],
        case["order"],
        case["inner"],
        max_inline_value_bytes=case["inline"],
    )
    box = tuple(slice(low, high) for low, high in case["written"])
    store[box].write(values(case["shape"], case["dtype"])[box]).result()
    index = list_chunks(root, ["a.w"])
    assert list(index.arrays) == ["a.w"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax_chunks, "WORTH", case["worth"])
        patch.setattr(orbax_chunks, "SCRATCH", case["scratch"])
        reader = PlainReader(root, PlainIndex.of(index.record()))
        found = read(reader, "a.w", case["axes"], case["dtype"], case["as stored"])
    wanted = tuple(slice(start, start + stride * count, stride) for start, stride, count in case["axes"])
    expected = store.read().result()[wanted]
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_what_lies_in_memory_as_it_is_stored_is_read_where_it_belongs(tmp_path: Path) -> None:
    create(tmp_path, "w", [6, 4, 8], [3, 4, 8], "float32", [1, 0, 2], None)[...].write(
        np.ones((6, 4, 8), np.float32)
    ).result()
    reader = PlainReader(tmp_path, list_chunks(tmp_path, ["w"]))
    fetched: list[int] = []
    fetch = reader._fetch
    reader._fetch = lambda file, offset, out: (fetched.append(out.ctypes.data), fetch(file, offset, out))[1]  # type: ignore[method-assign]
    out = np.zeros((4, 3, 8), np.float32)
    reader.read(("w",), [(0, 1, 3), (0, 1, 4), (0, 1, 8)], out.transpose(1, 0, 2))
    assert (out == 1).all() and fetched == [out.ctypes.data]


def test_databases_of_several_processes_and_many_nodes(tmp_path: Path) -> None:
    """Merged by reference, as Orbax merges them: nodes of one database then refer to files of another."""
    context = ts.Context()  # shared, or nothing is copied by reference
    config = {"max_decoded_node_bytes": 600, "compression": {"id": "zstd"}}

    def database(root: Path) -> Any:
        spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{root}/"}, "config": config}
        return ts.KvStore.open(spec, context=context).result()

    roots = [tmp_path / f"ocdbt.process_{process}" for process in range(3)]
    for process, root in enumerate(roots):
        store = create(root, "a.w", [60, 4], [1, 4], max_inline_value_bytes=0, max_decoded_node_bytes=600)
        rows = slice(process * 20, process * 20 + 20)
        store[rows].write(values([60, 4], "float32")[rows]).result()
    whole = database(tmp_path)
    with ts.Transaction(atomic=True) as transaction:
        for root in roots:
            database(root).experimental_copy_range_to(whole.with_transaction(transaction)).result()
    index = list_chunks(tmp_path, ["a.w"])
    assert len(index.arrays["a.w"].cells) == 60
    assert {f.name.split("/")[0] for f in index.files} == {f"ocdbt.process_{k}" for k in range(3)}
    found = read(PlainReader(tmp_path, index), "a.w", [(0, 1, 60), (0, 1, 4)], "float32")
    assert found.tobytes() == values([60, 4], "float32").tobytes()


def test_only_runs_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create(tmp_path, "w", [64, 32], [64, 32])
    store.write(values([64, 32], "float32")).result()
    monkeypatch.setattr(orbax_chunks, "WORTH", 128)
    for axes, needed in [
        ([(8, 1, 8), (0, 1, 32)], 8 * 32 * 4),
        ([(8, 4, 8), (0, 1, 32)], 8 * 32 * 4),
        ([(8, 1, 1), (4, 1, 16)], 16 * 4),
        ([(0, 1, 64), (0, 1, 32)], 64 * 32 * 4),
    ]:
        reader = PlainReader(tmp_path, list_chunks(tmp_path, ["w"]))
        read(reader, "w", axes, "float32")
        assert reader._files.bytes_read == needed


def test_names_of_files_are_taken_as_they_are(tmp_path: Path) -> None:
    """A linked source's file has a name of its owner's, and its directories."""
    data = values([4], "float32")
    name = "part one/a%20b:ä@.bin"
    (tmp_path / "linked/part one").mkdir(parents=True)
    (tmp_path / "linked" / name).write_bytes(b"head" + data.tobytes())
    write(tmp_path, [4], ocdbt.Location(ocdbt.DataFile(b"linked/", name.encode()), 4, 16))
    assert read(PlainReader(tmp_path, list_chunks(tmp_path, ["w"])), "w", [(0, 1, 4)], "float32").tobytes() == (
        data.tobytes()
    )


# --- what is no plain array -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"fill_value": 1.0},
        {"fill_value": -0.0},
        {"fill_value": "NaN"},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]},
        {"codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}]},
        {"codecs": []},
        {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "/"}}},
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
        {"chunk_grid": {"name": "rectilinear", "configuration": {"chunk_shape": [2, 2]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 0]}}},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [4]},
        {"shape": [True, 4]},
        {"data_type": "int4"},
        {"data_type": ["float32"]},
        {"zarr_format": 2},
        {"storage_transformers": []},
    ],
    ids=str,
)
def test_other_arrays_are_left_to_tensorstore(change: dict[str, Any]) -> None:
    metadata = json.loads(array_metadata([4, 4], "float32", [2, 2]))
    assert layout_of(json.dumps(metadata).encode()) is not None
    assert layout_of(json.dumps({**metadata, **change}).encode()) is None


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_metadata_is_no_layout(text: bytes) -> None:
    assert layout_of(text) is None


# --- lies -------------------------------------------------------------------------------------------------------------


def write(root: Path, shape: list[int], *places: ocdbt.Location, text: bytes | None = None) -> None:
    """A database of one array `w` whose chunks, of four elements, are said to be at these places."""
    text = text or array_metadata(shape, "float32", [4] * len(shape))
    entries = [ocdbt.Entry(f"w/c/{i}".encode(), p) for i, p in enumerate(places)]
    tree = ocdbt.encode_tree(
        [*entries, ocdbt.Entry(b"w/zarr.json", text)], ocdbt.DataFile(b"", b"d/nodes"), max_node_bytes=1 << 20
    )
    (root / "d").mkdir(exist_ok=True)
    (root / "d/nodes").write_bytes(b"".join(tree.nodes))
    (root / "manifest.ocdbt").write_bytes(ocdbt.encode_manifest(ocdbt.Config(b"0" * 16), tree, 1))


DATA = ocdbt.DataFile(b"", b"d/data")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (ocdbt.Location(DATA, 40, 16), "ends at byte 56 of `d/data`, which has 48 bytes"),
        (ocdbt.Location(DATA, 1 << 60, 16), "which has 48 bytes"),
        (ocdbt.Location(DATA, 0, 12), "has 12 bytes, not 16"),
        (ocdbt.Location(DATA, 0, 20), "has 20 bytes, not 16"),
        (ocdbt.Location(ocdbt.DataFile(b"", b"d/none"), 0, 16), "`d/none` does not exist"),
        (ocdbt.Location(ocdbt.DataFile(b"", b"d"), 0, 16), "`d` is not a regular file"),
        (ocdbt.Location(ocdbt.DataFile(b"", b"../secret"), 0, 16), "is not the name of a file inside"),
    ],
)
def test_places_that_cannot_be(place: ocdbt.Location, says: str, tmp_path: Path) -> None:
    root = tmp_path / "items"
    root.mkdir()
    (tmp_path / "secret").write_bytes(bytes(48))
    write(root, [8], ocdbt.Location(DATA, 0, 16), place)
    (root / "d/data").write_bytes(values([12], "float32").tobytes())
    reader = PlainReader(root, list_chunks(root, ["w"]))
    assert read(reader, "w", [(0, 1, 4)], "float32").tobytes() == values([12], "float32")[:4].tobytes()
    with pytest.raises(InputError) as caught:
        read(reader, "w", [(0, 1, 8)], "float32")
    assert says in str(caught.value)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, [4], ocdbt.Location(DATA, 0, 16))
    (tmp_path / "d/data").write_bytes(bytes(16))
    index = list_chunks(tmp_path, ["w"])
    os.truncate(tmp_path / "d/data", 8)
    with pytest.raises(InputError, match="source-truncated"):
        read(PlainReader(tmp_path, index), "w", [(0, 1, 4)], "float32")


@pytest.mark.parametrize(
    ("damage", "says"),
    [(3, "does not have its checksum"), (None, "chunk \\[1\\] ends at byte 1016 of a shard of 68 bytes")],
)
def test_a_shard_index_that_lies(damage: int | None, says: str, tmp_path: Path) -> None:
    metadata = json.loads(array_metadata([8], "float32", [8]))
    metadata["codecs"] = codecs("float32", None, [4])
    index = np.array([[0, 16], [1000, 16]], dtype="<u8").tobytes()
    shard = bytearray(bytes(32) + index + ocdbt.crc32c(index).to_bytes(4, "little"))
    if damage is not None:
        shard[32 + damage] ^= 1
    write(tmp_path, [8], ocdbt.Location(DATA, 0, len(shard)), text=json.dumps(metadata).encode())
    (tmp_path / "d/data").write_bytes(shard)
    with pytest.raises(InputError, match=says):
        read(PlainReader(tmp_path, list_chunks(tmp_path, ["w"])), "w", [(0, 1, 8)], "float32")


@pytest.mark.parametrize("axes", [[(0, 1, 9)], [(-1, 1, 2)], [(0, 2, 5)], [(0, 1, 8), (0, 1, 1)]], ids=str)
def test_more_than_there_is(axes: list[tuple[int, int, int]], tmp_path: Path) -> None:
    create(tmp_path, "w", [8], [4])
    with pytest.raises(InputError, match="orbax-array"):
        read(PlainReader(tmp_path, list_chunks(tmp_path, ["w"])), "w", axes, "float32")


def test_databases_that_cannot_be_listed_are_left_to_tensorstore(tmp_path: Path) -> None:
    write(tmp_path, [8], ocdbt.Location(DATA, 0, 16), ocdbt.Location(DATA, 16, 16))
    assert list(list_chunks(tmp_path, ["w"]).arrays) == ["w"]
    assert list(list_chunks(tmp_path, ["absent", "w"]).arrays) == ["w"]
    write(tmp_path, [4], ocdbt.Location(DATA, 0, 16), ocdbt.Location(DATA, 16, 16))  # one chunk too many
    assert list_chunks(tmp_path, ["w"]) == PlainIndex()
    nodes = bytearray((tmp_path / "d/nodes").read_bytes())
    nodes[-6] ^= 1
    (tmp_path / "d/nodes").write_bytes(nodes)
    assert list_chunks(tmp_path, ["w"]) == PlainIndex()
    (tmp_path / "manifest.ocdbt").unlink()
    assert list_chunks(tmp_path, ["w"]) == PlainIndex()


def test_a_tree_whose_branches_are_one_is_no_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes whose two children are the same one, sixty levels deep: more keys than can ever be listed."""
    monkeypatch.setattr(orbax_index, "MOST", 1 << 62)
    file = ocdbt.DataFile(b"", b"d/deep")
    nodes: list[bytes] = []

    def child(key: bytes, node: bytes, statistics: ocdbt.Statistics) -> ocdbt.Child:
        nodes.append(node)
        return ocdbt.Child(key, 0, ocdbt.Location(file, sum(map(len, nodes[:-1])), len(node)), statistics)

    one = ocdbt.Statistics(1, 0, 0)
    array = child(b"w/", ocdbt.encode_leaf([ocdbt.Entry(b"w/zarr.json", array_metadata([4], "float32", [4]))], 0), one)
    deep = child(b"", ocdbt.encode_leaf([ocdbt.Entry(b"a", b"")], 0), one)
    for height in range(1, 61):
        array = child(b"w/", ocdbt.encode_interior([array], 0, height), one)
        deep = child(b"", ocdbt.encode_interior([replace(deep, key=key) for key in (b"", b"a")], 0, height), one)
    root = child(b"", ocdbt.encode_interior([deep, array], 0, 61), one)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/deep").write_bytes(b"".join(nodes))
    tree = ocdbt.Tree(tuple(nodes), root, 61)
    (tmp_path / "manifest.ocdbt").write_bytes(ocdbt.encode_manifest(ocdbt.Config(b"0" * 16), tree, 1))
    store = {"driver": "ocdbt", "base": f"file://{tmp_path}/", "path": "w/"}
    assert ts.open({"driver": "zarr3", "kvstore": store}, open=True).result().shape == (4,)
    assert list_chunks(tmp_path, ["w"]) == PlainIndex()

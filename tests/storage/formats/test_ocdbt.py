"""The encoder against TensorStore: the same bytes for the same entries, and every key read back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptc.storage.formats import ocdbt

NODES = ocdbt.DataFile(b"", b"d/" + b"1" * 32)
DATA = ocdbt.DataFile(b"", b"d/" + b"0" * 32)


def write(root: Path, entries: list[ocdbt.Entry], data: bytes, max_node_bytes: int) -> ocdbt.Tree:
    tree = ocdbt.encode_tree(iter(entries), NODES, max_node_bytes=max_node_bytes)
    (root / "d").mkdir(parents=True)
    (root / DATA.relative.decode()).write_bytes(data)
    (root / NODES.relative.decode()).write_bytes(b"".join(tree.nodes))
    manifest = ocdbt.encode_manifest(ocdbt.Config(bytes(range(16))), tree, 1_700_000_000_000_000_000)
    (root / "manifest.ocdbt").write_bytes(manifest)
    return tree


def chunk_entries(count: int) -> tuple[list[ocdbt.Entry], bytes]:
    """`count` keys like those of stacked arrays, each of 5 bytes in `data` or, every tenth, inline."""
    data = np.random.default_rng(count).bytes(5 * count)
    keys = sorted(f"params.params.layers.wi_{i % 7}.kernel/c/{i // 7}/0".encode() for i in range(count))
    values = [b"inline %d" % i if i % 10 == 0 else ocdbt.Location(DATA, 5 * i, 5) for i in range(len(keys))]
    return [ocdbt.Entry(k, v) for k, v in zip(keys, values, strict=True)], data


def open_store(root: Path) -> ts.KvStore:
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{root}/"}).result()


def value_of(entry: ocdbt.Entry, data: bytes) -> bytes:
    if isinstance(entry.value, bytes):
        return entry.value
    return data[entry.value.offset : entry.value.offset + entry.value.length]


# TensorStore's own databases, uncompressed, taken apart with `ts.ocdbt.dump` and encoded again.


def dump(base: ts.KvStore, location: str | None = None) -> dict[str, Any]:
    result: dict[str, Any] = ts.ocdbt.dump(base, location).result() if location else ts.ocdbt.dump(base).result()
    return result


def parse(location: str) -> ocdbt.Location:
    kind, base, rest = location.split(":", 2)
    assert kind in ("value", "btreenode")
    path, offset, length = rest.rsplit(":", 2)
    return ocdbt.Location(ocdbt.DataFile(base.encode(), path.encode()), int(offset), int(length))


def child_of(entry: dict[str, Any], prefix: bytes) -> ocdbt.Child:
    s = entry["statistics"]
    statistics = ocdbt.Statistics(s["num_keys"], s["num_tree_bytes"], s["num_indirect_value_bytes"])
    left_out = len(prefix + entry["subtree_common_prefix"])
    return ocdbt.Child(prefix + entry["key"], left_out, parse(entry["location"]), statistics)


def encoded_again(base: ts.KvStore, location: str, prefix: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Of every node below `location`: its height, its bytes, and the bytes encoded from its entries."""
    place = parse(location)
    path = place.file.base + place.file.relative
    stored = base.read(path).result().value[place.offset : place.offset + place.length]
    node = dump(base, location)
    if node["height"] == 0:
        values = [e["inline_value"] if "inline_value" in e else parse(e["indirect_value"]) for e in node["entries"]]
        entries = [ocdbt.Entry(prefix + e["key"], v) for e, v in zip(node["entries"], values, strict=True)]
        yield 0, stored, ocdbt.encode_leaf(entries, len(prefix))
        return
    children = [child_of(e, prefix) for e in node["entries"]]
    yield node["height"], stored, ocdbt.encode_interior(children, len(prefix), node["height"])
    for e in node["entries"]:
        yield from encoded_again(base, e["location"], prefix + e["subtree_common_prefix"])


CONTEXT = ts.Context()  # TensorStore merges databases of one context only


def tensorstore_database(base: str, node_bytes: int) -> ts.KvStore:
    config = {"max_decoded_node_bytes": node_bytes, "max_inline_value_bytes": 8, "compression": None}
    spec = {"driver": "ocdbt", "base": base, "config": config, "assume_config": True}
    return ts.KvStore.open(spec, context=CONTEXT).result()


@pytest.mark.parametrize(("node_bytes", "height"), [(8 << 20, 0), (4000, 1), (400, 3)])
def test_nodes_are_tensorstores_own_bytes(tmp_path: Path, node_bytes: int, height: int) -> None:
    store = tensorstore_database(f"file://{tmp_path}/", node_bytes)
    with ts.Transaction(atomic=True) as transaction:
        for i in range(200):
            store.with_transaction(transaction)[f"params.w{i // 50}/c/{i % 50}"] = bytes(i % 30)
    root = dump(store.base)["versions"][-1]["root"]["location"]
    nodes = list(encoded_again(store.base, root, b""))
    assert max(h for h, _, _ in nodes) == height
    for _, stored, again in nodes:
        assert stored == again


def test_nodes_that_refer_to_other_databases_are_tensorstores_own_bytes(tmp_path: Path) -> None:
    merged = tensorstore_database(f"file://{tmp_path}/", 2000)
    parts = [tensorstore_database(f"file://{tmp_path}/ocdbt.process_{k}/", 8 << 20) for k in (0, 1, 10)]
    for k, part in enumerate(parts):
        for i in range(3):  # a transaction each makes a data file each
            with ts.Transaction(atomic=True) as transaction:
                for j in range(10):
                    part.with_transaction(transaction)[f"w/c/{k}/{i}/{j}"] = bytes(9 + j)
    with ts.Transaction(atomic=True) as transaction:
        for part in parts:
            part.experimental_copy_range_to(merged.with_transaction(transaction)).result()
    root = dump(merged.base)["versions"][-1]["root"]["location"]
    nodes = list(encoded_again(merged.base, root, b""))
    assert any(b"ocdbt.process_10/" in stored for _, stored, _ in nodes)
    for _, stored, again in nodes:
        assert stored == again


def test_the_manifest_is_tensorstores_own_bytes(tmp_path: Path) -> None:
    store = tensorstore_database(f"file://{tmp_path}/", 300)
    with ts.Transaction(atomic=True) as transaction:
        for i in range(40):
            store.with_transaction(transaction)[f"key/{i}"] = bytes(20)
    found = dump(store.base)
    (version,) = found["versions"]
    entry = version["root"] | {"key": b"", "subtree_common_prefix": b""}
    tree = ocdbt.Tree((), child_of(entry, b""), version["root_height"])
    config = ocdbt.Config(bytes.fromhex(found["config"]["uuid"]), 8, 300, version_tree_arity_log2=4, zstd_level=None)
    again = ocdbt.encode_manifest(config, tree, version["commit_time"])
    assert version["root_height"] > 0
    assert again == (tmp_path / "manifest.ocdbt").read_bytes()


@pytest.mark.parametrize(
    ("count", "max_node_bytes", "height"),
    [(10, 1 << 20, 0), (10, 1, 4), (1000, 1000, 3), (100_000, 1 << 20, 1), (100_000, 4000, 3)],
)
def test_tensorstore_reads_every_key(tmp_path: Path, count: int, max_node_bytes: int, height: int) -> None:
    entries, data = chunk_entries(count)
    tree = write(tmp_path / "db", entries, data, max_node_bytes)
    assert tree.height == height
    store = open_store(tmp_path / "db")
    assert sorted(store.list().result()) == [e.key for e in entries]
    chosen = random.Random(count).sample(entries, min(count, 300))
    reads = [(store.read(e.key), value_of(e, data)) for e in chosen]
    for read, value in reads:
        assert read.result().value == value
    assert store.read(b"params.params.layers.wi_0.kernel/c/0/1").result().state == "missing"


def test_statistics_are_those_of_the_tree(tmp_path: Path) -> None:
    entries, data = chunk_entries(1000)
    tree = write(tmp_path / "db", entries, data, 3000)
    base = ts.KvStore.open(f"file://{tmp_path}/db/").result()
    (version,) = dump(base)["versions"]
    assert version["root"]["statistics"] == {
        "num_keys": 1000,
        "num_tree_bytes": sum(map(len, tree.nodes)),
        "num_indirect_value_bytes": sum(5 for e in entries if isinstance(e.value, ocdbt.Location)),
    }


def test_nodes_keep_to_the_limit() -> None:
    # By TensorStore's estimate 100 bytes each, so 10 in a leaf of 1000; a child of the root counts 56 + 4 + 34.
    entries = [ocdbt.Entry(b"%04d" % i, bytes(80)) for i in range(110)]
    leaves = ocdbt.encode_tree(entries, NODES, max_node_bytes=1000)
    assert (leaves.height, len(leaves.nodes)) == (2, 11 + 2 + 1)
    assert (leaves.root.location.offset, leaves.root.location.length) == (
        sum(map(len, leaves.nodes[:-1])),
        len(leaves.nodes[-1]),
    )
    assert len(ocdbt.encode_tree(entries, NODES, max_node_bytes=1034).nodes) == 11 + 1


def test_the_configuration_is_the_one_orbax_writes(tmp_path: Path) -> None:
    entries, data = chunk_entries(10)
    write(tmp_path / "db", entries, data, 1 << 20)
    assert dump(ts.KvStore.open(f"file://{tmp_path}/db/").result())["config"] == {
        "uuid": bytes(range(16)).hex(),
        "compression": {"id": "zstd"},
        "max_decoded_node_bytes": 100_000_000,
        "max_inline_value_bytes": 1024,
        "version_tree_arity_log2": 4,
    }


KEYS = st.sets(st.binary(max_size=6) | st.binary(max_size=3).map(lambda b: b"shared\0" * 20 + b), min_size=1)


@settings(deadline=None, max_examples=60)
@given(keys=KEYS, max_node_bytes=st.sampled_from([1, 100, 400, 1 << 20]))
def test_any_keys_are_read_back(keys: set[bytes], max_node_bytes: int) -> None:
    entries = [ocdbt.Entry(k, b"value of " + k) for k in sorted(keys)]
    tree = ocdbt.encode_tree(entries, NODES, max_node_bytes=max_node_bytes)
    context = ts.Context()
    base = ts.KvStore.open("memory://", context=context).result()
    base.write(NODES.relative, b"".join(tree.nodes)).result()
    base.write("manifest.ocdbt", ocdbt.encode_manifest(ocdbt.Config(bytes(16)), tree, 1)).result()
    store = ts.KvStore.open({"driver": "ocdbt", "base": "memory://"}, context=context).result()
    assert sorted(store.list().result()) == sorted(keys)
    for key, value in entries:
        assert store.read(key).result().value == value


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "at least one entry"),
        ([b"b", b"a"], "not strictly increasing"),
        ([b"a", b"a"], "not strictly increasing"),
        ([b"a", b"b", b"b", b"c"], "not strictly increasing"),
        ([b"a" * 65536], "exceeds the format's 65535"),
    ],
)
@pytest.mark.parametrize("max_node_bytes", [1, 40, 1 << 20])
def test_entries_that_no_tree_can_hold_are_refused(keys: list[bytes], message: str, max_node_bytes: int) -> None:
    with pytest.raises(ValueError, match=message):
        ocdbt.encode_tree([ocdbt.Entry(k, b"") for k in keys], NODES, max_node_bytes=max_node_bytes)


def test_very_long_keys_are_read_back(tmp_path: Path) -> None:
    entries = [ocdbt.Entry(b"k" * 60_000 + b"%03d" % i, b"%d" % i) for i in range(300)]
    write(tmp_path / "db", entries, b"", 100 << 20)
    assert sorted(open_store(tmp_path / "db").list().result()) == [e.key for e in entries]


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 300)))
def test_varints_are_leb128(values: list[int]) -> None:
    expected = bytearray()
    for value in values:
        while value >= 128:
            expected.append(value & 127 | 128)
            value >>= 7
        expected.append(value)
    assert ocdbt.varints(values) == bytes(expected)


def test_the_checksum_of_the_standard_text() -> None:
    assert ocdbt.crc32c(b"123456789") == 0xE3069283
    assert ocdbt.crc32c(b"") == 0
    assert ocdbt.crc32c(bytes(32)) == 0x8A9136AA


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 1000, 4095, 4096, 4097, 1 << 20, 2_000_003])
def test_the_checksum_is_the_one_tensorstore_computes(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    codecs = [{"name": "bytes"}, {"name": "crc32c"}]
    grid = {"name": "regular", "configuration": {"chunk_shape": [size]}}
    metadata = {"shape": [size], "chunk_grid": grid, "data_type": "uint8", "codecs": codecs}
    spec = {"driver": "zarr3", "kvstore": "memory://", "metadata": metadata}
    array = ts.open(spec | {"store_data_equal_to_fill_value": True}, create=True).result()
    array.write(data).result()
    stored = array.kvstore.read("c/0").result().value
    assert int.from_bytes(stored[-4:], "little") == ocdbt.crc32c(data.tobytes())

"""Checkpoints that Orbax takes for its own: restored by every API, described as Orbax describes its own."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest
import tensorstore as ts

from ckptc.diagnostics import InputError
from ckptc.storage.checkpoint import orbax_writer as orbax
from ckptc.storage.checkpoint.orbax_writer import ItemsWriter, WriterState
from ckptc.storage.formats import zarr3
from ckptc.storage.formats.orbax_metadata import AXIS, ArraySpec, sharding_metadata
from ckptc.storage.sink.directory import Directory
from ckptc.storage.sink.durable import commit
from restoring import v1_load, with_devices

BEFORE_0_12 = tuple(map(int, version("orbax-checkpoint").split(".")[:2])) < (0, 12)
P = ("params", "params")
ARRAYS = (
    ArraySpec((*P, "token_embedder", "embedding"), (160, 48), "bfloat16", (10, 48), (16, 1)),
    ArraySpec((*P, "decoder", "layers", "mlp", "kernel"), (3, 32, 6), "float32", (2, 5, 6), (1, 16, 1)),
    ArraySpec((*P, "decoder", "layers", "mlp", "quantized"), (7, 5), "float8_e4m3fn", (2, 3), (1, 1)),
    ArraySpec((*P, "decoder", "layers", "ids"), (33,), "int32", (8,), (1,)),
    ArraySpec((*P, "decoder", "layer-norm"), (48,), "bfloat16", (48,), (1,)),
    ArraySpec(("params", "bias", "scalar"), (), "float32", (), ()),
)


def values_of(spec: ArraySpec) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(len(spec.name))
    return np.asarray(rng.standard_normal(spec.shape) * 50).astype(zarr3.numpy_dtype(spec.dtype))


VALUES = tuple(map(values_of, ARRAYS))


def cells(arrays: Sequence[ArraySpec] = ARRAYS) -> list[tuple[int, tuple[int, ...]]]:
    """Every chunk, as array and index."""
    grids = [zarr3.grid(a.shape, a.chunk) for a in arrays]
    return [(i, index) for i, g in enumerate(grids) for index in itertools.product(*map(range, g))]


def part(array: int, index: tuple[int, ...]) -> np.ndarray[Any, Any]:
    chunk = ARRAYS[array].chunk
    box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))
    return np.asarray(VALUES[array][box])


def write(writer: ItemsWriter, chunks: Iterable[tuple[int, tuple[int, ...]]]) -> None:
    for array, index in chunks:
        writer.write_chunk(array, index, part(array, index))


def write_all(directory: Path, processes: int = 1) -> None:
    for process in range(processes):
        writer = ItemsWriter(Directory(directory), ARRAYS, process=process)
        write(writer, cells()[process::processes])
        writer.close()


def finish(directory: Path, final: Path | None = None, **options: Any) -> None:
    metadata, final = {"scan_layers": True}, final or directory
    orbax.finish(Directory(directory), ARRAYS, custom_metadata=metadata, final=str(final), **options)


def checkpoint(out: Path, processes: int = 1, **options: Any) -> Path:
    partial = out / "0.unfinished"
    write_all(partial, processes)
    finish(partial, out / "0", **options)
    commit(partial, out / "0")
    return out / "0"


def leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def assert_restored(tree: Any, step: int = 0) -> None:
    assert tree["step"] == step
    assert not tree["opt_state"]
    for spec, expected in zip(ARRAYS, VALUES, strict=True):
        found = leaf(tree, spec.path)
        assert found.dtype == expected.dtype and found.shape == expected.shape, spec.name
        assert np.asarray(found).tobytes() == expected.tobytes(), spec.name


def run(script: str, devices: int, *args: Path) -> None:
    """Run a program in a Python of its own that has `devices` simulated devices."""
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, env=with_devices(devices), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process; tests only read it."""
    return checkpoint(tmp_path_factory.mktemp("made"))


def standard(path: Path) -> Any:
    return ocp.StandardCheckpointer().restore(path / "items")


def pytree(path: Path) -> Any:
    return ocp.PyTreeCheckpointer().restore(path / "items")


def v1_checkpointer(path: Path) -> Any:
    with ocp_v1.training.Checkpointer(path.parent) as checkpointer:
        assert checkpointer.latest.step == 0
        if not hasattr(checkpointer, "load"):  # before 0.12
            return checkpointer.load_checkpointables(0)["items"]
        return checkpointer.load(0, checkpointable_name="items")


@pytest.mark.parametrize("restore", [standard, pytree, v1_load, v1_checkpointer])
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_restores_with_no_target(made: Path, restore: Callable[[Path], Any]) -> None:
    assert_restored(restore(made))


def test_orbax_restores_other_steps(tmp_path: Path) -> None:
    assert_restored(standard(checkpoint(tmp_path, step=-5)), step=-5)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_part_of_the_tree_is_restored(made: Path) -> None:
    target = {"params": {"bias": {"scalar": jax.ShapeDtypeStruct((), np.dtype(np.float32))}}}
    with ocp_v1.Context(
        pytree_options=ocp_v1.options.PyTreeOptions(loading=ocp_v1.options.PyTreeOptions.Loading(partial_load=True))
    ):
        restored = v1_load(made, target)
    assert np.asarray(restored["params"]["bias"]["scalar"]) == VALUES[5]


RESTORE_SHARDED = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
from pathlib import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from restoring import v1_load

made, out = Path(sys.argv[1]), Path(sys.argv[2])
assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
specs = {  # cut across chunks, along chunks, and not at all
    (160, 48): P("y", "x"), (3, 32, 6): P(None, "x", "y"), (48,): P(("x", "y")),
    (7, 5): P(), (33,): P(), (): P(),
}
metadata = ocp.StandardCheckpointer().metadata(made / "items").item_metadata

def abstract(m):
    return jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=NamedSharding(mesh, specs[m.shape]))

tree = dict(jax.tree.map(abstract, dict(metadata)["params"]))
target = {"step": 0, "params": tree, "opt_state": {}}
arguments = ocp.checkpoint_utils.construct_restore_args(target)
restored = {
    "standard": ocp.StandardCheckpointer().restore(made / "items", target),
    "pytree": ocp.PyTreeCheckpointer().restore(made / "items", item=target, restore_args=arguments),
    "v1": v1_load(made, target),
    "untargeted": ocp.StandardCheckpointer().restore(made / "items"),
}
saved = {}
for name, found in restored.items():
    for path, array in jax.tree_util.tree_leaves_with_path(found["params"]):
        if name != "untargeted":
            assert array.sharding == NamedSharding(mesh, specs[array.shape]), (name, path)
        saved[name + jax.tree_util.keystr(path)] = np.atleast_1d(np.asarray(array)).view(np.uint8)
np.savez(out, **saved)
"""


def test_orbax_restores_onto_eight_devices_with_any_sharding(made: Path, tmp_path: Path) -> None:
    run(RESTORE_SHARDED, 8, made, tmp_path / "out.npz")
    found = np.load(tmp_path / "out.npz")
    assert len(found.files) == 4 * len(ARRAYS)
    for api, (spec, expected) in itertools.product(
        ("standard", "pytree", "v1", "untargeted"), zip(ARRAYS, VALUES, strict=True)
    ):
        keys = "".join(f"['{key}']" for key in spec.path[1:])
        assert found[api + keys].tobytes() == expected.tobytes(), (api, spec.name)


SAVE = """
import sys, jax, numpy as np, orbax.checkpoint.experimental.v1 as v1
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

axis = "checkpoint_sharding_axis"
mesh = Mesh(np.array(jax.devices()), (axis,))
def array(shape, dtype, *spec):
    return jax.device_put(np.zeros(shape, dtype), NamedSharding(mesh, P(*spec)))

kernel, quantized = array((3, 32, 6), "float32", None, axis), array((7, 5), "float8_e4m3fn", None)
layers = {"mlp": {"kernel": kernel, "quantized": quantized}, "ids": array((33,), "int32", None)}
params = {
    "token_embedder": {"embedding": array((160, 48), "bfloat16", axis)},
    "decoder": {"layers": layers, "layer-norm": array((48,), "bfloat16", None)},
}
params = {"params": params, "bias": {"scalar": array((), "float32")}}
with v1.training.Checkpointer(sys.argv[1]) as checkpointer:
    state = {"step": 0, "params": params, "opt_state": {}}
    checkpointer.save_checkpointables(0, {"items": state}, custom_metadata={"scan_layers": True})
"""


def files(root: Path) -> dict[str, int]:
    """The files of a checkpoint and how many there are of each, random names aside."""
    names = [re.sub(r"[0-9a-f]{32}", "<id>", str(p.relative_to(root))) for p in root.rglob("*") if p.is_file()]
    return {name: names.count(name) for name in names}


def described(root: Path, name: str) -> Any:
    """A metadata file, without what may differ: times, and the chunk shapes that were chosen."""
    content = json.loads((root / name).read_text())
    if name == "_CHECKPOINT_METADATA":
        times = content.pop("init_timestamp_nsecs"), content.pop("commit_timestamp_nsecs")
        assert all(10**18 < t < 10**19 for t in times) and times[0] <= times[1]
    if name == "items/_sharding":
        # Encoded twice: the inner texts are compared as such, spaces and order included.
        assert list(content) == sorted(content)
        assert all(isinstance(text, str) for text in content.values())
    if name == "items/array_metadatas/process_0":
        content = sorted((e["array_metadata"] for e in content["array_metadatas"]), key=lambda e: e["param_name"])
        for entry in content:
            del entry["chunk_shape"]
    return content


@pytest.fixture(scope="module")
def orbaxs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tree, saved by Orbax from 16 devices."""
    out = tmp_path_factory.mktemp("orbaxs")
    run(SAVE, 16, out)
    return out / "0"


@pytest.fixture(scope="module")
def ours_of_16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("ours"), mesh=((AXIS, 16),))


def test_the_files_are_those_that_orbax_writes(ours_of_16: Path, orbaxs: Path) -> None:
    # On local disks Orbax before 0.12 commits by the directory's name alone.
    markers = {"commit_success.txt", "items/commit_success.txt"} if BEFORE_0_12 else set()
    assert set(files(orbaxs)).isdisjoint(markers)
    assert set(files(ours_of_16)) == set(files(orbaxs)) | markers


@pytest.mark.parametrize(
    "name", ["_CHECKPOINT_METADATA", "items/_METADATA", "items/_sharding", "items/array_metadatas/process_0"]
)
def test_metadata_is_what_orbax_writes(ours_of_16: Path, orbaxs: Path, name: str) -> None:
    ours, theirs = described(ours_of_16, name), described(orbaxs, name)
    if name == "items/_METADATA":
        if BEFORE_0_12:
            theirs.setdefault("use_ocdbt", True)  # 0.11.26 and 0.11.28 do not say it yet
        # Orbax lets replicas write a part each: the layer norm, 16 times replicated, in shards of 3.
        norm = str(ARRAYS[4].path)
        assert ours["tree_metadata"][norm]["value_metadata"].pop("write_shape") == [48]
        assert theirs["tree_metadata"][norm]["value_metadata"].pop("write_shape") == [3]
    if name == "items/array_metadatas/process_0":
        (ours_norm,), (theirs_norm,) = (
            [e for e in all_ if e["param_name"] == ARRAYS[4].name] for all_ in (ours, theirs)
        )
        assert (ours_norm.pop("write_shape"), theirs_norm.pop("write_shape")) == ([48], [3])
    assert ours == theirs
    if name == "items/_sharding":
        assert (ours_of_16 / name).read_text() == (orbaxs / name).read_text()


def test_the_sharding_of_one_device_is_the_text_that_orbax_writes_on_one() -> None:
    named = sharding_metadata(ARRAYS)
    text = (
        '{"sharding_type": "NamedSharding", "shape": [1], "axis_names": ["checkpoint_sharding_axis"], '
        '"axis_types": ["AxisType.Auto"], "partition_spec": ["checkpoint_sharding_axis"], '
        '"device_mesh": {"mesh": [{"id": 0}]}}'
    )
    assert named[base64.b64encode(b"params.params.token_embedder.embedding").decode()] == text


def test_the_databases_differ_from_orbaxs_only_in_their_chunks(ours_of_16: Path, orbaxs: Path) -> None:
    def database(root: Path) -> tuple[Any, set[bytes]]:
        config = ts.ocdbt.dump(ts.KvStore.open(f"file://{root}/").result()).result()["config"]
        keys = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{root}/"}).result().list().result()
        return config | {"uuid": None}, {k for k in keys if not re.search(rb"/c(/\d+)+$", k)}

    assert database(ours_of_16 / "items") == database(orbaxs / "items")
    config, keys = database(ours_of_16 / "items/ocdbt.process_0")
    # `step` is known when the processes are done, and is only in the merged database, the one that is read.
    assert (config, keys | {b"step/c", b"step/zarr.json"}) == database(orbaxs / "items/ocdbt.process_0")


def test_commit_markers_name_the_final_directory(made: Path) -> None:
    assert (made / "commit_success.txt").read_text() == f"Checkpoint commit was successful to {made}"
    assert (made / "items/commit_success.txt").exists()


def test_tensorstore_reads_the_arrays(made: Path) -> None:
    for spec, expected in zip(ARRAYS, VALUES, strict=True):
        kvstore = {"driver": "ocdbt", "base": f"file://{made}/items/", "path": f"{spec.name}/"}
        array = ts.open({"driver": "zarr3", "kvstore": kvstore}).result()
        assert array.rank == 0 or array.chunk_layout.read_chunk.shape == spec.chunk
        read = array.read().result()
        assert read.dtype == expected.dtype and read.tobytes() == expected.tobytes()


def test_chunks_at_the_edge_are_stored_whole(made: Path) -> None:
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{made}/items/"}).result()
    raw = store.read("params.params.decoder.layers.mlp.kernel/c/1/6/0").result().value
    chunk = np.frombuffer(raw, np.float32).reshape(2, 5, 6)
    assert np.array_equal(chunk[:1, :2], VALUES[1][2:, 30:])
    assert not chunk[1:].any() and not chunk[:, 2:].any()


def test_chunks_of_several_processes_are_merged_by_reference(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, processes=3)
    assert_restored(standard(made))
    base = ts.KvStore.open(f"file://{made}/items/").result()
    root = ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
    places = [e["indirect_value"] for e in ts.ocdbt.dump(base, root).result()["entries"] if "indirect_value" in e]
    assert len(places) == len(cells())
    assert {p.split("/:d/")[0] for p in places} == {f"value:ocdbt.process_{k}" for k in range(3)}


def test_a_process_may_have_nothing_to_write(tmp_path: Path) -> None:
    idle = ItemsWriter(Directory(tmp_path), ARRAYS, process=1)
    idle.close()
    write_all(tmp_path)
    finish(tmp_path)
    assert not (tmp_path / "items/ocdbt.process_1").exists()
    assert_restored(standard(tmp_path))


def test_threads_write_at_the_same_time(tmp_path: Path) -> None:
    arrays = [ArraySpec(("params", "w"), (5000,), "int16", (1,), (1,))]
    writer = ItemsWriter(Directory(tmp_path), arrays)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet inside `write_chunk`
    try:
        with ThreadPoolExecutor(8) as pool:
            entries = list(pool.map(lambda i: writer.write_chunk(0, (i,), np.array([i], np.int16)), range(5000)))
    finally:
        sys.setswitchinterval(interval)
    assert sorted(offset for _, offset, *_ in entries) == list(range(0, 10_000, 2))
    writer.close()
    orbax.finish(Directory(tmp_path), arrays, custom_metadata={}, final="0")
    assert np.array_equal(standard(tmp_path)["params"]["w"], np.arange(5000))


def test_a_new_writer_goes_on_where_an_interrupted_one_was(tmp_path: Path) -> None:
    first = ItemsWriter(Directory(tmp_path), ARRAYS)
    write(first, cells()[:40])
    first.sync()
    state = first.state()
    write(first, cells()[40:50])  # written, but not recorded
    recorded = json.loads(json.dumps(state.entries))
    state = WriterState(state.files, tuple(orbax.Entry(*entry) for entry in recorded))

    second = ItemsWriter(Directory(tmp_path), ARRAYS, resume=state)
    size = (tmp_path / "items/ocdbt.process_0/d" / state.files[0]).stat().st_size
    assert size == max(offset + length for _, offset, length, _ in state.entries)
    with pytest.raises(RuntimeError, match="is written already"):
        second.write_chunk(0, (0, 0), part(0, (0, 0)))
    write(second, cells()[40:])
    second.close()
    finish(tmp_path)
    assert_restored(standard(tmp_path))


def test_a_chunk_that_the_disk_refused_can_be_written_again(tmp_path: Path) -> None:
    writer = ItemsWriter(Directory(tmp_path), ARRAYS)
    write(writer, cells()[:3])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (960 * 3 + 100, limits[1]))  # the first 100 bytes are still taken
    try:
        with pytest.raises(OSError):
            write(writer, cells()[3:4])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list(writer.entries())) == 3
    write(writer, cells()[3:])
    writer.close()
    finish(tmp_path)
    assert_restored(standard(tmp_path))


def test_entries_say_where_each_chunk_is(tmp_path: Path) -> None:
    writer = ItemsWriter(Directory(tmp_path), ARRAYS)
    returned = [writer.write_chunk(array, index, part(array, index)) for array, index in reversed(cells())]
    assert list(writer.entries()) == returned[::-1]
    writer.close()
    data = (tmp_path / "items/ocdbt.process_0/d" / writer.data.files[0]).read_bytes()
    key, offset, length, _ = returned[-1]
    assert key == "params.params.token_embedder.embedding/c/0/0"
    assert data[offset : offset + length] == VALUES[0][:10].tobytes()


def test_a_data_file_shorter_than_recorded_is_refused(tmp_path: Path) -> None:
    first = ItemsWriter(Directory(tmp_path), ARRAYS)
    write(first, cells()[:5])
    os.truncate(tmp_path / "items/ocdbt.process_0/d" / first.data.files[0], 960 * 5 - 1)
    with pytest.raises(RuntimeError, match="has 4799 bytes, the chunks recorded in it end at 4800"):
        ItemsWriter(Directory(tmp_path), ARRAYS, resume=first.state())


def test_a_writer_that_does_not_resume_begins_anew(tmp_path: Path) -> None:
    write(ItemsWriter(Directory(tmp_path), ARRAYS), cells()[:5])
    write_all(tmp_path)
    finish(tmp_path)
    finish(tmp_path)  # as after an interruption
    assert files(tmp_path)["items/ocdbt.process_0/d/<id>"] == 2
    assert files(tmp_path)["items/d/<id>"] == 1
    assert_restored(standard(tmp_path))


def test_a_missing_chunk_is_an_error(tmp_path: Path) -> None:
    writer = ItemsWriter(Directory(tmp_path), ARRAYS)
    write(writer, [c for c in cells() if c not in [(1, (1, 3, 0)), (3, (2,))]])
    writer.close()
    message = r"2 chunks were not written, the first is params\.params\.decoder\.layers\.mlp\.kernel/c/1/3/0"
    with pytest.raises(RuntimeError, match=message):
        finish(tmp_path)
    assert not (tmp_path / "commit_success.txt").exists()


def test_a_chunk_of_two_processes_is_an_error(tmp_path: Path) -> None:
    write_all(tmp_path)
    second = ItemsWriter(Directory(tmp_path), ARRAYS, process=1)
    write(second, [(3, (2,))])
    second.close()
    with pytest.raises(
        RuntimeError, match=r"ocdbt\.process_1: params\.params\.decoder\.layers\.ids/c/2 is there twice"
    ):
        finish(tmp_path)


def test_a_process_that_took_no_part_is_an_error(tmp_path: Path) -> None:
    write_all(tmp_path)
    ItemsWriter(Directory(tmp_path), ARRAYS, process=1)
    with pytest.raises(RuntimeError, match=r"ocdbt\.process_1 is there, but took no part"):
        finish(tmp_path, writers=[0])


def test_an_open_writer_is_an_error(tmp_path: Path) -> None:
    write(ItemsWriter(Directory(tmp_path), ARRAYS), cells())
    with pytest.raises(RuntimeError, match=r"the writer of ocdbt\.process_0 was not closed"):
        finish(tmp_path)


def test_other_arrays_than_those_written_are_an_error(tmp_path: Path) -> None:
    write_all(tmp_path)
    other = ArraySpec(ARRAYS[0].path, (160, 48), "float16", (10, 48), (16, 1))
    with pytest.raises(RuntimeError, match=r"params\.params\.token_embedder\.embedding/zarr\.json is not that"):
        orbax.finish(Directory(tmp_path), [other, *ARRAYS[1:]], custom_metadata={}, final="0")
    with pytest.raises(RuntimeError, match="ids"):
        orbax.finish(Directory(tmp_path), ARRAYS[:3] + ARRAYS[4:], custom_metadata={}, final="0")


def test_a_data_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    writer = ItemsWriter(Directory(tmp_path), ARRAYS)
    write(writer, cells())
    writer.close()
    data = tmp_path / "items/ocdbt.process_0/d" / writer.data.files[0]
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(RuntimeError, match="is not there, or ends before the"):
        finish(tmp_path)


def test_an_index_that_was_changed_is_an_error(tmp_path: Path) -> None:
    writer = ItemsWriter(Directory(tmp_path), ARRAYS)
    write(writer, cells())
    writer.close()
    (index,) = (p for p in (tmp_path / "items/ocdbt.process_0/d").iterdir() if p.name != writer.data.files[0])
    content = bytearray(index.read_bytes())
    content[100] ^= 1
    index.write_bytes(content)
    with pytest.raises(RuntimeError, match="CRC-32C checksum verification failed"):
        finish(tmp_path)


def test_data_that_is_not_a_chunk_is_refused_and_leaves_the_chunk_to_be_written(tmp_path: Path) -> None:
    writer = ItemsWriter(Directory(tmp_path), ARRAYS)
    with pytest.raises(ValueError, match=r"chunk \(0, 0\) of params.*has 960 bytes, not 959"):
        writer.write_chunk(0, (0, 0), memoryview(bytes(959)))
    with pytest.raises(ValueError, match="outside the grid"):
        writer.write_chunk(0, (16, 0), memoryview(bytes(960)))
    write(writer, cells())
    writer.close()
    with pytest.raises(RuntimeError, match="closed"):
        write(writer, cells()[:1])
    finish(tmp_path)
    assert_restored(standard(tmp_path))


@pytest.mark.parametrize("path", [(), ("step",), ("opt_state", "x"), ("a", ""), ("a/b",)])
def test_paths_that_the_tree_cannot_have_are_refused(tmp_path: Path, path: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be the"):
        ItemsWriter(Directory(tmp_path), [ArraySpec(path, (1,), "int8", (1,), (1,))])


def test_arrays_without_elements_are_restored(tmp_path: Path) -> None:
    arrays = [ArraySpec(("params", "none"), (0, 4), "float32", (1, 4), (1, 1)), ARRAYS[0]]
    writer = ItemsWriter(Directory(tmp_path), arrays)
    for _, index in cells(ARRAYS[:1]):
        writer.write_chunk(1, index, part(0, index))
    writer.close()
    orbax.finish(Directory(tmp_path), arrays, custom_metadata={}, final="0")
    assert standard(tmp_path)["params"]["none"].shape == (0, 4)


def test_commit_refuses_to_replace_anything(tmp_path: Path) -> None:
    made = checkpoint(tmp_path)
    assert not (tmp_path / "0.unfinished").exists()
    write_all(tmp_path / "1.unfinished")
    finish(tmp_path / "1.unfinished")
    with pytest.raises(InputError) as error:
        commit(tmp_path / "1.unfinished", made)
    assert error.value.diagnostics[0].code == "output-exists"
    assert_restored(standard(made))
    commit(tmp_path / "1.unfinished", tmp_path / "new" / "folder" / "0")
    assert_restored(standard(tmp_path / "new" / "folder" / "0"))


def test_indexes_of_many_chunks_have_several_nodes(tmp_path: Path) -> None:
    arrays = [ArraySpec(("params", f"w{i}"), (100, 100), "int8", (1, 1), (1, 1)) for i in range(3)]
    writer = ItemsWriter(Directory(tmp_path), arrays)
    for array, index in cells(arrays):
        writer.write_chunk(array, index, memoryview(bytes([sum(index)])))
    writer.close()
    orbax.finish(Directory(tmp_path), arrays, custom_metadata={}, final="0")
    base = ts.KvStore.open(f"file://{tmp_path}/items/").result()
    assert ts.ocdbt.dump(base).result()["versions"][-1]["root_height"] == 1
    expected = np.add.outer(np.arange(100), np.arange(100)).astype(np.int8)
    for i in range(3):
        kvstore = {"driver": "ocdbt", "base": f"file://{tmp_path}/items/", "path": f"params.w{i}/"}
        assert np.array_equal(ts.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result(), expected)

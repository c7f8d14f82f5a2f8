"""What is written for a mesh is restored on it by plain Orbax, each process reading its own part and no more."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptc.cli import main
from restoring import with_devices

TOOLS = Path(__file__).parents[2] / "tools"
MEGABYTES = 24
MESH = "fsdp=2,tensor=4"

COMMON = """
import json, sys
import jax
if len(sys.argv) > 4:
    jax.distributed.initialize(sys.argv[4], 2, int(sys.argv[5]))
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from restoring import v1_load

items, plain, specs = sys.argv[1] + "/0/items", sys.argv[2] + "/0/items", json.loads(sys.argv[3])
mesh = Mesh(np.array(jax.devices()).reshape(min(2, jax.device_count()), -1), ("fsdp", "tensor"))


def name_of(path):
    return ".".join(str(k.key) for k in path)


def sharding_of(name):
    return NamedSharding(mesh, PartitionSpec(*(tuple(over) or None for over in specs.get(name, ()))))


def check(tree):
    \"\"\"Every shard that this process holds is that of the checkpoint made without a mesh. Returns their bytes.\"\"\"
    held = 0
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        name = name_of(path)
        if name == "step":
            continue
        assert array.sharding.is_equivalent_to(sharding_of(name), array.ndim), (name, array.sharding)
        store = {"driver": "ocdbt", "base": f"file://{plain}/", "path": f"{name}/"}
        expected = ts.open({"driver": "zarr3", "kvstore": store}).result()
        parts = {str(s.index): s for s in array.addressable_shards}
        for shard in parts.values():
            assert np.asarray(shard.data).tobytes() == expected[shard.index].read().result().tobytes(), name
            held += shard.data.nbytes
    return held
"""

RESTORE = """
with_target = ocp.StandardCheckpointer()
def target(path, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(name_of(path)))
def read():
    return ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")[0]["values"][0]["value"]
counts = {}
for which, directory in {"mesh": items, "plain": plain}.items():
    metadata = with_target.metadata(directory).item_metadata.tree
    before = read()
    tree = with_target.restore(directory, jax.tree_util.tree_map_with_path(target, metadata))
    counts[which] = read() - before
print(json.dumps({**counts, "held": check(tree)}))
"""

WITHOUT_TARGET = """
check(ocp.StandardCheckpointer().restore(items))
check(v1_load(sys.argv[1] + "/0"))
print("{}")
"""


def start(script: str, devices: int, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMON + script, *map(str, args)]
    return subprocess.Popen(
        command, env=with_devices(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> dict[str, int]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return dict(json.loads(out.splitlines()[-1]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "hf"
    make = [sys.executable, str(TOOLS / "make_checkpoint.py"), str(path), "--family", "llama"]
    subprocess.run([*make, "--gigabytes", str(MEGABYTES / 1000)], check=True, capture_output=True)
    return path


def convert(source: Path, output: Path, *options: str) -> Path:
    arguments = ["--model", "llama3.1-8b", "--source", str(source), "--output", str(output), "--quiet", "--jobs", "1"]
    assert main.run(["convert", *arguments, *options]) == 0
    return output


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted without a mesh: 16 shards along the first axis."""
    return convert(source, tmp_path_factory.mktemp("plain") / "out")


def specs_for(source: Path, mesh: str, capsys: Any) -> str:
    """The partition that the plan says each array has, by the array's name."""
    capsys.readouterr()
    assert main.run(["compile", "--model", "llama3.1-8b", "--source", str(source), "--mesh", mesh, "--dump-plan"]) == 0
    plan = json.loads(capsys.readouterr().out)
    kinds = plan["kinds"]
    return json.dumps({name.replace("/", "."): kinds[kind].get("spec", []) for name, kind, *_ in plan["outputs"]})


@pytest.fixture(scope="module")
def meshed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted for MESH, and compressed."""
    return convert(source, tmp_path_factory.mktemp("meshed") / "out", "--mesh", MESH, "--compression", "blosc-lz4")


def test_without_a_target_the_arrays_lie_as_on_the_mesh(source: Path, plain: Path, meshed: Path, capsys: Any) -> None:
    specs = specs_for(source, MESH, capsys)
    assert '["fsdp"]' in specs and '["tensor"]' in specs
    said(start(WITHOUT_TARGET, 8, meshed, plain, specs))


def test_the_last_line_is_the_python_that_restores_it(source: Path, plain: Path, tmp_path: Path, capsys: Any) -> None:
    specs = specs_for(source, MESH, capsys)
    convert(source, tmp_path / "it's out", "--mesh", MESH)
    *_, line = capsys.readouterr().out.splitlines()
    head, _, call = line.partition(" by: ")
    assert head == "restored on 8 devices"
    said(start(f'import orbax.checkpoint\ncheck({call})\nprint("{{}}")', 8, tmp_path, plain, specs))


def test_on_a_smaller_machine_a_target_restores_it(plain: Path, meshed: Path) -> None:
    assert said(start(RESTORE, 1, meshed, plain, "{}"))["held"] > MEGABYTES * 9e5


def test_each_process_reads_its_part_and_no_more(source: Path, plain: Path, tmp_path: Path, capsys: Any) -> None:
    """Two processes of two devices each restore it together, on fsdp=2,tensor=2, and so the one without a mesh."""
    mesh = "fsdp=2,tensor=2"
    out, specs = convert(source, tmp_path / "out", "--mesh", mesh), specs_for(source, mesh, capsys)
    whole = sum(p.stat().st_size for p in (out / "0" / "items").rglob("*") if p.is_file())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for process in [start(RESTORE, 2, out, plain, specs, address, i) for i in range(2)]:
        counted = said(process)
        assert counted["held"] < 0.51 * whole
        assert counted["mesh"] < 1.01 * counted["held"]  # the index is what it reads besides
        # Shards along the first axis are no such parts: of arrays that the mesh cuts along another, more is read.
        assert counted["plain"] > 1.25 * counted["held"]

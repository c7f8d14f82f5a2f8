"""Large chunks, written in pieces: the same values as ever, restored, verified, exported, resumed, and restored in less memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ckptc.cli import main
from ckptc.compile import large_chunks
from ckptc.diagnostics import InputError
from ckptc.plan.json import dumps, loads
from ckptc.plan.model import Plan
from ckptc.run import journal, runner, worker
from ckptc.run.journal import UNFINISHED
from ckptc.run.runner import Settings
from ckptc.run.verify import check_sums
from ckptc.storage.checkpoint.orbax_reader import open_saved
from golden import compile_case, differences, expected_of, known_cases, source_tensors
from restoring import restored, with_devices
from roundtrip import broken_promises, export_plan, exported

CASES = {case.id: case for case in known_cases()}
VARIED = ["qwen3_moe.scan", "llama3_1.scan", "gemma2.scan", "deepseek3.scan"]
LARGE = Path("items") / "large" / "chunks"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks count as large from 2 KiB on, so that tiny models have them."""
    monkeypatch.setattr(large_chunks, "LEAST", 2048)
    monkeypatch.setattr(large_chunks, "MOST", 16384)
    monkeypatch.setattr(large_chunks, "PIECE", 256)


def convert(plan: Plan, source: Path, output: Path, jobs: int = 1) -> None:
    text = dumps(plan)
    runner.run(loads(text), json.loads(text)["digest"], output, source, settings=Settings(jobs))


def cut(plan: Plan) -> int:
    """How many arrays have chunks of several pieces."""
    return sum(bool(a.stored) for a in plan.arrays)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("id_", VARIED)
@pytest.mark.parametrize("memory", [4096, 1 << 20], ids=["small units", "large units"])
def test_arrays_are_restored_and_verified_bit_for_bit(id_: str, memory: int, tmp_path: Path) -> None:
    case = CASES[id_]
    plan = compile_case(case, memory=memory)
    assert cut(plan) >= 3
    convert(plan, case.hf, tmp_path / "out", jobs=2)
    assert differences(restored(tmp_path / "out"), expected_of(case)) == []
    assert check_sums(tmp_path / "out" / "0").arrays == len(plan.arrays)
    (tmp_path / "plan.json").write_text(dumps(plan))
    verify = ["verify", str(tmp_path / "plan.json"), "--output", str(tmp_path / "out"), "--source", str(case.hf)]
    assert main.run([*verify, "--quiet"]) == 0


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("piece", [[3], [7, 7, 7], None])
def test_what_is_read_at_once_is_a_piece_if_pieces_fit(piece: list[int] | None, tmp_path: Path) -> None:
    plan = compile_case(CASES["llama3_1.scan"], memory=4096)
    convert(plan, CASES["llama3_1.scan"].hf, tmp_path / "out")
    wanted = {a.name: a.chunk for a in plan.arrays}
    if piece is not None:  # of another rank or size than the chunks
        metadata = tmp_path / "out" / "0" / "_CHECKPOINT_METADATA"
        said = json.loads(metadata.read_text())
        pieces = said["custom_metadata"]["ckptc"]["pieces"]
        said["custom_metadata"]["ckptc"]["pieces"] = dict.fromkeys(pieces, piece)
        metadata.write_text(json.dumps(said))
        wanted = {a.name: a.stored or a.chunk for a in plan.arrays}
    saved, _ = open_saved(tmp_path / "out")
    assert cut(plan) >= 3 and wanted == {a.name: a.chunk for a in saved.arrays if a.shape}


@pytest.mark.usefixtures("small")
def test_they_are_exported_bit_for_bit_and_held_against_their_checksums(tmp_path: Path) -> None:
    case = CASES["llama3_1.scan"]
    plan = compile_case(case, memory=4096)
    convert(plan, case.hf, tmp_path / "out")
    way_back = export_plan(case, tmp_path / "out")
    found, report = exported(way_back, tmp_path / "out", tmp_path / "hf", case)
    assert broken_promises(way_back, found, source_tensors(case.hf)) == []
    assert report.checksums == len(plan.arrays)
    assert report.read_bytes == way_back.totals.read_bytes
    with open(tmp_path / "out" / "0" / LARGE, "r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match="checksum-differs"):
        exported(export_plan(case, tmp_path / "out"), tmp_path / "out", tmp_path / "again", case)
    with pytest.raises(InputError, match="checksum-differs"):
        check_sums(tmp_path / "out" / "0")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("lost", [False, True], ids=["kept", "file lost"])
def test_an_interrupted_run_goes_on_with_what_is_there(
    lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the journal says of pieces counts as long as their file is there."""
    case = CASES["qwen3_moe.scan"]
    plan = compile_case(case, memory=4096)
    units = sum(len(list(a.units())) for a in plan.arrays)
    monkeypatch.setattr(journal, "SYNC_SECONDS", 0.0)
    made, count = worker.Worker._make, 0

    def interrupted(*args: object) -> tuple[int, int]:
        nonlocal count
        count += 1
        if count == units // 2:
            raise KeyboardInterrupt
        return made(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(worker.Worker, "_make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(plan, case.hf, tmp_path / "out")
    if lost:
        (tmp_path / "out" / UNFINISHED / "checkpoint" / LARGE).unlink()
    count, again = 0, 0

    def counted(*args: object) -> tuple[int, int]:
        nonlocal again
        again += 1
        return made(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.Worker, "_make", counted)
    convert(plan, case.hf, tmp_path / "out")
    assert again == units if lost else units // 3 < again < units * 2 // 3
    assert differences(restored(tmp_path / "out"), expected_of(case)) == []
    check_sums(tmp_path / "out" / "0")


MEASURE = """
import json, sys, threading
import jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
mesh = Mesh(np.array(jax.devices()), ("fsdp",))
checkpointer = ocp.PyTreeCheckpointer()
metadata = checkpointer.metadata(sys.argv[1])
tree = getattr(metadata, "item_metadata", metadata).tree
def args(leaf):
    if getattr(leaf, "shape", None) is None:
        return ocp.RestoreArgs()
    spec = P("fsdp") if leaf.shape and leaf.shape[0] % len(jax.devices()) == 0 else P()
    return ocp.ArrayRestoreArgs(sharding=NamedSharding(mesh, spec), global_shape=leaf.shape, dtype=leaf.dtype)
wanted = jax.tree.map(args, tree)
jax.block_until_ready(jax.device_put(np.ones(8)))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
out = jax.block_until_ready(checkpointer.restore(sys.argv[1], restore_args=wanted))
peak = status("VmHWM") - before
if len(sys.argv) > 2:
    ocp.PyTreeCheckpointer().save(sys.argv[2], out)
print(json.dumps(peak / sum(x.nbytes for x in jax.tree.leaves(out))))
"""


def peak(items: Path, devices: int, *save: Path) -> float:
    """The memory that plain Orbax's restore takes besides what it took before, as a multiple of the arrays."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(items), *map(str, save)], env=with_devices(devices), text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
def test_a_restore_takes_the_memory_that_orbaxs_own_checkpoint_takes(tmp_path: Path) -> None:
    """With chunks of a few MiB it is twice as much: see `ckptc.compile.large_chunks`. The least of three, for threads differ."""
    tools = Path(__file__).parents[2] / "tools"
    make = [sys.executable, str(tools / "make_checkpoint.py"), str(tmp_path / "hf"), "--family", "llama"]
    subprocess.run([*make, "--gigabytes", "0.5"], check=True, capture_output=True)
    options = ["--model", "llama3.1-8b", "--source", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--quiet"]
    assert main.run(["convert", *options]) == 0
    items = tmp_path / "out" / "0" / "items"
    peak(items, 4, tmp_path / "orbax")
    shutil.rmtree(tmp_path / "hf")
    ours = min(peak(items, 4) for _ in range(3))
    theirs = min(peak(tmp_path / "orbax", 4) for _ in range(3))
    assert ours < 1.25 * theirs, (ours, theirs)
    assert np.isfinite(ours)

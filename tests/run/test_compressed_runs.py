"""Runs that compress: what is restored is the same, and a run that is killed goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.run.test_resume import CASE, SLOW, assert_no_checkpoint, done_units, ended, restored, there, wait_for

from ckptc.cli import main
from ckptc.diagnostics import InputError
from ckptc.plan.check import check_plan
from ckptc.plan.json import dumps, loads
from ckptc.run import preflight, runner
from ckptc.run.verify import check_sums
from ckptc.spec.target import target_tree
from ckptc.storage.checkpoint.restored import open_restored
from golden import compile_case, differences, expected_of, known_cases

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def test_a_compressed_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    plan, plan_file, output = compile_case(CASE, memory=4096, compression="zstd:1"), tmp_path / "p", tmp_path / "out"
    plan_file.write_text(dumps(plan), "utf-8")
    assert loads(dumps(plan)) == plan
    process = there(plan_file, output, "--jobs", "2", patch=SLOW)
    wait_for(lambda: process.poll() is not None or done_units(output) > 5)
    time.sleep(random.Random(1).uniform(0, 0.1))
    os.killpg(process.pid, signal.SIGKILL)
    assert ended(process)[0] == -signal.SIGKILL
    assert_no_checkpoint(output)
    assert ended(there(plan_file, output, "--jobs", "3")) == (0, "")
    assert differences(restored(output), expected_of(CASE)) == []
    check_sums(output / "0")


def test_the_report_says_what_it_takes_on_the_disk(tmp_path: Path, capsys: Any) -> None:
    """Zeros, whose size is known: next to nothing."""
    import numpy as np
    from safetensors.numpy import save_file

    (tmp_path / "hf").mkdir()
    save_file({"e": np.zeros((1 << 12, 64), "float32")}, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text("{}")
    mapping = "family: f\ntarget: maxtext\nextra: true\ndims: { vocab: 4096, embed: 64 }\nmodels: { m: { repo: r } }\n"
    mapping += "tensors: { token_embedder/embedding: { from: e, as: vocab embed } }\n"
    (tmp_path / "m.yaml").write_text(mapping)
    given = ["--mapping", str(tmp_path / "m.yaml"), "--model", "m", "--source", str(tmp_path / "hf"), "--jobs", "1"]
    given += ["--dtype", "float32", "--compression", "zstd", "--output", str(tmp_path / "out")]
    assert main.run(["convert", *given, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["write_bytes"] == 1 << 20
    assert 1000 < record["stored_bytes"] < 20_000
    assert record["stored_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert main.run(["convert", *given, "--force"]) == 0
    assert "1.05 MB written as " in capsys.readouterr().out


@pytest.mark.parametrize(("compression", "enough"), [("none", False), ("zstd:3", True)])
def test_room_is_asked_for_only_where_compression_cannot_make_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, enough: bool
) -> None:
    """With room for half of it: enough, perhaps, when it is compressed."""
    plan = compile_case(CASE, compression=compression)
    index = (1 << 16) + 40 * sum(prod(-(-n // c) for n, c in zip(a.shape, a.chunk, strict=True)) for a in plan.arrays)
    free = plan.totals.write_bytes // 2 + index
    monkeypatch.setattr(
        preflight.os, "statvfs", lambda path: SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=1), raising=True
    )
    text = dumps(plan)

    def run() -> None:
        runner.run(plan, json.loads(text)["digest"], tmp_path / "out", CASE.hf)

    if enough:
        run()
    else:
        with pytest.raises(InputError, match="disk-full"):
            run()


@pytest.mark.parametrize("text", ["zstd:0", "zstd:23", "zstd:", "lz4", "ZSTD", "zstd:-1", "none:1"])
def test_other_compressions_are_a_usage_error(text: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended_with:
        main.run(["compile", "--model", "llama3.1-8b", "--compression", text])
    assert ended_with.value.code == 2
    assert "is not none, zstd, zstd:LEVEL" in capsys.readouterr().err


def test_the_plan_accounts_for_encoded_chunks() -> None:
    plain, compressed = compile_case(CASE), compile_case(CASE, compression="blosc-lz4")
    assert compressed.totals.peak_memory_bytes > plain.totals.peak_memory_bytes
    assert "compression" not in json.loads(dumps(plain))["layout"]
    for memory in (1 << 14, 1 << 16):
        peak = compile_case(CASE, memory=memory, compression="blosc-lz4").totals.peak_memory_bytes
        assert peak <= 3 * memory // 8  # an eighth each: what is read, two chunks, one of them encoded


def test_links_a_mesh_and_compression_go_together(tmp_path: Path) -> None:
    """What is linked is neither compressed nor cut by the mesh; the rest is both."""
    case = next(case for case in known_cases() if case.id == "llama3_1.scan")
    mesh = {"mesh": (("fsdp", 2),), "rules": target_tree("maxtext").rules}
    plan = compile_case(case, link=True, compression="zstd:3", **mesh)
    check_plan(plan, "plan")
    text = dumps(plan)
    runner.run(plan, json.loads(text)["digest"], tmp_path / "out", case.hf)
    stored = open_restored(tmp_path / "out" / "0" / "items")
    codecs = {a.name: "zstd" in str(stored[a.name].store.codec.to_json()) for a in plan.arrays}
    linked = {a.name for a in plan.arrays if a.link is not None}
    assert 0 < len(linked) < len(codecs)
    assert linked == {name for name, compressed in codecs.items() if not compressed}
    check_sums(tmp_path / "out" / "0")
    for a in plan.arrays:
        found = stored[a.name].start(tuple((0, n) for n in a.shape)).result()
        assert found.tobytes() == expected_of(case)[a.name].tobytes(), a.name

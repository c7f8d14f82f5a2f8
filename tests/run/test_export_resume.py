"""Exports that were interrupted: the same command goes on, and what comes out is what an undisturbed one writes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptc.diagnostics import InputError
from ckptc.plan.json import dumps
from ckptc.plan.model import Plan
from ckptc.plan.order import Unit, forwards
from ckptc.run.export import export
from ckptc.run.worker import Loaded, Worker
from ckptc.storage.checkpoint.notes import JOURNAL, read_notes
from golden import known_cases
from roundtrip import converted, export_plan

CASE = next(case for case in known_cases() if case.id == "gemma2.scan")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(CASE, tmp_path_factory.mktemp("saved") / "orbax")


@pytest.fixture(scope="module")
def plan(saved: Path) -> Plan:
    return export_plan(CASE, saved, memory=100 << 10, max_shard=100_000)


@pytest.fixture(scope="module")
def undisturbed(plan: Plan, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "hf"
    export(plan, output, saved, CASE.hf)
    return content(output)


def content(output: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in output.iterdir()}


def stopped(
    plan: Plan, saved: Path, output: Path, monkeypatch: pytest.MonkeyPatch, after: int, restart: bool = False
) -> list[int]:
    """An export that is interrupted after so many units; which those were, as positions in what it had to do."""
    made, done = Worker._make, list[int]()

    def make(self: Worker, key: int, unit: Unit, loaded: Callable[[], Loaded]) -> tuple[int, int]:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(key)
        return made(self, key, unit, loaded)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Worker, "_make", make)
        export(plan, output, saved, CASE.hf, restart=restart)
    return done


def codes(action: Callable[[], object]) -> list[str]:
    with pytest.raises(InputError) as caught:
        action()
    return [d.code for d in caught.value.diagnostics]


def test_it_goes_on_where_it_stopped(
    plan: Plan, saved: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, total = tmp_path / "hf", len(forwards(plan))
    assert total > 8
    assert len(stopped(plan, saved, output, monkeypatch, 3)) == 3
    assert all(name.startswith(".") for name in os.listdir(output))
    assert len(stopped(plan, saved, output, monkeypatch, 4)) == 4
    noted = read_notes(output)
    assert noted is not None and len(noted.units) == 7
    assert len(stopped(plan, saved, output, monkeypatch, total - 7 - 1)) == total - 8, "none is made twice"
    export(plan, output, saved, CASE.hf)
    assert content(output) == undisturbed


def test_what_was_written_and_not_noted_is_made_again(
    plan: Plan, saved: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "hf"
    stopped(plan, saved, output, monkeypatch, 5)
    lines = (output / JOURNAL).read_bytes().splitlines(keepends=True)
    (output / JOURNAL).write_bytes(lines[0] + b"[0,1]\n[2,3")  # as a crash cuts it short
    noted = read_notes(output)
    assert noted is not None and noted.units == {0, 1}
    export(plan, output, saved, CASE.hf)
    assert content(output) == undisturbed


def test_a_file_that_is_gone_is_made_again_with_all_the_others(
    plan: Plan, saved: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "hf"
    stopped(plan, saved, output, monkeypatch, 5)
    next(output.glob(".model*")).unlink()
    export(plan, output, saved, CASE.hf)
    assert content(output) == undisturbed


def test_another_plan_is_refused_and_its_work_kept(
    plan: Plan, saved: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, other = tmp_path / "hf", export_plan(CASE, saved, memory=100 << 10)
    stopped(plan, saved, output, monkeypatch, 5)
    before = content(output)
    assert codes(lambda: export(other, output, saved, CASE.hf)) == ["other-plan"]
    assert content(output) == before
    export(other, output, saved, CASE.hf, restart=True)
    assert (output / "model.safetensors").exists() and not (output / JOURNAL).exists()


def test_other_weights_are_refused(plan: Plan, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "hf"
    stopped(plan, saved, output, monkeypatch, 5)
    head, *lines = (output / JOURNAL).read_text().splitlines()
    record = json.loads(head)
    record["source"] = {name: [*status[:3], status[3] - 1, *status[4:]] for name, status in record["source"].items()}
    (output / JOURNAL).write_text("\n".join([json.dumps(record), *lines, ""]))
    assert codes(lambda: export(plan, output, saved, CASE.hf)) == ["source-changed"]


KILLED = """
import sys, time
from ckptc.cli.main import main
from ckptc.run import export
from ckptc.run.worker import Worker
export.SYNC_SECONDS = 0.0
make = Worker._make
def slowly(self, key, unit, loaded):
    time.sleep(0.01)
    return make(self, key, unit, loaded)
Worker._make = slowly
main()
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_at_random_moments_it_ends_as_an_undisturbed_one(
    jobs: int, plan: Plan, saved: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_text(dumps(plan), "utf-8")
    argv = ["run", "plan.json", "--source", str(saved), "--output", "hf", "--config-from", str(CASE.hf), "--quiet"]
    command, rng, kills = [sys.executable, "-c", KILLED, *argv, "--jobs", str(jobs)], random.Random(jobs), 0
    for _ in range(20):
        process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
        end, journal = time.monotonic() + 60, tmp_path / "hf" / JOURNAL
        size = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and time.monotonic() < end:  # until something more is noted
            if journal.exists() and journal.stat().st_size > max(size, 200):
                break
            time.sleep(0.005)
        time.sleep(rng.random() / 20)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        if kills == 4:
            break
    assert kills >= 2
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    assert content(tmp_path / "hf") == undisturbed

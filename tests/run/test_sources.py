"""A source is known by its weights: what is unfinished does not go on with others, and a run does not read two."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.diagnostics import Diagnostic, InputError
from ckptc.plan.json import dumps
from ckptc.plan.model import Plan
from ckptc.run import runner, worker
from ckptc.run.journal import UNFINISHED
from ckptc.run.runner import Settings
from ckptc.run.verify import check_sums
from ckptc.spec import mapping as spec
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from golden import known_cases, options_of

CASE = next(case for case in known_cases() if case.id == "qwen3_moe.scan")

Change = Callable[[Path], object]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CASE.hf, tmp_path / "source"))


def compiled(source: Path, **changes: Any) -> Plan:
    mapping, model = spec.find_model(CASE.model)
    return compile_plan(mapping, model, options_of(CASE, memory=2048, **changes), open_checkpoint(source))


def start(plan: Plan, source: Path, output: Path, **settings: Any) -> None:
    runner.run(plan, json.loads(dumps(plan))["digest"], output, source, settings=Settings(1, **settings))


def shard(source: Path) -> Path:
    return sorted(source.glob("*.safetensors"))[0]


def edit(path: Path, offset: int = -1) -> None:
    """Another byte at one place, in the same file."""
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END)
        byte = file.read(1)
        file.seek(offset, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def interrupted(plan: Plan, source: Path, output: Path, units: int = 50, change: Change | None = None) -> None:
    """A run that fails after some units, or in which the source changes then."""
    load, count = worker.Worker._load, 0

    def counting(self: Any, unit: Any, turn: int) -> Any:
        nonlocal count
        count += 1
        if count == units:
            if change is None:
                raise OSError(errno.EIO, "the disk failed")
            change(source)
        return load(self, unit, turn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Worker, "_load", counting)
        start(plan, source, output)


def refused(action: Callable[..., object], *arguments: Any, **settings: Any) -> Diagnostic:
    with pytest.raises(InputError) as caught:
        action(*arguments, **settings)
    return caught.value.diagnostics[0]


def units_done(output: Path) -> int:
    return sum(len(p.read_bytes().split(b"\n")) - 2 for p in (output / UNFINISHED).glob("journal.*[0-9]"))


# -- other weights of the same shapes ---------------------------------------------------------------------------


def test_plans_of_other_weights_differ(source: Path) -> None:
    first = dumps(compiled(source))
    assert dumps(compiled(source)) == first
    edit(shard(source))
    assert dumps(compiled(source)) != first


def test_a_plan_does_not_run_on_other_weights(source: Path, tmp_path: Path) -> None:
    plan = compiled(source)
    edit(shard(source))
    found = refused(start, plan, source, tmp_path / "out")
    assert found.code == "source-changed" and shard(source).name in found.message
    assert [note.split(" sampled")[0] for note in found.notes] == ["expected: content", "found: content"]
    assert not (tmp_path / "out").exists()


def test_a_conversion_does_not_go_on_with_other_weights(source: Path, tmp_path: Path) -> None:
    output, other = tmp_path / "out", Path(shutil.copytree(source, tmp_path / "other"))
    edit(shard(other))
    assert refused(interrupted, compiled(source), source, output).code == "unwritable-output"
    done = units_done(output)
    assert done
    found = refused(start, compiled(other), other, output)
    assert found.code == "other-plan" and f"{shard(source).name} has another content: other weights" in found.notes
    assert units_done(output) == done
    start(compiled(source), source, output)
    check_sums(output / "0")


# -- files that may be others ------------------------------------------------------------------------------------


def unsampled(source: Path) -> None:
    """As an edit that no sample shows: the times of change do."""
    os.utime(shard(source), ns=(1, 1))


def copied(source: Path) -> None:
    """The same bytes and times, in another file."""
    path = shard(source)
    shutil.copy2(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def touched_and_set_back(source: Path) -> None:
    path = shard(source)
    before = os.stat(path)
    edit(path)
    edit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "words"),
    [(unsampled, "last written"), (copied, "another file of that name"), (touched_and_set_back, "last changed")],
)
def test_an_unfinished_run_does_not_go_on_with_files_that_may_be_others(
    source: Path, tmp_path: Path, change: Change, words: str
) -> None:
    plan, output = compiled(source), tmp_path / "out"
    assert refused(interrupted, plan, source, output).code == "unwritable-output"
    done = units_done(output)
    change(source)
    found = refused(start, plan, source, output)
    assert found.code == "source-changed" and found.notes[0].startswith(f"{shard(source).name}: {words}")
    assert "--restart" in (found.help or "") and units_done(output) == done
    start(plan, source, output, restart=True)
    check_sums(output / "0")


def test_a_copy_elsewhere_is_said_to_be_elsewhere(source: Path, tmp_path: Path) -> None:
    plan, output, other = compiled(source), tmp_path / "out", Path(shutil.copytree(source, tmp_path / "other"))
    refused(interrupted, plan, source, output)
    assert refused(start, plan, other, output).notes[0] == f"read then from {source}, now from {other}"


@pytest.mark.parametrize("harmless", [lambda p: os.chmod(p, 0o600), lambda p: os.link(p, p.with_name("second-name"))])
def test_permissions_and_links_are_no_change(source: Path, tmp_path: Path, harmless: Change) -> None:
    plan, output = compiled(source), tmp_path / "out"
    refused(interrupted, plan, source, output)
    harmless(shard(source))
    interrupted(plan, source, output, units=5, change=lambda s: os.chmod(shard(s), 0o640))
    check_sums(output / "0")


def test_a_directory_that_was_renamed_is_the_same_source(source: Path, tmp_path: Path) -> None:
    plan, output = compiled(source), tmp_path / "out"
    refused(interrupted, plan, source, output)
    start(plan, source.rename(tmp_path / "moved"), output)
    check_sums(output / "0")


# -- changes while it is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda s: edit(shard(s)), copied, unsampled, lambda s: shard(s).unlink()])
def test_a_source_that_changes_while_it_is_read_is_not_committed(source: Path, tmp_path: Path, change: Change) -> None:
    plan, output = compiled(source), tmp_path / "out"
    found = refused(interrupted, plan, source, output, change=change)
    assert found.code == "source-changed" and "while it was read" in found.message
    assert shard(source).name in found.notes[0] or not shard(source).exists() or "no longer there" in found.notes[0]
    assert not (output / "0").exists()


def test_a_source_that_changes_at_the_very_end_is_not_committed(source: Path, tmp_path: Path) -> None:
    plan, output = compiled(source), tmp_path / "out"
    digest = json.loads(dumps(plan))["digest"]
    found = refused(
        runner.run, plan, digest, output, source, settings=Settings(1), before_commit=lambda _: edit(shard(source))
    )
    assert found.code == "source-changed" and not (output / "0").exists()

"""Runs that are killed, and go on: what comes out is what an undisturbed run gives, or nothing is there."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest
from msgspec.structs import replace

from ckptc.cli.main import run as command
from ckptc.diagnostics import InputError
from ckptc.plan.json import dumps, loads
from ckptc.plan.model import Plan
from ckptc.run import journal, runner, worker
from ckptc.run.journal import LOCK, UNFINISHED
from ckptc.run.runner import Settings
from ckptc.run.verify import check_sums
from ckptc.storage.checkpoint.orbax_writer import ItemsWriter
from golden import checkpoint_of, compile_case, differences, expected_of, known_cases
from restoring import restored
from waiting import SECONDS, wait_for

CASE = next(case for case in known_cases() if case.id == "qwen3_moe.scan")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Hundreds of units."""
    made = compile_case(CASE, memory=2048)
    assert sum(len(list(a.units())) for a in made.arrays) > 300
    return made


@pytest.fixture(scope="module")
def sums(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checksums of an undisturbed run, whose arrays are the expected ones."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    here(plan, output)
    assert differences(restored(output), expected_of(CASE)) == []
    return checksums(output)


def here(
    plan: Plan, output: Path, before_commit: Callable[[Path], None] = lambda step: None, jobs: int = 1, **settings: Any
) -> None:
    """A run in this process."""
    text = dumps(plan)
    digest = json.loads(text)["digest"]
    runner.run(loads(text), digest, output, CASE.hf, settings=Settings(jobs, **settings), before_commit=before_commit)


def there(plan_file: Path, output: Path, *options: str, patch: str = "") -> subprocess.Popen[str]:
    """`ckptc run` in a process group of its own, with a line in the journal for every unit; `patch` is run before.

    Without waiting for the disk: what a process has written outlives it, if not the machine.
    """
    command = ["run", str(plan_file), "--source", str(CASE.hf), "--output", str(output), "--quiet", *options]
    script = f"""\
import os, signal, time
from ckptc.cli.main import main
from ckptc.run import journal, output, pool, runner, work, worker
journal.SYNC_SECONDS = 0.0
os.fsync = os.fdatasync = lambda descriptor: None
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background deaf to it
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
{patch}
main({command!r})
"""
    pipe, argv = subprocess.PIPE, [sys.executable, "-c", script]
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


SLOW = """\
made = worker.Worker._make
worker.Worker._make = lambda *a: (time.sleep(0.004), made(*a))[1]
"""


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what it said."""
    err = process.communicate(timeout=SECONDS)[1]
    return process.returncode, err


def checksums(output: Path) -> dict[str, str]:
    metadata = json.loads((output / "0" / "_CHECKPOINT_METADATA").read_text())
    found: dict[str, str] = metadata["custom_metadata"]["ckptc"]["checksums"]
    return found


def assert_whole(output: Path, sums: dict[str, str]) -> None:
    """The output is there, right, and alone."""
    assert [p.name for p in output.iterdir()] == ["0"]
    assert sorted(p.name for p in (output / "0").iterdir()) == ["_CHECKPOINT_METADATA", "commit_success.txt", "items"]
    assert checksums(output) == sums  # as those of the arrays that Orbax has restored
    check_sums(output / "0")


def assert_no_checkpoint(output: Path) -> None:
    """Nothing that Orbax would take for a checkpoint, whichever of its interfaces is asked."""
    assert not (output / "0").exists()
    if not output.exists():
        return
    assert ocp.utils.checkpoint_steps(output) == []
    with ocp.CheckpointManager(output, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        assert manager.all_steps() == []
    with ocp_v1.training.Checkpointer(output) as checkpointer:
        assert list(checkpointer.checkpoints) == []
    # `is_orbax_checkpoint` is true of any directory. Orbax before 0.12 says interpret.
    with pytest.raises(ValueError, match=r"Failed to (load|interpret)"):
        ocp_v1.load_pytree(output)


def older_checkpoint(output: Path, name: str) -> None:
    """What --force takes for a checkpoint, with a file in it to know it by."""
    (output / "0").mkdir(parents=True)
    (output / "0" / "_CHECKPOINT_METADATA").touch()
    (output / "0" / name).touch()


def done_units(output: Path) -> int:
    """Units that the journals of a run speak of."""
    journals = [path.read_bytes().split(b"\n") for path in (output / UNFINISHED).glob("journal.*[0-9]")]
    return sum(len(json.loads(line)["units"]) for lines in journals for line in lines[1:-1])


# --- killed anywhere --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(
    plan_file: Path, sums: dict[str, str], seed: int, tmp_path: Path
) -> None:
    """With another number of workers each time, and what was done once is not done again."""
    rng, output, kills, done = random.Random(seed), tmp_path / "out", 0, 0
    while kills < 5:
        process = there(plan_file, output, "--jobs", str(rng.choice([1, 2, 3, 5])), patch=SLOW)
        wait_for(lambda: process.poll() is not None or done_units(output) > done)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        if ended(process)[0] == 0:
            break
        kills += 1
        assert_no_checkpoint(output)
        assert done_units(output) > done
        done = done_units(output)
    assert kills >= 2
    assert ended(there(plan_file, output, "--jobs", "2")) == (0, "")
    assert_whole(output, sums)
    assert differences(restored(output), expected_of(CASE)) == []


AFTER = """\
def after(module, name):
    plain = getattr(module, name)
    setattr(module, name, lambda *a, **k: (plain(*a, **k), die()))
"""


NEW = [
    "after(journal.Journal, '__init__')",
    "after(work.ItemsWriter, 'write_chunk')",
    "os.fsync = die",
    "os.truncate = os.ftruncate = die",
    "after(journal.Journal, 'flush')",
    "work.ItemsWriter.close = die",
    "after(work.ItemsWriter, 'close')",
    "after(journal, 'commit')",
]
OLDER = ["output.open_unfinished = die", "after(output, 'open_unfinished')", "runner.finish = die"]
OLDER += ["after(runner, 'finish')", "after(journal, 'replace')", "after(journal, 'commit')"]


@pytest.mark.parametrize("patch", NEW)
def test_a_run_killed_at_any_step_of_the_way_is_finished_by_the_same_command(
    plan: Plan, plan_file: Path, sums: dict[str, str], patch: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert ended(there(plan_file, output, "--jobs", "1", patch=AFTER + patch))[0] == -signal.SIGKILL
    assert (output / "0").exists() == ("commit" in patch)
    here(plan, output)
    assert_whole(output, sums)


@pytest.mark.parametrize("patch", OLDER)
def test_a_replacement_killed_at_any_step_leaves_the_older_output_or_the_new_one(
    plan: Plan, plan_file: Path, sums: dict[str, str], patch: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    older_checkpoint(output, "older")
    assert ended(there(plan_file, output, "--jobs", "1", "--force", patch=AFTER + patch))[0] == -signal.SIGKILL
    if "replace" in patch:  # between the two renames: kept aside, where the next run finds it
        assert (output / UNFINISHED / "replaced" / "older").exists() and not (output / "0").exists()
    else:
        assert (output / "0" / "older").exists() != ("commit" in patch)
    here(plan, output, force=True)
    assert_whole(output, sums)


def test_a_run_killed_while_it_tidies_up_has_its_output(
    plan: Plan, plan_file: Path, sums: dict[str, str], tmp_path: Path
) -> None:
    """There is no trace of a run any more; the output is there, and is said to be."""
    output, patch = tmp_path / "out", AFTER + "after(journal.Unfinished, 'forget')"
    assert ended(there(plan_file, output, "--jobs", "1", patch=patch))[0] == -signal.SIGKILL
    with pytest.raises(InputError, match="output-exists"):
        here(plan, output)
    assert checksums(output) == sums
    assert ended(there(plan_file, output, "--jobs", "1", "--force")) == (0, "")
    assert_whole(output, sums)


def test_units_that_are_done_are_not_made_again(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, units, output = worker.Worker._make, [], tmp_path / "out"

    def make(self: Any, key: int, unit: Any, loaded: Any) -> tuple[int, int]:
        if len(units) == 100:
            raise KeyboardInterrupt
        units.append((unit.outputs, unit.box))
        return made(self, key, unit, loaded)

    monkeypatch.setattr(worker.Worker, "_make", make)
    with pytest.raises(KeyboardInterrupt):
        here(plan, output)
    first = units[:]
    units.clear()
    with pytest.raises(KeyboardInterrupt):
        here(plan, output)
    assert len(first) == len(units) == 100 and not set(first) & set(units)


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_nothing_is_a_checkpoint_before_the_commit(plan: Plan, tmp_path: Path) -> None:
    """Not even when all of it has been written."""
    output, looked = tmp_path / "out", []

    def look(step: Path) -> None:
        assert step.is_relative_to(output / UNFINISHED)
        assert_no_checkpoint(output)
        looked.append(step)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        here(plan, output, look)
    assert len(looked) == 1
    assert_no_checkpoint(output)


def test_an_incomplete_tree_is_never_committed(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal that claims a unit too many: its chunks are not there, whatever it says."""
    add = journal.Journal.add

    def claim(self: Any, unit: int, array: int, chunks: Any, total: int) -> None:
        add(self, unit, array, chunks if unit != 7 else [], total)

    monkeypatch.setattr(journal.Journal, "add", claim)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "finish", lambda *_, **__: (_ for _ in ()).throw(ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            here(plan, tmp_path / "out")
    with pytest.raises(InputError, match=r"damaged-output.*chunks were not written"):
        here(plan, tmp_path / "out")
    assert_no_checkpoint(tmp_path / "out")


def test_an_output_that_is_there_is_refused_and_kept(plan: Plan, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "0").mkdir(parents=True)
    (output / "0" / "mine").touch()
    with pytest.raises(InputError, match="output-exists"):
        here(plan, output)
    assert (output / "0" / "mine").exists() and not (output / UNFINISHED).exists()


def test_force_replaces_an_output_only_at_the_end(plan: Plan, sums: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    older_checkpoint(output, "old")

    def fails(step: Path) -> None:
        assert (step / "items" / "manifest.ocdbt").exists() and (output / "0" / "old").exists()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        here(plan, output, fails, force=True)
    assert {p.name for p in (output / "0").iterdir()} == {"old", "_CHECKPOINT_METADATA"}
    with pytest.raises(InputError, match="output-exists"):
        here(plan, output)
    here(plan, output, force=True)
    assert_whole(output, sums)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_umasks_permissions(plan: Plan, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        here(plan, tmp_path / "out", jobs=2)
    finally:
        os.umask(before)
    found = {(p.is_dir(), p.stat().st_mode & 0o777) for p in (tmp_path / "out").rglob("*")}
    assert found == {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}


# --- whose it is ------------------------------------------------------------------------------------------------------


def test_another_plan_is_refused_until_it_is_told_to_restart(
    plan: Plan, plan_file: Path, sums: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert (
        ended(
            there(
                plan_file,
                output,
                patch=AFTER + "after(journal.Journal, 'flush')",
            )
        )[0]
        != 0
    )
    other = compile_case(CASE, shards=4)
    with pytest.raises(InputError, match="other-plan"):
        here(other, output)
    here(other, output, restart=True)
    assert differences(restored(output), expected_of(CASE)) == []
    assert checksums(output) != sums  # chunks are others


def test_two_runs_into_one_output_exclude_each_other(plan: Plan, plan_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = there(plan_file, output, "--jobs", "2", patch=SLOW.replace("0.004", "0.1"))
    try:
        wait_for(lambda: done_units(output) or process.poll() is not None)
        for settings in ({}, {"restart": True}, {"force": True}):
            with pytest.raises(InputError, match="output-busy"):
                here(plan, output, **settings)
        assert process.poll() is None and done_units(output) > 0
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        ended(process)
    here(plan, output)


def test_workers_hold_the_lock_as_long_as_they_live(plan: Plan, plan_file: Path, tmp_path: Path) -> None:
    """Killed alone, the parent takes its workers along; until they are gone, nobody else may write."""
    output = tmp_path / "out"
    process = there(plan_file, output, "--jobs", "3", patch=SLOW)
    wait_for(lambda: done_units(output) or process.poll() is not None)
    process.kill()
    ended(process)

    def entered() -> bool:
        try:
            here(plan, output)
        except InputError as error:
            assert error.diagnostics[0].code == "output-busy"
            return False
        return True

    wait_for(entered)
    assert differences(restored(output), expected_of(CASE)) == []


# --- failures on the way ----------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_ends_the_run_and_the_same_command_goes_on(
    plan: Plan, plan_file: Path, sums: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    patch = "made = worker.Worker._make\nworker.Worker._make = lambda s, k, u, x: die() if k == 9 else made(s, k, u, x)"
    code, err = ended(there(plan_file, output, "--jobs", "2", patch=patch))
    assert code == 1 and "error[worker-died]: a worker process was killed (signal 9)" in err
    assert "Traceback" not in err and done_units(output) > 0
    here(plan, output, jobs=2)
    assert_whole(output, sums)


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "disk-full"), (errno.EDQUOT, "disk-full"), (errno.EIO, "unwritable-output")]
)
def test_a_disk_that_fills_up_says_so_and_leaves_a_state_to_go_on_from(
    plan: Plan, plan_file: Path, sums: dict[str, str], jobs: str, number: int, code: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    patch = f"""\
count, pwrite = 0, os.pwrite
def full(*a):
    global count
    count += 1
    if count > 100:
        raise OSError({number}, os.strerror({number}))
    return pwrite(*a)
os.pwrite = full
"""
    status, err = ended(there(plan_file, output, "--jobs", jobs, patch=patch))
    assert status == 1 and f"error[{code}]: " in err and str(output) in err and os.strerror(number) in err
    assert "the same command goes on from there" in err and "Traceback" not in err
    assert done_units(output) >= 5
    assert_no_checkpoint(output)
    here(plan, output, jobs=int(jobs))
    assert_whole(output, sums)


@pytest.mark.parametrize("what", ["journal.Lines.__init__", "runner.finish", "journal.commit"])
def test_a_disk_that_fills_up_at_another_moment_says_so(plan: Plan, what: str, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"ckptc.run.{what}", full)
        with pytest.raises(InputError, match="disk-full"):
            here(plan, tmp_path / "out")
    here(plan, tmp_path / "out")


def test_ctrl_c_keeps_what_is_done(plan_file: Path, sums: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = there(plan_file, output, "--jobs", "2", patch=SLOW.replace("0.004", "0.5"))
    wait_for(lambda: done_units(output) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to all of the group
    code, err = ended(process)
    assert (code, err) == (130, "interrupted\n")
    done = done_units(output)
    assert done > 0
    assert ended(there(plan_file, output, "--jobs", "2")) == (0, "")
    assert_whole(output, sums)


def test_a_source_that_goes_away_half_way_is_an_input_error(plan: Plan, tmp_path: Path) -> None:
    source = Path(shutil.copytree(CASE.hf, tmp_path / "source"))
    load, count = worker.Worker._load, 0

    def cutting(self: Any, unit: Any, turn: int) -> Any:
        nonlocal count
        count += 1
        if count == 50:
            for path in source.glob("*.safetensors"):
                os.truncate(path, 100)
        return load(self, unit, turn)

    digest = json.loads(dumps(plan))["digest"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Worker, "_load", cutting)
        with pytest.raises(InputError, match="source-truncated"):
            runner.run(plan, digest, tmp_path / "out", source)
    assert count < 60 and done_units(tmp_path / "out") >= 49
    with pytest.raises(InputError, match="source-changed"):  # files of that content, but which may not be those
        here(plan, tmp_path / "out")
    assert done_units(tmp_path / "out") >= 49
    here(plan, tmp_path / "out", restart=True)
    assert differences(restored(tmp_path / "out"), expected_of(CASE)) == []


def test_writers_of_a_wider_run_are_finished_by_a_narrower_one(plan: Plan, tmp_path: Path) -> None:
    """Their files are part of the checkpoint, though no worker of the second run has their number."""
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "finish", lambda *_, **__: (_ for _ in ()).throw(ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            here(plan_with_memory(plan), output, jobs=5)
    closed: list[ItemsWriter] = []
    close = ItemsWriter.close

    def note(writer: ItemsWriter) -> None:
        closed.append(writer)
        close(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ItemsWriter, "close", note)
        here(plan_with_memory(plan), output, jobs=1)
    assert len(closed) == len(list((output / "0" / "items").glob("ocdbt.process_*"))) > 1
    assert differences(restored(output), expected_of(CASE)) == []


def plan_with_memory(plan: Plan) -> Plan:
    """The same units, with room for many of them at once."""
    return replace(plan, choices=replace(plan.choices, memory=1 << 20))


def test_the_command_takes_all_the_cores_it_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    def record(*arguments: Any) -> None:
        seen.extend(a for a in arguments if isinstance(a, Settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", record)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    argv = ["convert", "--model", CASE.model, "--source", str(CASE.hf), "--set", f"padded_vocab={CASE.vocab}"]
    argv += ["--output", str(tmp_path / "out")]
    assert command(argv) == 130
    assert command([*argv, "--jobs", "7", "--restart", "--force", "--check-source", "auto"]) == 130
    assert seen == [Settings(3), Settings(7, restart=True, force=True, sha256="auto")]
    assert checkpoint_of(CASE.hf).tensors and not (tmp_path / "out" / LOCK).exists()

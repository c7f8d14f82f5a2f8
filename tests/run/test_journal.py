"""The journal: what it says is true after any crash, and what is not true it does not say."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptc.diagnostics import InputError
from ckptc.run import journal
from ckptc.run.journal import LOCK, UNFINISHED, Journal, Unfinished, open_unfinished, output_error, read_sums
from ckptc.storage.checkpoint.orbax_writer import NO_LARGE, Entry, ItemsWriter
from ckptc.storage.formats.orbax_metadata import ArraySpec

SPEC = ArraySpec(("params", "params", "w"), (64,), "uint8", (8,), (1,))
PLAN, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def enter(output: Path, plan: str = PLAN, restart: bool = False) -> Unfinished:
    return open_unfinished(output, output / "0", plan, restart)


def writer(unfinished: Unfinished, process: int = 0) -> ItemsWriter:
    return ItemsWriter(unfinished.place, [SPEC], process=process, resume=unfinished.writers.get(process))


def work(unfinished: Unfinished, units: range, process: int = 0) -> ItemsWriter:
    """Makes units, each of one chunk, with a line for each."""
    written = writer(unfinished, process)
    with Journal(unfinished, process, written) as lines:
        for unit in units:
            entry = written.write_chunk(0, (unit,), np.full(8, unit, dtype=np.uint8))
            lines.add(unit, 0, [entry], 1000 + unit)
            lines.flush()
    return written


def killed(output: Path, units: range = range(3), process: int = 0) -> Path:
    """A run that made some units and ended there. Its journal."""
    unfinished = enter(output)
    work(unfinished, units, process)
    unfinished.release()
    return output / UNFINISHED / f"journal.{process}"


def data_file(output: Path, process: int = 0) -> Path:
    (file,) = (output / UNFINISHED / "checkpoint" / "items" / f"ocdbt.process_{process}" / "d").iterdir()
    return file


# --- whose output it is -----------------------------------------------------------------------------------------------


def test_two_runs_exclude_each_other(output: Path) -> None:
    first = enter(output)
    with pytest.raises(InputError, match=f"output-busy: another run is writing to {output}"):
        enter(output)
    first.release()
    enter(output).release()


def test_a_living_run_of_another_process_is_not_touched(output: Path) -> None:
    script = f"""\
from pathlib import Path
from ckptc.run.journal import open_unfinished
unfinished = open_unfinished(Path({str(output)!r}), Path({str(output / "0")!r}), {PLAN!r})
(unfinished.directory / "stale").touch()
print("locked", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as living:
        assert living.stdout and living.stdout.readline() == "locked\n"
        for restart in (False, True):
            with pytest.raises(InputError, match="output-busy"):
                enter(output, OTHER, restart)
        assert (output / UNFINISHED / "stale").exists()
        living.kill()
    enter(output)
    assert not (output / UNFINISHED / "stale").exists()


def test_a_lock_whose_file_was_removed_meanwhile_is_no_lock(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run before ends, and removes its file, between this one's opening it and locking it."""
    output.mkdir()
    opened, opens = os.open, []

    def open_and_lose(path: Any, *rest: Any, **named: Any) -> int:
        descriptor = opened(path, *rest, **named)
        opens.append(path)
        if len(opens) == 1:
            os.unlink(path)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_lose)
    lock = journal._lock(output)
    assert len(opens) == 2 and os.path.samestat(os.fstat(lock), os.stat(output / LOCK))


def test_a_file_system_without_locks_is_not_a_busy_output(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(journal.fcntl, "flock", refuse)
    with pytest.raises(InputError, match=r"unwritable-output: cannot write to .*: No locks available"):
        enter(output)


def test_another_plan_is_refused_and_its_work_kept(output: Path) -> None:
    killed(output)
    with pytest.raises(InputError, match="other-plan: an unfinished run of another plan is in") as caught:
        enter(output, OTHER)
    assert caught.value.diagnostics[0].notes == (f"expected: {OTHER}", f"found:    {PLAN}")
    assert enter(output).done == {0, 1, 2}  # and the refused one does not hold the lock


@pytest.mark.parametrize("plan", [PLAN, OTHER])
def test_restart_throws_away_what_there_is(output: Path, plan: str) -> None:
    killed(output)
    unfinished = enter(output, plan, restart=True)
    assert (unfinished.done, unfinished.writers) == (set(), {})
    assert sorted(p.name for p in unfinished.directory.iterdir()) == ["plan", "source"]
    unfinished.release()
    assert enter(output, plan).done == set()


def test_a_plan_that_a_crash_left_empty_is_nobodys(output: Path) -> None:
    killed(output)
    (output / UNFINISHED / "plan").write_bytes(b"")
    assert enter(output, OTHER).done == set()


@pytest.mark.parametrize("name", [UNFINISHED, LOCK])
def test_a_link_to_elsewhere_is_not_followed(name: str, output: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    output.mkdir(exist_ok=True)
    (output / name).symlink_to(elsewhere if name == UNFINISHED else elsewhere / "new")
    for restart in (False, True):
        with pytest.raises(InputError, match=r"unwritable-output.*symbolic link"):
            open_unfinished(output, output / "0", PLAN, restart)
    assert [p.name for p in elsewhere.iterdir()] == ["precious"]


def test_an_output_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"unwritable-output: cannot write to .*/file: File exists"):
        enter(tmp_path / "file")
    with pytest.raises(InputError, match=r"unwritable-output: cannot write to .*/file/out: Not a directory"):
        enter(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk-full"),
        (errno.EDQUOT, "disk-full"),
        (errno.EIO, "unwritable-output"),
        (errno.EROFS, "unwritable-output"),
    ],
)
def test_what_the_system_refuses_names_the_output_and_the_way_on(number: int, code: str) -> None:
    (found,) = output_error(Path("out"), OSError(number, os.strerror(number))).diagnostics
    assert found.code == code and "out" in found.message and os.strerror(number) in found.message
    assert found.help and "the same command goes on from there" in found.help


# --- what is believed -------------------------------------------------------------------------------------------------


def test_what_is_done_is_found_again(output: Path) -> None:
    killed(output)
    unfinished = enter(output)
    assert unfinished.done == {0, 1, 2}
    state = unfinished.writers[0]
    assert state.files == (data_file(output).name,)
    assert state.entries == tuple(Entry(f"params.params.w/c/{i}", 8 * i, 8) for i in range(3))
    assert read_sums(unfinished) == {0: 3003}


@pytest.mark.parametrize("keep", range(1, 60))
def test_a_line_cut_short_is_not_there_and_the_next_one_is_whole(output: Path, keep: int) -> None:
    path = killed(output)
    lines = path.read_bytes().splitlines(keepends=True)
    last = lines[-1][: min(keep, len(lines[-1]) - 1)]
    path.write_bytes(b"".join(lines[:-1]) + last)
    unfinished = enter(output)
    assert unfinished.done == {0, 1}
    work(unfinished, range(2, 5))
    unfinished.release()
    again = enter(output)
    assert again.done == {0, 1, 2, 3, 4}
    assert read_sums(again) == {0: 5010}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_not_blamed_on_the_output(number: int) -> None:
    (found,) = output_error(Path("out"), OSError(number, os.strerror(number))).diagnostics
    assert found.code == "system-refused" and "open files" in (found.help or "") and "out:" not in found.message


@pytest.mark.parametrize(
    "line",
    [
        b"\0" * 40,
        b"[]",
        b"{}",
        b'{"units":[1],"chunks":[]}',
        b'{"units":1,"sums":[],"chunks":[]}',
        b'{"units":["x"],"sums":[],"chunks":[]}',
        b'{"units":[1],"sums":[],"chunks":[["w",0]]}',
        b'{"units":[1],"sums":[],"chunks":[["params.params.w/c/1",-8,8]]}',
        b'{"units":[1],"sums":[],"chunks":[["params.params.w/c/1",999,8]]}',
    ],
)
def test_from_a_line_that_cannot_be_true_on_nothing_is_believed(output: Path, line: bytes) -> None:
    path = killed(output)
    lines = path.read_bytes().split(b"\n")
    lines.insert(2, line)
    path.write_bytes(b"\n".join(lines))
    unfinished = enter(output)
    assert unfinished.done == {0}
    work(unfinished, range(1, 4))
    unfinished.release()
    assert enter(output).done == {0, 1, 2, 3}


def test_units_whose_data_a_crash_lost_are_made_again(output: Path) -> None:
    killed(output)
    os.truncate(data_file(output), 17)
    unfinished = enter(output)
    assert unfinished.done == {0, 1}
    assert read_sums(unfinished) == {0: 2001}
    work(unfinished, range(2, 3))
    assert data_file(output).read_bytes() == bytes([0] * 8 + [1] * 8 + [2] * 8)


def test_a_journal_without_its_data_file_is_forgotten(output: Path) -> None:
    path = killed(output)
    data_file(output).unlink()
    assert enter(output).done == set()
    assert not path.exists()


@pytest.mark.parametrize("name", ["../../../../../precious", "0" * 31, "", "0" * 33])
def test_a_journal_that_names_another_file_is_not_followed(output: Path, name: str) -> None:
    output.mkdir()
    precious = output / "precious"
    precious.write_bytes(b"x" * 100)
    path = killed(output)
    path.write_bytes(name.encode() + b"\n" + path.read_bytes().split(b"\n", 1)[1])
    unfinished = enter(output)
    assert (unfinished.done, unfinished.writers) == (set(), {})
    assert precious.read_bytes() == b"x" * 100


def test_leavings_that_no_journal_speaks_of_are_deleted(output: Path) -> None:
    """A writer that was killed before its first line, temporary files, a journal of no writer."""
    killed(output, range(2))
    directory = output / UNFINISHED
    items = directory / "checkpoint" / "items"
    unfinished = enter(output)
    writer(unfinished, process=7).write_chunk(0, (5,), np.zeros(8, dtype=np.uint8))
    unfinished.release()
    (directory / "journal.x").touch()
    (directory / "journal.1.new").touch()
    (directory / "plan.new").mkdir()
    assert enter(output).done == {0, 1}
    assert sorted(p.name for p in directory.iterdir()) == ["checkpoint", "journal.0", "plan", "source"]
    assert [p.name for p in items.iterdir()] == ["ocdbt.process_0"]


def test_several_writers_are_found_and_their_sums_added(output: Path) -> None:
    killed(output, range(2), process=0)
    unfinished = enter(output)
    work(unfinished, range(4, 7), process=12)
    unfinished.release()
    again = enter(output)
    assert again.done == {0, 1, 4, 5, 6} and set(again.writers) == {0, 12}
    assert read_sums(again) == {0: 5016}


# --- what is written, and when ----------------------------------------------------------------------------------------


class Recorder:
    """An `ItemsWriter` as far as a journal needs one; it remembers when it was asked to sync."""

    files = ("f" * 32,)

    def __init__(self, journal_file: Path) -> None:
        self.journal_file, self.lines_at_sync = journal_file, list[int]()
        self.broken: Exception | None = None
        self.data = self  # its files
        self.large = NO_LARGE

    def sync(self) -> None:
        self.lines_at_sync.append(self.journal_file.read_bytes().count(b"\n"))
        if self.broken:
            raise self.broken


@pytest.fixture
def recorded(output: Path) -> tuple[Unfinished, Recorder]:
    unfinished = enter(output)
    (unfinished.checkpoint / "items" / "ocdbt.process_0" / "d").mkdir(parents=True)
    return unfinished, Recorder(unfinished.directory / "journal.0")


def entry(n: int, length: int = 8) -> Entry:
    return Entry(f"params.params.w/c/{n}", 8 * n, length)


def test_a_line_is_written_after_its_data_is_durable(recorded: tuple[Unfinished, Any]) -> None:
    unfinished, data = recorded
    with Journal(unfinished, 0, data) as lines:
        for n in range(3):
            lines.add(n, 0, [entry(n)], 1)
            lines.flush()
    assert data.lines_at_sync == [1, 2, 3]  # the first line is the data file's name


def test_units_wait_for_a_sync_until_it_is_time(
    recorded: tuple[Unfinished, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished, data = recorded
    with Journal(unfinished, 0, data) as lines:
        for n in range(12):
            lines.add(n, n % 2, [entry(n)], 1 << 63)
        assert not data.lines_at_sync
        monkeypatch.setattr(journal, "SYNC_SECONDS", 0.0)
        lines.add(12, 0, [entry(12)], 5)
        lines._join()
        assert data.lines_at_sync == [1]
        (record,) = map(json.loads, data.journal_file.read_bytes().splitlines()[1:])
    assert record["units"] == list(range(13)) and len(record["chunks"]) == 13
    assert record["sums"] == [[0, 5], [1, 0]]  # modulo 2^64


def test_after_a_sync_that_failed_no_line_is_written(recorded: tuple[Unfinished, Any]) -> None:
    """The system may drop what it could not write, and say so once only (fsync(2))."""
    unfinished, data = recorded
    with pytest.raises(OSError, match="went wrong"), Journal(unfinished, 0, data) as lines:
        lines.add(0, 0, [entry(0)], 1)
        lines.flush()
        data.broken = OSError(errno.EIO, "went wrong")
        lines.add(1, 0, [entry(1)], 1)
        with pytest.raises(OSError, match="went wrong"):
            lines.flush()
        data.broken = None
        lines.add(2, 0, [entry(2)], 1)
        lines.flush()
    assert data.journal_file.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), ValueError("a bug")])
def test_a_run_that_fails_keeps_what_it_has_done(recorded: tuple[Unfinished, Any], error: BaseException) -> None:
    unfinished, data = recorded
    with pytest.raises(type(error)), Journal(unfinished, 0, data) as lines:
        lines.add(0, 0, [entry(0)], 1)
        raise error
    assert data.journal_file.read_bytes().count(b"\n") == 2


def test_the_error_is_the_first_one_when_nothing_can_be_kept(recorded: tuple[Unfinished, Any]) -> None:
    unfinished, data = recorded
    with pytest.raises(ValueError, match="the cause"), Journal(unfinished, 0, data) as lines:
        lines.add(0, 0, [entry(0)], 1)
        data.broken = OSError(errno.ENOSPC, "full")
        raise ValueError("the cause")


# --- the last moments -------------------------------------------------------------------------------------------------


def test_an_older_output_comes_back_when_the_new_one_did_not_take_its_place(output: Path) -> None:
    """Killed between the two renames of a replacement."""
    (output / "0").mkdir(parents=True)
    (output / "0" / "old").touch()
    unfinished = enter(output)
    work(unfinished, range(2))
    journal.replace(unfinished, output / "0")
    assert not (output / "0").exists()
    unfinished.release()
    again = enter(output, OTHER, restart=True)  # even this does not throw it away
    assert (output / "0" / "old").exists() and not (again.directory / "replaced").exists()


def test_an_older_output_is_deleted_once_the_new_one_is_there(output: Path) -> None:
    (output / "0").mkdir(parents=True)
    unfinished = enter(output)
    work(unfinished, range(2))
    journal.replace(unfinished, output / "0")
    os.rename(unfinished.checkpoint, output / "0")
    unfinished.release()
    again = enter(output)
    assert again.committed
    again.forget()
    assert [p.name for p in output.iterdir()] == ["0"]


def test_a_run_that_has_written_nothing_is_not_taken_for_committed(output: Path) -> None:
    enter(output).release()
    assert not enter(output).committed

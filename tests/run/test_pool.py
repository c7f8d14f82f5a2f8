"""Worker processes: each number once, every failure heard, nobody left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptc.diagnostics import Diagnostic, InputError, Span
from ckptc.run import pool
from ckptc.run.pool import Shared, run_workers
from waiting import SECONDS, alive, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def nothing() -> None: ...


def run(workers: int, body: Callable[[int], None], watch: Callable[[], None] = nothing) -> None:
    run_workers(workers, lambda k, tick: body(k), watch, Shared(workers))


def no_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def test_each_number_is_taken_once(tmp_path: Path) -> None:
    shared = Shared(4)

    def body(k: int) -> None:
        taken = []
        while (n := shared.take()) < 2000:
            taken.append(n)
            shared.note(k, n, len(taken), 2 * len(taken))
        (tmp_path / str(k)).write_text(" ".join(map(str, taken)))

    run(4, body)
    taken = [int(n) for k in range(4) for n in (tmp_path / str(k)).read_text().split()]
    assert sorted(taken) == list(range(2000))
    assert (shared.written, shared.read, shared.unit) == (2000, 4000, 1999)


def test_a_stopped_run_gives_no_more_numbers() -> None:
    shared = Shared(1)
    assert shared.take() == 0
    shared.stop()
    assert shared.stopped and shared.take() > 1 << 60


def test_workers_are_other_processes_and_one_alone_is_this_one(tmp_path: Path) -> None:
    def body(k: int) -> None:
        (tmp_path / str(k)).write_text(str(os.getpid()))

    run(3, body)
    pids = {int((tmp_path / str(k)).read_text()) for k in range(3)}
    assert len(pids) == 3 and os.getpid() not in pids
    run(1, body)
    assert int((tmp_path / "0").read_text()) == os.getpid()


def test_progress_is_shown_while_one_worker_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "POLL", 0.0)
    seen: list[int] = []
    count = 0

    def body(k: int, tick: Callable[[], None]) -> None:
        nonlocal count
        for _ in range(3):
            count += 1
            tick()

    run_workers(1, body, lambda: seen.append(count), Shared(1))
    assert seen == [1, 2, 3, 3]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("length", [10, 1 << 20], ids=["short", "longer than a pipe holds"])
def test_an_input_error_arrives_whole(workers: int, length: int) -> None:
    found = Diagnostic("some-code", "x" * length, Span("a.yaml", 3, 4, 5), ("one", "two"), "do it")

    def body(k: int) -> None:
        if k == workers - 1:
            raise InputError([found, Diagnostic("other", "more")])

    with pytest.raises(InputError) as caught:
        run(workers, body)
    assert caught.value.diagnostics == (found, Diagnostic("other", "more"))


def test_any_other_failure_arrives_as_text() -> None:
    def body(k: int) -> None:
        if k:
            raise OSError(errno.EIO, "went wrong")

    with pytest.raises(RuntimeError, match=r"OSError: \[Errno 5\] went wrong"):
        run(2, body)


def test_a_worker_that_is_killed_ends_the_run_with_a_clear_text(tmp_path: Path) -> None:
    shared = Shared(2)

    def body(k: int, tick: Callable[[], None]) -> None:
        if k == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        while not shared.stopped:
            time.sleep(0.01)
        (tmp_path / "noted").touch()

    with pytest.raises(InputError) as caught:
        run_workers(2, body, nothing, shared)
    (found,) = caught.value.diagnostics
    assert (found.code, found.message) == ("worker-died", "a worker process was killed (signal 9)")
    assert found.help and "--jobs" in found.help and "the same command goes on from there" in found.help
    assert (tmp_path / "noted").exists()  # the other one had the time to note what it had done


def test_a_worker_killed_while_it_holds_the_counter_does_not_hang_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PATIENCE", 0.5)
    shared = Shared(2)

    def body(k: int, tick: Callable[[], None]) -> None:
        if k == 0:
            shared._next.get_lock().acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        shared.take()

    with pytest.raises(InputError, match="worker-died"):
        run_workers(2, body, nothing, shared)
    assert no_children()


def test_an_exit_that_says_nothing_is_a_death() -> None:
    with pytest.raises(InputError, match=r"worker-died: a worker process was killed \(exit code 3\)"):
        run(2, lambda k: os._exit(3) if k else None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_lets_workers_end_their_unit(error: type[BaseException], tmp_path: Path) -> None:
    shared = Shared(3)

    def body(k: int, tick: Callable[[], None]) -> None:
        (tmp_path / f"begun{k}").touch()
        while shared.take() < 1 << 60:
            time.sleep(0.01)
        (tmp_path / f"noted{k}").touch()

    def watch() -> None:
        if len(list(tmp_path.glob("begun*"))) == 3:
            raise error

    with pytest.raises(error):
        run_workers(3, body, watch, shared)
    assert len(list(tmp_path.glob("noted*"))) == 3
    assert no_children()


def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PATIENCE", 0.1)

    def body(k: int) -> None:
        if k:
            raise InputError([Diagnostic("some-code", "the cause")])
        time.sleep(SECONDS)
        (tmp_path / "not stopped").touch()

    with pytest.raises(InputError, match="the cause"):
        run(2, body)
    assert no_children() and not (tmp_path / "not stopped").exists()


def test_ctrl_c_on_the_terminal_is_the_parents_business(tmp_path: Path) -> None:
    """The whole group gets the signal; a worker that it stopped half way would not note what it has done."""

    def body(k: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        (tmp_path / str(k)).touch()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which test runners' workers do not have
    try:
        run(2, body)
    finally:
        signal.signal(signal.SIGINT, before)
    assert {p.name for p in tmp_path.iterdir()} == {"0", "1"}


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    script = f"""\
import os, time
from pathlib import Path
from ckptc.run.pool import Shared, run_workers
def body(k, tick):
    (Path({str(tmp_path)!r}) / f"new{{k}}").write_text(str(os.getpid()))
    os.rename(Path({str(tmp_path)!r}) / f"new{{k}}", Path({str(tmp_path)!r}) / str(k))
    time.sleep(600)
run_workers(2, body, lambda: None, Shared(2))
"""
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        wait_for(lambda: all((tmp_path / str(k)).exists() for k in range(2)))
        pids = [int((tmp_path / str(k)).read_text()) for k in range(2)]
        assert all(map(alive, pids))
        parent.kill()
    wait_for(lambda: not any(map(alive, pids)))

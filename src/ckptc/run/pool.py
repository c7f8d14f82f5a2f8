"""Worker processes of one machine: forked, fed from a shared counter, watched.

Processes, because small numpy calls hold the GIL between them; forked, because a worker then shares the plan and the
loaded libraries with its parent. What they say to the parent is JSON. When one fails or dies, or the run is
interrupted, the others end their unit of work, note what they have done and stop; then the run ends with what the first
one said.
"""

from __future__ import annotations

import errno
import json
import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from ckptc.diagnostics import fail
from ckptc.storage.forked_call import die_with, error_record, leave_signals_to_parent, raise_recorded

POLL = 0.1  # seconds between two looks at the counters
PATIENCE = 10.0  # seconds that workers have to stop by themselves
_NEVER = 1 << 62  # a number past every unit


def cores() -> int:
    """The cores that this process may use; all there are, where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def shared_memory() -> Iterator[None]:
    """Raises `system-refused` where the system has no memory for processes to share, which Python keeps in /dev/shm."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise fail(
            "system-refused",
            f"the system refused memory that processes share: {error.strerror or error}",
            help="/dev/shm must be there, writable and not full; in a container, give it one (`--shm-size`)",
        ) from None


class Shared:
    """Counters that all processes see: the next unit to make, and each worker's bytes written and current unit."""

    def __init__(self, workers: int) -> None:
        """Raises `system-refused`."""
        context = mp.get_context("fork")
        with shared_memory():
            self._next = context.Value("q", 0)
            self._stopped = context.Value("b", 0, lock=False)
            self._written = context.Array("q", workers, lock=False)
            self._read = context.Array("q", workers, lock=False)
            self._unit = context.Array("q", workers, lock=False)

    def take(self) -> int:
        """The next number, each one once; past all units once the run has been stopped."""
        if self._stopped.value:
            return _NEVER
        with self._next.get_lock():
            value = int(self._next.value)
            self._next.value = value + 1
            return value

    def numbers(self, count: int) -> Iterator[int]:
        """Numbers below `count`, as they are asked for: each goes to one process."""
        while (number := self.take()) < count:
            yield number

    def stop(self) -> None:
        """No more units. Without the lock, which a worker that was killed may have held."""
        self._stopped.value = 1

    @property
    def stopped(self) -> bool:
        return bool(self._stopped.value)

    def note(self, worker: int, unit: int, written: int, read: int) -> None:
        self._unit[worker], self._written[worker], self._read[worker] = unit, written, read

    @property
    def written(self) -> int:
        return int(sum(self._written))

    @property
    def read(self) -> int:
        return int(sum(self._read))

    @property
    def unit(self) -> int:
        """The unit furthest along."""
        return int(max(self._unit))


Body = Callable[[int, Callable[[], None]], None]  # of a worker's number, and what it calls after each unit


def run_workers(workers: int, body: Body, watch: Callable[[], None], shared: Shared) -> None:
    """Runs `body(k, tick)` for k below `workers`, each in a process of its own, and `watch` meanwhile; with one worker,
    in this process, where `tick` is what calls `watch`.

    Raises the InputError that a body raised, `worker-died` (a process was killed), or RuntimeError with the text of any
    other failure.
    """
    if workers == 1:
        body(0, _Ticker(watch))
        watch()
        return
    context = mp.get_context("fork")
    running: dict[Connection, Any] = {}  # processes by the pipe they speak through
    try:
        for k in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(body, k, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            running[ours] = process
        while running:
            for pipe in wait(list(running), timeout=POLL):
                assert isinstance(pipe, Connection)
                # The pipe before the process: one that says more than the pipe holds ends only when it is heard.
                said = _hear(pipe)
                process = running.pop(pipe)
                process.join()
                pipe.close()
                _raise(said, process.exitcode)
            watch()
    except BaseException:
        shared.stop()
        raise
    finally:
        _end(running)


class _Ticker:
    """Calls `watch` at most once in POLL seconds."""

    def __init__(self, watch: Callable[[], None]) -> None:
        self._watch, self._last = watch, time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._last >= POLL:
            self._last = now
            self._watch()


def _end(running: dict[Connection, Any]) -> None:
    """Waits for workers that have been error_record to stop; kills those that do not, or when interrupted again."""
    deadline = time.monotonic() + PATIENCE
    try:
        for pipe, process in running.items():
            while process.is_alive() and time.monotonic() < deadline:
                wait([process.sentinel, pipe], timeout=POLL)
                if pipe.poll():
                    _hear(pipe)
    finally:
        for pipe, process in running.items():
            process.kill()
            process.join()
            pipe.close()


def _hear(pipe: Connection) -> dict[str, Any]:
    """What a worker said before it ended; nothing when all went well, or when it was killed."""
    with suppress(EOFError, OSError, ValueError):
        said: dict[str, Any] = json.loads(pipe.recv_bytes())
        return said
    return {}


def _child(body: Body, k: int, pipe: Connection, parent: int) -> None:
    leave_signals_to_parent()
    die_with(parent)
    try:
        body(k, lambda: None)
    except BaseException as error:
        pipe.send_bytes(json.dumps(error_record(error)).encode())
        os._exit(1)
    os._exit(0)  # nothing of the parent's to clean up


def _raise(said: dict[str, Any], code: int | None) -> None:
    raise_recorded(said)
    if code:
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise fail(
            "worker-died",
            f"a worker process was killed ({cause})",
            help="where memory ran out, use fewer --jobs or a plan with less --memory; what is done is kept, and the "
            "same command goes on from there",
        )

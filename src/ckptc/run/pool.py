"""Worker processes of one machine: forked, fed from a shared counter, watched.

Processes, because small numpy calls hold the GIL between them; forked, because a worker then shares the plan and the loaded libraries with its
parent. What they say to the parent is JSON. A worker that fails or dies ends the others, and the run.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from typing import Any

from ckptc.diagnostics import Diagnostic, InputError, Span

POLL = 0.1  # seconds between two looks at the counters


class WorkerDied(RuntimeError):
    """A worker process ended without saying why: killed, or out of memory."""


class Shared:
    """Counters that all processes see: the next unit to make, and each worker's bytes written and current unit."""

    def __init__(self, workers: int) -> None:
        context = mp.get_context("fork")
        self._next = context.Value("q", 0)
        self._written = context.Array("q", workers, lock=False)
        self._read = context.Array("q", workers, lock=False)
        self._unit = context.Array("q", workers, lock=False)

    def take(self) -> int:
        """The next number, each one once."""
        with self._next.get_lock():
            value: int = self._next.value
            self._next.value = value + 1
            return value

    def note(self, worker: int, unit: int, written: int, read: int) -> None:
        self._unit[worker], self._written[worker], self._read[worker] = unit, written, read

    @property
    def written(self) -> int:
        return sum(self._written)

    @property
    def read(self) -> int:
        return sum(self._read)

    @property
    def unit(self) -> int:
        """The unit furthest along."""
        return max(self._unit)


def run_workers(workers: int, body: Callable[[int], None], watch: Callable[[], None]) -> None:
    """Runs `body(k)` for k below `workers`, each in a process of its own, and `watch` meanwhile; with one worker, in this process.

    Raises the InputError that a body raised, WorkerDied, or RuntimeError with the text of any other failure.
    """
    if workers == 1:
        body(0)
        watch()
        return
    context = mp.get_context("fork")
    running: dict[Any, tuple[mp.process.BaseProcess, Connection]] = {}
    try:
        for k in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(body, k, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            running[process.sentinel] = (process, ours)
        while running:
            ready = wait(list(running), timeout=POLL)
            watch()
            for sentinel in ready:
                process, pipe = running.pop(sentinel)
                process.join()
                _raise(pipe, process.exitcode)
    finally:
        for process, pipe in running.values():
            process.kill()
            process.join()
            pipe.close()


def _child(body: Callable[[int], None], k: int, pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    _die_with(parent)
    try:
        body(k)
    except InputError as error:
        pipe.send_bytes(json.dumps({"input": [asdict(d) for d in error.diagnostics]}).encode())
        os._exit(1)
    except BaseException as error:
        pipe.send_bytes(json.dumps({"internal": f"{type(error).__name__}: {error}"}).encode())
        os._exit(2)
    os._exit(0)  # nothing of the parent's to clean up


def _die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies, where the kernel can (Linux, prctl(2) PR_SET_PDEATHSIG)."""
    try:
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        pass
    if os.getppid() != parent:
        os._exit(1)


def _raise(pipe: Connection, code: int | None) -> None:
    with pipe:
        said = json.loads(pipe.recv_bytes()) if pipe.poll() and code else {}
    if "input" in said:
        raise InputError(
            Diagnostic(d["code"], d["message"], Span(**d["span"]) if d["span"] else None, tuple(d["notes"]), d["help"])
            for d in said["input"]
        )
    if "internal" in said:
        raise RuntimeError(said["internal"])
    if code:
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise WorkerDied(f"a worker process died ({cause}); was the machine out of memory?")

"""Work done in a forked process, for the sake of the one that wants it.

TensorStore and its like keep threads from their first use on. A process that has threads cannot be forked safely: locks
that they hold stay locked in the child, and their pools have no threads there. So a program that will fork workers
lets a child use such a library even for the little that it needs beforehand.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from ckptc.diagnostics import Diagnostic, InputError, Span, fail

THREADED = ("tensorstore", "jaxlib")  # libraries that have threads once they are used


def can_fork() -> bool:
    """Whether this process can be forked safely: not if it has loaded such a library itself."""
    return hasattr(os, "fork") and not any(name in sys.modules for name in THREADED)


class ForkedCall:
    """What `make` returns, JSON values, made in a forked process meanwhile, or in this one, when it is asked for, where
    it cannot be forked. A context manager: leaving it ends the process.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._pipe: Connection | None = None
        if not can_fork():
            return
        context = mp.get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_child, args=(make, self._pipe, theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    def result(self) -> Any:
        """What was made; may be asked for once.

        Raises the InputError that `make` raised, RuntimeError with the text of another failure, or `worker-died`.
        """
        if self._pipe is None:
            return self._make()
        try:
            said = json.loads(self._pipe.recv_bytes())
        except EOFError:
            self._process.join()
            cause, help = f"exit code {self._process.exitcode}", "where memory ran out, end other programs"
            raise fail("worker-died", f"a process was killed ({cause})", help=help) from None
        raise_recorded(said)
        return said["made"]

    def __enter__(self) -> ForkedCall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()


def forked_call(make: Callable[[], Any]) -> Any:
    """What `make` returns, made in a forked process as `ForkedCall` does it, and waited for."""
    with ForkedCall(make) as work:
        return work.result()


def _child(make: Callable[[], Any], others: Connection, pipe: Connection, parent: int) -> None:
    leave_signals_to_parent()
    die_with(parent)
    others.close()  # or to say something would wait for ever where no parent hears it
    try:
        said = {"made": make()}
    except BaseException as error:
        said = error_record(error)
    with suppress(OSError):  # the parent has died, and this system does not kill its children
        pipe.send_bytes(json.dumps(said).encode())
    os._exit(0)  # nothing of the parent's to clean up


def leave_signals_to_parent() -> None:
    """What a terminal or a supervisor sends reaches the whole group; the parent decides what becomes of its children."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies, where it can (Linux, prctl(2) PR_SET_PDEATHSIG)."""
    try:
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        pass
    if os.getppid() != parent:
        os._exit(1)


def error_record(error: BaseException) -> dict[str, Any]:
    """What a process ends with, as JSON for its parent."""
    if isinstance(error, InputError):
        return {"input": [asdict(d) for d in error.diagnostics]}
    return {"internal": f"{type(error).__name__}: {error}"}


def raise_recorded(said: dict[str, Any]) -> None:
    """Raises what `error_record` has error_record, if anything: the InputError, or RuntimeError with the text of another failure."""
    if "input" in said:
        raise InputError(
            Diagnostic(d["code"], d["message"], d["span"] and _span(d["span"]), tuple(d["notes"]), d["help"])
            for d in said["input"]
        )
    if "internal" in said:
        raise RuntimeError(said["internal"])


def _span(error_record: dict[str, Any]) -> Span:
    return Span(**{**error_record, "also": tuple((what, _span(span)) for what, span in error_record["also"])})

"""Work done in a process apart, for the sake of the one that wants it.

TensorStore and its like keep threads from their first use on. A process that has threads cannot be forked safely: locks
that they hold stay locked in the child, and their pools have no threads there. So a program that will fork workers
lets a child use such a library even for the little that it needs beforehand.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ckptc.diagnostics import fail
from ckptc.run.pool import raise_told, told

THREADED = ("tensorstore",)  # libraries that have threads once they are used


def can_fork() -> bool:
    """Whether this process can be forked for work with such a library: not if it has loaded one itself."""
    return hasattr(os, "fork") and not any(name in sys.modules for name in THREADED)


def apart(make: Callable[[], Any]) -> Any:
    """What `make` returns, JSON values, made in a forked process, or in this one where it cannot be forked.

    Raises the InputError that `make` raised, RuntimeError with the text of another failure, or `worker-died`.
    """
    if not can_fork():
        return make()
    context = mp.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(make, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        said = json.loads(ours.recv_bytes())
    except EOFError:
        process.join()
        help = "where memory ran out, end other programs"
        raise fail("worker-died", f"a process was killed (exit code {process.exitcode})", help=help) from None
    finally:
        process.kill()
        process.join()
        ours.close()
    raise_told(said)
    return said["made"]


def _child(make: Callable[[], Any], pipe: Connection) -> None:
    try:
        said = {"made": make()}
    except BaseException as error:
        said = told(error)
    pipe.send_bytes(json.dumps(said).encode())
    os._exit(0)  # nothing of the parent's to clean up

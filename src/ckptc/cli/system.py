"""What the system gives a program: standard streams, which may be closed or full, and signals.

A command's exit code says how its work ended, not whether somebody could be told. So a stream that is closed becomes
one to nowhere (a file that is opened later must not take its number), and writing to one that fails is given up. The
exception is what was asked for on stdout, such as a plan: `Stream.error` tells why it is not whole.

SIGTERM and SIGHUP end a command as SIGINT does: workers stop, what is done is kept, and the exit code is 128 + the
signal's number. A signal that whoever started the command has it ignore, as nohup does, stays ignored.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal that ends the command."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number
        self.words = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


@contextmanager
def stopping() -> Iterator[None]:
    """Within it, signals raise `Stopped` in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN and handler is not None:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


class Stream:
    """A stream for text whose failures end no work. What follows the first one is dropped."""

    def __init__(self, under: Any) -> None:
        self._under = under
        self.error: OSError | None = None
        with suppress(AttributeError, ValueError, OSError):  # names of files may hold what the encoding has not
            under.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self._under.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._under.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.error = error
        with suppress(OSError, ValueError):  # or Python would fail with it again when it ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._under.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._under, name)


def open_closed_streams() -> None:
    """Opens the standard streams that are closed, to nowhere."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            if getattr(sys, name) is None:
                setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


@contextmanager
def streams() -> Iterator[tuple[Stream, Stream]]:
    """Standard output and error, as the command has them."""
    before = sys.stdout, sys.stderr
    out, err = Stream(before[0]), Stream(before[1])
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before

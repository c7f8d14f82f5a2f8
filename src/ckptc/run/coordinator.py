"""The other processes of a run, as one of them sees them: what it says to them, and what it hears.

A topic is a word under which every process may say one text. A failure anywhere reaches all: whoever waits or looks
(`check`) raises `process-failed`. JAX's coordination service carries the texts, in a companion process
(`ckptc.run.coordinator_process`), which starts in the background. A run of one process has no peers, and the same interface.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from types import TracebackType
from typing import Any

from ckptc.diagnostics import Diagnostic, InputError, fail
from ckptc.run.coordinator_process import IN_USE, LINGER

AGAIN = "nothing is committed; what is done is kept, and the same commands go on from there"
WAIT = 300  # seconds that processes wait for each other at the start, by default
SHOWN = 90.0  # seconds within which a file that another machine has written must be seen
HEARTBEAT = 60  # seconds without a sign of life, after which a machine is taken for dead


class Alone:
    """The only process of a run: it hears what it has said itself."""

    process, processes = 0, 1

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def join(self) -> None:
        """Waits until all processes are there; `process` and `processes` are known then."""

    def say(self, topic: str, text: str = "") -> None:
        """Tells all, this process included."""
        self._said[topic] = text

    def hear(self, topic: str, count: int = 1) -> dict[int, str]:
        """Waits until so many have spoken on a topic: the text of each by its number."""
        return {0: self._said[topic]}

    def check(self) -> None:
        """Raises `process-failed` when another process has failed."""

    def __enter__(self) -> Alone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where processes meet: as the user says, or, with None in each, as JAX finds out from the cluster it runs on."""

    coordinator: str | None = None  # HOST:PORT, where process 0 listens
    processes: int | None = None
    process: int | None = None
    wait: int = WAIT  # seconds


class Peers(Alone):
    """The view of one of several processes. Left through an exception, it says to the others what has failed.

    Every method raises InputError: `process-failed`, `processes-missing`, `port-in-use`, `connection-lost`.
    """

    def __init__(self, meeting: Meeting) -> None:
        super().__init__()
        self._meeting, self._joined, self._lost = meeting, False, False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # what JAX says, which matters only when it fails
        self._pipe, theirs = Pipe()
        options = {**asdict(meeting), "heartbeat": HEARTBEAT}
        command = [sys.executable, "-m", "ckptc.run.coordinator_process"]
        arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(options)]
        # In a session of its own: it outlives signals to this one, to tell the others.
        self._companion = subprocess.Popen(
            [*command, *arguments], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._log,
            stderr=self._log, start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def join(self) -> None:
        if not self._joined:
            _, self.process, self.processes = self._receive()
            self._joined = True

    def say(self, topic: str, text: str = "") -> None:
        self._send(["say", topic, text])

    def hear(self, topic: str, count: int = 1) -> dict[int, str]:
        self._send(["hear", topic, count])
        _, heard = self._receive()
        return {int(process): text for process, text in heard.items()}

    def check(self) -> None:
        if self._pipe.poll():
            raise AssertionError(f"unasked: {self._receive()}")  # `_receive` raises on failures

    def _send(self, message: list[Any]) -> None:
        self.join()
        try:
            self._pipe.send_bytes(json.dumps(message).encode())
        except OSError:
            self._receive()  # what it has said before it went
            raise self._failure() from None

    def _receive(self) -> list[Any]:
        try:
            message: list[Any] = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise self._failure() from None
        if message[0] == "failed":
            _, process, text = message
            self._lost = True
            raise fail("process-failed", f"process {process} of {self.processes} has failed: {text}", help=AGAIN)
        return message

    def _failure(self) -> InputError:
        """Why the companion has gone without a word, from what JAX has said."""
        self._lost = True
        self._companion.wait()
        self._log.seek(0)
        log = self._log.read().decode("utf-8", "replace")
        found = re.search(r"absl::Status: (.*)|^(\w*(?:Error|Exception): .*)", log, re.MULTILINE)
        said = (found[1] or found[2] if found else next(iter(log.strip().splitlines()), "nothing")).strip()
        notes = (f"JAX says: {said}",)
        if IN_USE in log:
            help = "choose another port for --coordinator, in all processes"
            return fail("port-in-use", "the coordinator's port is used by another program", notes=notes, help=help)
        if self._joined:
            return fail("connection-lost", "the connection to the other processes is lost", notes=notes, help=AGAIN)
        if self._meeting.coordinator is None and "should be defined" in log:
            help = "say it with --coordinator, --num-processes and --process-id"
            return fail("which-process", "JAX does not know the cluster that this runs on", notes=notes, help=help)
        within = f" within {self._meeting.wait} seconds" if "DEADLINE_EXCEEDED" in log else ""
        help = (
            "start every process, with the same --coordinator and --num-processes, each --process-id once; process 0 "
        )
        help += "must be reachable there from all machines"
        return fail("processes-missing", f"the processes of the run did not meet{within}", notes=notes, help=help)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.monotonic() + 2 * LINGER
        try:
            if not self._lost and (self._joined or self._pipe.poll(2 * LINGER)):  # not all may have come yet
                with suppress(InputError):
                    self._send(["leave"] if error is None else ["fail", _text(error)])
            while self._joined and self._companion.poll() is None and time.monotonic() < end:
                time.sleep(0.01)  # until the others have heard of it
        finally:
            self._pipe.close()
            if self._companion.poll() is None:
                self._companion.kill()
            self._companion.wait()
            self._log.close()


def seen(condition: Callable[[], bool], peers: Alone) -> bool:
    """Waits until a condition on files that others write holds, within SHOWN."""
    end, pause = time.monotonic() + SHOWN, 0.01
    while True:
        try:
            if condition():
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > end:
            return False
        peers.check()
        time.sleep(pause)
        pause = min(1.0, pause * 2)


def _text(error: BaseException) -> str:
    if isinstance(error, InputError):
        d: Diagnostic = error.diagnostics[0]
        return f"{d.code}: {d.message}"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"

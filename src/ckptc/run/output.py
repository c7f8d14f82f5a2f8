"""Where a run's checkpoint goes: what a run needs of an output, and the output that is a local directory.

An output is opened by process 0 and joined by the others; both get an `Unfinished`: what earlier runs of the plan have
done, a place for the checkpoint's files, and journals. The other output is an object store (`ckptc.run.remote`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, Protocol

from ckptc.diagnostics import fail
from ckptc.ops.types import itemsize
from ckptc.plan.model import Plan
from ckptc.run import journal
from ckptc.run.coordinator import Alone, seen
from ckptc.run.journal import UNFINISHED, open_unfinished, output_error
from ckptc.run.preflight import check_room
from ckptc.run.sources import Sighting
from ckptc.storage.checkpoint.orbax_writer import Entry, ItemsWriter, WriterState
from ckptc.storage.checkpoint.restored import custom_metadata_of
from ckptc.storage.checkpoint.steps import is_checkpoint
from ckptc.storage.sink.directory import Place
from ckptc.storage.source.files import NOT_UTF8, is_text

STEP = "0"  # the step directory that MaxText's converter writes


class Journal(Protocol):
    """One writer's journal: a context; a unit is durable in it at the latest when it has been left."""

    def add(self, unit: int, array: int, chunks: Sequence[Entry], total: int) -> None:
        """Notes a unit of an array whose chunks have been written; `total` is the sum of its chunks."""

    def __enter__(self) -> Journal: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...


class Finish(Protocol):
    """Writes a checkpoint's index and metadata."""

    def __call__(self, check: Callable[[], None] = ...) -> None:
        """`check`: what `ckptc.storage.checkpoint.orbax_writer.finish` calls before it goes on."""


class Unfinished(Protocol):
    """An output's unfinished run."""

    done: set[int]  # units, as positions in the plan's order of work
    writers: dict[int, WriterState]  # what each earlier writer has written
    started: int  # when the conversion began, nanoseconds since the Unix epoch
    committed: bool  # whether the checkpoint is there already: killed while it tidied up, it seems

    @property
    def place(self) -> Place:
        """Where the checkpoint's files go."""

    def journal(self, number: int, writer: ItemsWriter) -> Journal: ...

    def sums(self) -> dict[int, int]:
        """The sums of all chunks that the journals speak of, by the array's position in the plan."""

    def show(self) -> str:
        """A word that is there now, for `Output.join` to look for."""

    def wrote(self, numbers: Sequence[int]) -> list[int]:
        """Those of some closed writers that have written anything."""

    def shows(self, numbers: Sequence[int], journals: Sequence[int]) -> bool:
        """Whether what closed writers have left can be seen from here: the files of `numbers`, the journals of both."""

    def complete(self, finish: Finish, before_commit: Callable[[Path], None] | None, check: Callable[[], None]) -> None:
        """Has `finish` write the checkpoint's index and metadata, and commits. `check` raises when it must not be."""

    def forget(self) -> None:
        """Removes what is unfinished; `release` is still to be called."""

    def release(self) -> None:
        """Leaves the output, if that is not done already; what is unfinished stays for the next run."""


class Output(Protocol):
    """Where a checkpoint goes."""

    @property
    def step(self) -> str:
        """What the checkpoint itself is called: in reports, and in the markers of its commit."""

    def check(self) -> None:
        """Raises InputError when the plan's checkpoint cannot be there."""

    def check_free(self, replace: bool, source: Sighting) -> None:
        """`output-exists`, unless what is there may be replaced, or is a run's that may tell more."""

    def check_target(self, replace: bool, source: Sighting) -> None:
        """`output-exists`, unless nothing is there, or a checkpoint that may be replaced and from which nothing of `source`
        is read."""

    def open(self, plan_digest: str, restart: bool, replace: bool, started: int, source: Sighting) -> Unfinished:
        """The unfinished run there, or a new one that is `started` now and reads `source`; `output-exists` for an older
        checkpoint that is not to be replaced, `source-changed` for a run that has read another source."""

    def join(self, peers: Alone, said: dict[str, Any], mine: list[int]) -> Unfinished:
        """What process 0 has opened, as it has `said`, seen from another process, whose writers are `mine`."""

    def check_room(self, needed: int) -> None:
        """`disk-full`, where so many bytes more have no room."""

    def held(self) -> int:
        """Bytes that a worker holds for writing, beside its unit of work."""

    def stored_bytes(self) -> int | None:
        """What the checkpoint takes there, once it is committed; None where that cannot be told, which is no failure."""

    def error(self, error: OSError) -> Exception:
        """What to raise when the system has refused something on the way."""


class LocalOutput:
    """A directory, and the unfinished run beside the checkpoint in it (`ckptc.run.journal`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._final = path / STEP

    def __str__(self) -> str:
        return str(self.path)

    @property
    def step(self) -> str:
        return str(self._final)

    def check(self) -> None:
        if not is_text(os.path.abspath(self.path)):  # TensorStore, which writes the index, takes paths as JSON
            message = f"cannot write to {self.path}: its path is not UTF-8"
            raise fail("unwritable-output", message, help=NOT_UTF8)

    def check_free(self, replace: bool, source: Sighting) -> None:
        if replace or not (self.path / UNFINISHED).exists():
            self.check_target(replace, source)

    def check_target(self, replace: bool, source: Sighting) -> None:
        for doomed in (self._final, self.path / UNFINISHED):  # what a run deletes
            if inside := source.inside(doomed):
                message = f"{inside} is read and lies in {doomed}, which this run would replace"
                raise fail("output-exists", message, help="choose another --output, or move the source out of it")
        if not os.path.lexists(self._final):
            return
        if not is_checkpoint(self._final):
            what = "a directory that holds no checkpoint" if self._final.is_dir() else "no checkpoint"
            help = "choose another --output, or move it away: it would not be replaced by --force, either"
            raise fail("output-exists", f"{self._final} is there, and is {what}", help=help)
        if not replace:
            raise exists(str(self._final))

    def open(self, plan_digest: str, restart: bool, replace: bool, started: int, source: Sighting) -> Unfinished:
        unfinished = open_unfinished(self.path, self._final, plan_digest, restart, source)
        unfinished.started = started
        try:
            unfinished.committed = unfinished.committed and self._is_of(plan_digest)
            if not unfinished.committed:
                self.check_target(replace, source)
        except BaseException:
            unfinished.release()
            raise
        return unfinished

    def join(self, peers: Alone, said: dict[str, Any], mine: list[int]) -> Unfinished:
        directory = self.path / UNFINISHED
        unfinished = journal.Unfinished(self.path, self._final, None, committed=said["committed"])
        if unfinished.committed:
            return unfinished
        try:
            if not seen(lambda: (directory / "token").read_text() == said["token"], peers):
                raise fail(
                    "output-not-shared",
                    f"process {peers.process} does not see in {self} what process 0 has written there",
                    help="--output must be one directory on a file system that all machines share",
                )
            unfinished.lock = journal.flock(directory / f"process.{peers.process}", self.path)
            unfinished.done = {n for low, high in said["done"] for n in range(low, high)}
            journal.read_writers(unfinished, mine)
        except OSError as error:
            raise self.error(error) from None
        return unfinished

    def check_room(self, needed: int) -> None:
        check_room(self.path, needed)

    def held(self) -> int:
        return 0

    def stored_bytes(self) -> int | None:
        with suppress(OSError):
            return sum(p.stat().st_size for p in self._final.rglob("*") if p.is_file())
        return None

    def error(self, error: OSError) -> Exception:
        return output_error(self.path, error)

    def _is_of(self, plan_digest: str) -> bool:
        """Whether the checkpoint there was made of this plan."""
        made = custom_metadata_of(self._final).get("ckptc")
        return isinstance(made, dict) and made.get("plan") == plan_digest


def largest_chunk(plan: Plan) -> int:
    """Bytes of the largest chunk of any array, as it is made."""
    return max((prod(a.chunk) * itemsize(a.dtype) for a in plan.arrays), default=0)


def exists(what: str) -> Exception:
    """`output-exists`, to raise."""
    help = "choose another --output, or use --force to replace it"
    return fail("output-exists", f"there is a checkpoint at {what} already", help=help)

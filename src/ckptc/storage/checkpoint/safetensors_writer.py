"""safetensors files written in any order, at places known beforehand, under their final names only when all of them
are whole.

    <directory>/.NAME.ckptc-unfinished    a file while it is written: header first, then boxes at their places
    <directory>/.ckptc-commit             from when every file is whole and on the disk until all have their names: which
                                          ones are new, and which were there
    <directory>/.NAME.ckptc-replaced      one that was there, meanwhile
    <directory>/NAME                      config.json last, so that a directory with a config is a whole checkpoint

An interrupted run leaves nothing but hidden files of names that no reader takes for weights. Where it has noted what is
done (`ckptc.storage.checkpoint.notes`), the next run of the same plan goes on from there; else that removes them. One
that is interrupted while files get their names is undone by the next run: what was there is there again. The directory
is locked while files are written to it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import fail
from ckptc.storage.checkpoint.notes import JOURNAL, Noted, Notes, read_notes
from ckptc.storage.checkpoint.safetensors import CONFIG, INDEX
from ckptc.storage.sink.file import BulkFile
from ckptc.storage.source.content import Status, changed_since, first_of
from ckptc.storage.source.files import resolve

UNFINISHED = ".ckptc-unfinished"
REPLACED = ".ckptc-replaced"
COMMIT = ".ckptc-commit"


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One file: its name, its size in bytes, and what it begins with."""

    name: str
    size: int
    header: bytes


class CheckpointWriter:
    """The files of one checkpoint. A context manager: leaving it without `commit` removes what was written, unless units
    of a plan have been noted as done.

    `plan`: the digest of what is written; without one, nothing is noted. `source`: what the system says of the files that
    it is made of. `done`: the units that an earlier run has noted.

    Raises InputError: `output-exists` (unless `force`), `output-busy`, and, unless `restart`, `other-plan` and
    `source-changed`, where what is unfinished is of another; OSError, here and in every method, when the system refuses
    to write.
    """

    def __init__(
        self,
        directory: Path,
        files: Sequence[FileSpec],
        *,
        force: bool = False,
        plan: str = "",
        source: Mapping[str, Status] | None = None,
        restart: bool = False,
    ) -> None:
        self._directory, self._files = directory, tuple(files)
        self._plan, self._source, self._restart = plan, dict(source or {}), restart
        self._open: list[BulkFile] = []
        self._committed = self._mine = False
        self._kept: Noted | None = None
        self._notes: Notes | None = None
        self._made = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._claim(force)
        except BaseException:
            self._discard()
            raise

    def create(self) -> None:
        """Takes the room for every file, and writes what each begins with, unless an earlier run has."""
        for file in self._files:
            self._open.append(BulkFile(self._temporary(file.name)))
            if self._kept is not None:
                continue
            self._open[-1].truncate(0)
            self._open[-1].reserve(file.size)
            self._open[-1].write(0, memoryview(file.header))
        if self._plan:
            self._notes = Notes(self._directory, self._plan, self._source, self._kept)

    @property
    def done(self) -> frozenset[int]:
        return self._kept.units if self._kept is not None else frozenset()

    def note(self, units: Sequence[int]) -> None:
        """Makes durable what is written, and notes units of which all is."""
        if self._notes is not None and units:
            for file in self._open:
                file.sync()
            self._notes.add(units)

    def forget(self) -> None:
        """What has been noted counts no more: leaving removes what was written."""
        (self._directory / JOURNAL).unlink(missing_ok=True)

    def _claim(self, force: bool) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = -1
            raise fail(
                "output-busy",
                f"another run is writing to {self._directory}",
                help="wait for it, or choose another --output",
            ) from None
        self._undo()
        self._replaced = [
            n for n in sorted(os.listdir(self._directory)) if n in (CONFIG, INDEX) or n.endswith(".safetensors")
        ]
        if self._replaced and not force:
            raise fail(
                "output-exists",
                f"there is a checkpoint in {self._directory} already: {self._replaced[0]}",
                help="choose another --output, or use --force to replace it",
            )
        self._kept = self._resumable()
        self._mine = True
        for name in os.listdir(self._directory):
            there = name.startswith(".") and name.endswith((UNFINISHED, REPLACED, f"{JOURNAL}.new"))
            if (there and not (self._kept and name.endswith(UNFINISHED))) or (name == JOURNAL and not self._kept):
                (self._directory / name).unlink()

    def _resumable(self) -> Noted | None:
        """What an earlier run of the same plan has left, if that is all there still."""
        noted = read_notes(self._directory) if not self._restart else None
        if noted is None or not noted.units:
            return None
        if noted.plan != self._plan:
            raise fail(
                "other-plan",
                f"an unfinished run of another plan is in {self._directory}",
                notes=(f"expected: {self._plan}", f"found:    {noted.plan}"),
                help="run that plan to go on with it, or use --restart to throw its work away",
            )
        then = {name: Status(*status) for name, status in noted.source.items()}
        if lines := changed_since(then, self._source):
            message = (
                f"what is read may hold other weights than those that the unfinished run in {self._directory} has read"
            )
            help = "put its files back as they were, or use --restart, which makes all of it again"
            raise fail("source-changed", message, notes=first_of(lines), help=help)
        sizes = {file.name: file.size for file in self._files}
        whole = all(_size(self._temporary(name)) == size for name, size in sizes.items())
        return noted if whole else None

    def _undo(self) -> None:
        """Takes back the names that an interrupted `commit` gave, if it had not given all of them."""
        try:
            names: dict[str, list[str]] = json.loads((self._directory / COMMIT).read_bytes())
        except FileNotFoundError:
            return
        if any(self._temporary(name).exists() for name in names["new"]):
            for name in names["new"]:
                if not self._temporary(name).exists():
                    with suppress(FileNotFoundError):
                        os.rename(self._final(name), self._temporary(name))
            for name in names["old"]:
                with suppress(FileNotFoundError):
                    os.rename(self._aside(name), self._final(name))
        os.fsync(self._lock)
        (self._directory / COMMIT).unlink()
        os.fsync(self._lock)

    def _final(self, name: str) -> Path:
        return resolve(self._directory, name)

    def _temporary(self, name: str) -> Path:
        return resolve(self._directory, f".{name}{UNFINISHED}")

    def _aside(self, name: str) -> Path:
        return resolve(self._directory, f".{name}{REPLACED}")

    def write_box(
        self, file: int, begin: int, shape: Sequence[int], box: Sequence[tuple[int, int]], data: npt.NDArray[Any]
    ) -> None:
        """Writes a box ([low, high) along each axis) of a tensor of `shape` that begins at byte `begin` of a file.

        `data`: C-contiguous, of the box's shape, its elements as they are stored.
        """
        item = data.itemsize
        view = data.reshape(-1).view(np.uint8).data
        done = 0
        for first, length in runs(shape, box):
            self._open[file].write(begin + first * item, view[done : done + length * item])
            done += length * item

    def read_box(
        self, file: int, begin: int, shape: Sequence[int], box: Sequence[tuple[int, int]], out: npt.NDArray[Any]
    ) -> None:
        """Reads back what `write_box` wrote, into an array like its `data`."""
        item = out.itemsize
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        for first, length in runs(shape, box):
            self._open[file].read_into(begin + first * item, view[done : done + length * item])
            done += length * item

    def settle(self) -> None:
        """Raises what the system could not write so far, as far as it has said it to this process alone. A worker's last
        word."""
        for file in self._open:
            file.settle()

    def commit(self, texts: Mapping[str, str], copies: Mapping[str, Path]) -> None:
        """Makes the files durable and gives them their names, then the copies, then `texts`, in their order.

        `texts`: index and config by name, the config last. `copies`: files to copy, by the name they get.
        """
        for file in self._open:
            file.sync()
        for name, source in copies.items():
            _put(self._temporary(name), source.read_bytes())
        for name, text in texts.items():
            _put(self._temporary(name), text.encode())
        new = [*(f.name for f in self._files), *copies, *texts]
        there = {*self._replaced, *(name for name in new if os.path.lexists(self._final(name)))}
        old = sorted(there, key=lambda name: (name != CONFIG, name != INDEX, name))  # first what makes it a checkpoint
        _put(self._temporary(COMMIT), json.dumps({"new": new, "old": old}).encode())
        os.rename(self._temporary(COMMIT), self._directory / COMMIT)
        os.fsync(self._lock)
        for name in old:
            os.rename(self._final(name), self._aside(name))
        for name in new:
            os.rename(self._temporary(name), self._final(name))
        os.fsync(self._lock)
        (self._directory / COMMIT).unlink()
        os.fsync(self._lock)
        self._committed = True
        (self._directory / JOURNAL).unlink(missing_ok=True)
        for name in old:
            self._aside(name).unlink()

    def _discard(self) -> None:
        for file in self._open:
            file.abandon()
        self._open = []
        if self._notes is not None:
            self._notes.close()
        if self._lock < 0:
            return
        if not self._committed and self._mine:
            self._undo()
            noted = read_notes(self._directory)
            for path in self._directory.glob(f".*{UNFINISHED}") if not (noted and noted.units) else ():
                path.unlink()
            if not (noted and noted.units):
                (self._directory / JOURNAL).unlink(missing_ok=True)
            if self._made:
                with suppress(OSError):
                    self._directory.rmdir()
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _put(path: Path, content: bytes) -> None:
    """A file on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def runs(shape: Sequence[int], box: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The contiguous runs of a box in a row-major array: (first element, elements). All are of one length."""
    axis, length = len(shape), 1
    while axis:
        axis -= 1
        low, high = box[axis]
        length *= high - low
        if (low, high) != (0, shape[axis]):
            break
    lows = [low for low, _ in box[axis:]]
    for corner in product(*(range(low, high) for low, high in box[:axis])):
        at = 0
        for i, n in zip((*corner, *lows), shape, strict=True):
            at = at * n + i
        yield at, length

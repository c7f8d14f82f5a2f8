"""What an unfinished run has done, next to its output, so that the same command goes on where it stopped.

    <output>/.ckptc-lock             held by the living run: two runs into one output exclude each other
    <output>/.ckptc-unfinished/
        plan                         digest of the one plan that all of this belongs to
        source                       what its source was like (`ckptc.run.sources`), written before it
        linked                       there once source files have been linked into the checkpoint
        process.I                    of several processes: held by process I, which has joined
        token                        of several processes: what process 0 has said, so that each knows that it sees this
        journal.K                    what writer K has made durable: its data file, then a line for each batch of units
        checkpoint/                  the unfinished checkpoint, renamed when it is whole
        replaced/                    an older output, for the moment between two renames

A line is written only after the data it speaks of is on the disk. So whatever a line says can be trusted after a power
failure, and a line that a crash cut short is simply not there: its units are made again. What no line speaks of is
deleted when the next run begins.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ckptc.diagnostics import InputError, fail
from ckptc.regular import open_file
from ckptc.run.journal_lines import Lines
from ckptc.run.sources import Sighting, other_plan
from ckptc.storage.checkpoint.orbax_writer import Entry, ItemsWriter, WriterState
from ckptc.storage.formats import checksum
from ckptc.storage.sink.directory import Directory
from ckptc.storage.sink.durable import commit, make_durable

LOCK = ".ckptc-lock"
UNFINISHED = ".ckptc-unfinished"  # not a step's name: no reader takes it for a checkpoint
# Time between two syncs of data and journal, as long as there is something to sync: what a failure costs at most.
SYNC_SECONDS = 10.0
_LOCKED = (errno.EWOULDBLOCK, errno.EACCES)  # flock(2), and file systems that make fcntl locks of it
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GOES_ON = "; what is done is kept, and the same command goes on from there"


def output_error(output: Path | str, error: OSError, again: str = GOES_ON) -> InputError:
    """The system refused to write below `output`, in its words: `disk-full` or `unwritable-output`, to raise. `again`:
    what the help adds on what a later run finds.
    """
    if error.errno in _FULL:
        return fail("disk-full", f"no room to write {output}: {error.strerror}", help="make room" + again)
    reason = error.strerror or str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the output's
        help = "allow more open files (`ulimit -n`), or use fewer --jobs" + again
        return fail("system-refused", f"the system refused to open more files: {reason}", help=help)
    help = "check its permissions and the disk it lies on" + again
    return fail("unwritable-output", f"cannot write to {output}: {reason}", help=help)


@dataclass
class Unfinished:
    """An output directory's unfinished run, locked by this process, or joined by it."""

    output: Path
    final: Path  # what the checkpoint will become
    lock: int | None  # descriptor
    done: set[int] = field(default_factory=set)  # units, as positions in the plan's order of work
    writers: dict[int, WriterState] = field(default_factory=dict)  # what each earlier writer has written
    started: int = 0  # nanoseconds since the Unix epoch
    committed: bool = False  # whether the checkpoint has its name already: killed while it tidied up, it seems

    @property
    def directory(self) -> Path:
        return self.output / UNFINISHED

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint"

    @property
    def place(self) -> Directory:
        return Directory(self.checkpoint)

    def journal(self, number: int, writer: ItemsWriter) -> Journal:
        return Journal(self, number, writer)

    def sums(self) -> dict[int, int]:
        return read_sums(self)

    def show(self) -> str:
        token = secrets.token_hex(16)
        (self.directory / "token").write_text(token)
        return token

    def wrote(self, numbers: Sequence[int]) -> list[int]:
        return [k for k in numbers if self._index(k).exists()]

    def shows(self, numbers: Sequence[int], journals: Sequence[int]) -> bool:
        there = all((self.directory / f"journal.{k}").exists() for k in (*numbers, *journals))
        return there and all(self._index(k).exists() for k in numbers)

    def _index(self, number: int) -> Path:
        """There, unless the writer has written nothing."""
        return self.checkpoint / "items" / f"ocdbt.process_{number}" / "manifest.ocdbt"

    def complete(
        self, finish: Callable[[], None], before_commit: Callable[[Path], None] | None, check: Callable[[], None]
    ) -> None:
        """Has `finish` join what is written, and names it."""
        finish()
        if before_commit is not None:
            before_commit(self.checkpoint)
        make_durable(self.checkpoint)  # which may take long, before an older output goes; then two renames
        check()
        replace(self, self.final)
        commit(self.checkpoint, self.final)

    def note_links(self) -> None:
        """Says that links have been made: of a plan that only links, nothing else tells that a run was under way."""
        _write(self.directory / "linked", "")

    def forget(self) -> None:
        """Removes what is unfinished, the lock's file included; `release` is still to be called."""
        shutil.rmtree(self.directory)
        (self.output / LOCK).unlink(missing_ok=True)

    def release(self) -> None:
        """Gives the lock back, if that is not done already; what is unfinished stays for the next run."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def open_unfinished(
    output: Path, final: Path, plan_digest: str, restart: bool = False, source: Sighting | None = None
) -> Unfinished:
    """Locks the output's unfinished run, an earlier one of the same plan or a new one. `final`: what it will become.
    `source`: what is read, to be held against what was.

    Raises InputError: `output-busy`, `unwritable-output`, `disk-full`, and, unless `restart`, `other-plan` or
    `source-changed`, where what is unfinished is of another.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        unfinished = Unfinished(output, final, _lock(output))
        try:
            _enter(unfinished, plan_digest, restart, source)
        except BaseException:
            unfinished.release()
            raise
    except OSError as error:
        raise output_error(output, error) from None
    return unfinished


def _lock(output: Path) -> int:
    """The lock's descriptor. A run that ends removes the file: what is locked must still be the file of that name."""
    path = output / LOCK
    while True:
        lock = flock(path, output)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)


def flock(path: Path, output: Path) -> int:
    """The descriptor of a file that this process has locked. Raises `output-busy` when another process has."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno not in _LOCKED:
            raise
        help = "wait for it, or choose another --output"
        raise fail("output-busy", f"another run is writing to {output}", help=help) from None
    return lock


def _enter(unfinished: Unfinished, plan_digest: str, restart: bool, source: Sighting | None) -> None:
    directory, final = unfinished.directory, unfinished.final
    if directory.is_symlink():  # what is not of this run is deleted there: not in a directory that may hold anything
        raise NotADirectoryError(errno.ENOTDIR, f"{UNFINISHED} is a symbolic link")
    directory.mkdir(exist_ok=True)
    for path in directory.glob("process.*"):  # of an earlier run, that of a dead process 0: some may still live
        os.close(flock(path, unfinished.output))
    replaced = directory / "replaced"
    if replaced.exists() and not os.path.lexists(final):  # killed between the two renames of `replace`
        os.rename(replaced, final)
    found, kept = _read(directory / "plan"), Sighting.kept(_read(directory / "source"))
    if not restart and found is not None and found != plan_digest:
        raise other_plan(unfinished.output, plan_digest, found, source, kept)
    if restart or found is None or (source and not kept):
        (directory / "plan").unlink(missing_ok=True)  # first: what is left belongs to no plan
        _keep(directory, ())
        _write(directory / "source", json.dumps(source.record() if source else {}))
        _write(directory / "plan", plan_digest)
        return
    if not unfinished.checkpoint.exists() and (any(_journals(directory)) or (directory / "linked").exists()):
        unfinished.committed = True
        return
    if source:
        source.check_same(kept, unfinished.output)
    read_writers(unfinished, [process for process, _ in _journals(directory)])
    _keep(directory, unfinished.writers)


def read_writers(unfinished: Unfinished, processes: Iterable[int]) -> None:
    """Takes in what the journals of some writers say."""
    for process in processes:
        path = unfinished.directory / f"journal.{process}"
        read = Lines(unfinished.checkpoint, process, path)
        if read.file is None:
            continue
        os.truncate(path, read.length)  # a line that a crash cut short, so that the next one does not continue it
        unfinished.done.update(read.units)
        unfinished.writers[process] = WriterState((read.file,), tuple(read.entries))


def _keep(directory: Path, writers: Iterable[int]) -> None:
    """Deletes all that the journals of `writers` do not speak of."""
    writers = set(writers)
    kept = {"plan", "source", *(f"journal.{k}" for k in writers), *(("checkpoint",) if writers else ())}
    for path in directory.iterdir():
        if path.name not in kept:
            _remove(path)
    for path in (directory / "checkpoint" / "items").glob("ocdbt.process_*"):
        if path.name not in {f"ocdbt.process_{k}" for k in writers}:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def replace(unfinished: Unfinished, final: Path) -> None:
    """Takes an older output out of the way, to where the next run would find it; deleted with what is unfinished."""
    if os.path.lexists(final):
        os.rename(final, unfinished.directory / "replaced")


def _read(path: Path) -> str | None:
    """The text of a small file; None when there is none, or when it is empty, as a power failure may leave it."""
    try:
        with open_file(path) as file:
            return file.read().decode("utf-8", "replace").strip() or None
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _journals(directory: Path) -> Iterator[tuple[int, Path]]:
    for path in sorted(directory.glob("journal.*")):
        if re.fullmatch(r"journal\.[0-9]{1,6}", path.name):
            yield int(path.suffix[1:]), path


def read_sums(unfinished: Unfinished) -> dict[int, int]:
    """The sums of all chunks that the journals speak of, by the array's position in the plan."""
    out: defaultdict[int, int] = defaultdict(int)
    for process, path in _journals(unfinished.directory):
        for array, value in Lines(unfinished.checkpoint, process, path).sums.items():
            out[array] = checksum.add(out[array], value)
    return dict(out)


class Journal:
    """One writer's journal. `add` takes a finished unit; a thread syncs the data and then writes the line, so that work
    goes on meanwhile. Not for several threads."""

    def __init__(self, unfinished: Unfinished, process: int, writer: ItemsWriter) -> None:
        self._writer = writer
        path = unfinished.directory / f"journal.{process}"
        if process not in unfinished.writers:
            # The data file's name is made durable before a line can speak of it.
            root = unfinished.checkpoint / "items" / f"ocdbt.process_{process}"
            for directory in (root / "d", root, root.parent, unfinished.checkpoint, unfinished.directory):
                _sync_directory(directory)
            _write(path, writer.data.files[0])
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._units: list[int] = []
        self._chunks: list[Entry] = []
        self._sums: defaultdict[int, int] = defaultdict(int)
        self._synced = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def add(self, unit: int, array: int, chunks: Sequence[Entry], total: int) -> None:
        """Notes a unit of an array whose chunks have been written; `total` is the sum of its chunks.

        Raises what an earlier sync failed with.
        """
        self._units.append(unit)
        self._chunks += chunks
        self._sums[array] = checksum.add(self._sums[array], total)
        due = time.monotonic() - self._synced >= SYNC_SECONDS
        if due and (self._thread is None or not self._thread.is_alive()):
            self._join()
            self._synced = time.monotonic()
            self._thread = threading.Thread(target=self._write_batch, args=self._take(), daemon=True)
            self._thread.start()

    def _take(self) -> tuple[list[int], list[Entry], dict[int, int]]:
        batch = self._units, self._chunks, self._sums
        self._units, self._chunks, self._sums = [], [], defaultdict(int)
        return batch

    def _write_batch(self, units: list[int], chunks: list[Entry], sums: dict[int, int]) -> None:
        try:
            self._writer.sync()
            record: dict[str, object] = {
                "units": units,
                "sums": list(sums.items()),
                "chunks": [chunk[:3] for chunk in chunks],
            }
            if self._writer.large.size:
                record["large"] = self._writer.large.size
            view = memoryview(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)
        except BaseException as error:
            self._error = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            # Nothing more may be written: a later line would follow one that is cut short, or speak of lost data.
            raise self._error

    def flush(self) -> None:
        """Makes everything added durable, and its lines."""
        self._join()
        if self._units:
            self._write_batch(*self._take())
            self._join()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
            else:  # what is done is kept, if that is still possible; the error is what is said
                with suppress(OSError, RuntimeError):
                    self.flush()
        finally:
            os.close(self._descriptor)

"""What an unfinished run has done, next to its output, so that the same command goes on where it stopped.

    <output>/.ckptc-unfinished/
        lock            held by the living run: two runs into one output exclude each other
        plan            digest of the one plan these chunks belong to
        journal.K       what writer K has made durable: its data file, then a line for each batch of units
        items/…         the unfinished checkpoint

A line is written only after the data it speaks of is on the disk. So whatever a line says can be trusted after a power failure, and a line
that a crash cut short is simply not there: its units are made again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from ckptc.diagnostics import fail
from ckptc.io.orbax import Entry, ItemsWriter, WriterState

UNFINISHED = ".ckptc-unfinished"  # not a step's name: no reader takes it for a checkpoint
SYNC_BYTES = 256 << 20  # data written between two syncs: what a power failure costs at most


@dataclass
class Unfinished:
    """An output directory's unfinished run, locked by this process."""

    directory: Path
    lock: int  # descriptor
    done: set[int] = field(default_factory=set)  # units, as positions in the plan's order of work
    writers: dict[int, WriterState] = field(default_factory=dict)  # what each earlier writer has written

    def release(self) -> None:
        """Gives the lock back; what is unfinished stays for the next run."""
        os.close(self.lock)


def open_unfinished(output: Path, plan_digest: str, restart: bool = False) -> Unfinished:
    """Locks the output's unfinished run, an earlier one of the same plan or a new one.

    Raises InputError: `output-busy` (another run is writing there), `other-plan` (what is unfinished belongs to another plan, and
    `restart` does not say to throw it away), `unwritable-output`.
    """
    directory = output / UNFINISHED
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise fail("unwritable-output", f"cannot write to {output}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise fail(
            "output-busy", f"another run is writing to {output}", help="wait for it, or choose another --output"
        ) from None
    if restart:
        _clear(directory)
    found = _read(directory / "plan")
    if found is not None and found != plan_digest:
        os.close(lock)
        raise fail(
            "other-plan",
            f"an unfinished run of another plan is in {output}",
            notes=(f"expected: {plan_digest}", f"found:    {found}"),
            help="run that plan to go on with it, or use --restart to throw its work away",
        )
    unfinished = Unfinished(directory, lock)
    if found is None:
        _clear(directory)
        _write(directory / "plan", plan_digest)
    else:
        _load(unfinished)
    return unfinished


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _load(unfinished: Unfinished) -> None:
    for path in sorted(unfinished.directory.glob("journal.*")):
        lines = path.read_bytes().split(b"\n")
        entries: list[Entry] = []
        units: list[int] = []
        file = lines[0].decode("ascii", "replace")
        for line in lines[1:-1]:  # the piece after the last newline is a line cut short
            try:
                record = json.loads(line)
                batch = [Entry(key, offset, length) for key, offset, length in record["chunks"]]
            except (ValueError, TypeError, KeyError):
                break
            units += record["units"]
            entries += batch
        data = unfinished.directory / "items" / f"ocdbt.process_{path.suffix[1:]}" / "d" / file
        if (
            len(lines) > 1
            and data.is_file()
            and data.stat().st_size >= max((e.offset + e.length for e in entries), default=0)
        ):
            unfinished.done.update(units)
            unfinished.writers[int(path.suffix[1:])] = WriterState(file, tuple(entries))
        else:
            path.unlink()


class Journal:
    """One writer's journal. `add` takes a finished unit; a thread syncs the data and then writes the line, so that work goes on meanwhile."""

    def __init__(self, directory: Path, process: int, writer: ItemsWriter, resumed: bool) -> None:
        self._writer = writer
        self._path = directory / f"journal.{process}"
        if not resumed:
            _write(self._path, writer.file)
        else:
            _cut(self._path)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._units: list[int] = []
        self._chunks: list[Entry] = []
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def add(self, unit: int, chunks: Sequence[Entry]) -> None:
        """Notes a unit whose chunks have been written. Raises what an earlier sync failed with."""
        self._units.append(unit)
        self._chunks += chunks
        self._bytes += sum(c.length for c in chunks)
        if self._bytes >= SYNC_BYTES and (self._thread is None or not self._thread.is_alive()):
            self._join()
            self._thread = threading.Thread(target=self._write_batch, args=self._take(), daemon=True)
            self._thread.start()

    def _take(self) -> tuple[list[int], list[Entry]]:
        batch = self._units, self._chunks
        self._units, self._chunks, self._bytes = [], [], 0
        return batch

    def _write_batch(self, units: list[int], chunks: list[Entry]) -> None:
        try:
            self._writer.sync()
            line = json.dumps({"units": units, "chunks": chunks}, separators=(",", ":")) + "\n"
            view = memoryview(line.encode())
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
        if self._thread is not None:
            self._thread.join()
        os.close(self._descriptor)


def _cut(path: Path) -> None:
    """Drops a last line that a crash cut short, so that the next one does not continue it."""
    data = path.read_bytes()
    os.truncate(path, data.rfind(b"\n") + 1)

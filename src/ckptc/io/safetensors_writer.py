"""safetensors files written in any order, at places known beforehand, under their final names only when all of them
are whole.

    <directory>/.model-00001-of-00002.safetensors.ckptc-unfinished    while it is written: header first, then boxes at
    their places <directory>/model-00001-of-00002.safetensors                      renamed when every file is on the
    disk <directory>/model.safetensors.index.json, config.json             last, so that a directory with a config is a
    whole checkpoint

An interrupted run leaves nothing but hidden files of a name that no reader takes for weights; the next run removes
them. The directory is locked while files are written to it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptc.diagnostics import fail
from ckptc.io.checkpoint import CONFIG, INDEX
from ckptc.io.reader import resolve

UNFINISHED = ".ckptc-unfinished"


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One file: its name, its size in bytes, and what it begins with."""

    name: str
    size: int
    header: bytes


class CheckpointWriter:
    """The files of one checkpoint. A context manager: leaving it without `commit` removes what was written.

    Raises InputError: `output-exists` (unless `force`), `output-busy`, `unwritable-output`.
    """

    def __init__(self, directory: Path, files: Sequence[FileSpec], *, force: bool = False) -> None:
        self._directory, self._files = directory, tuple(files)
        self._descriptors: list[int] = []
        self._committed = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise fail("unwritable-output", f"cannot write to {directory}: {error.strerror}") from None
        try:
            self._claim(force)
            for file in self._files:
                self._descriptors.append(self._create(file))
        except BaseException:
            self._discard()
            raise

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
        for name in os.listdir(self._directory):
            if name.endswith(UNFINISHED):
                (self._directory / name).unlink()
        self._replaced = [
            n for n in sorted(os.listdir(self._directory)) if n in (CONFIG, INDEX) or n.endswith(".safetensors")
        ]
        if self._replaced and not force:
            raise fail(
                "output-exists",
                f"there is a checkpoint in {self._directory} already: {self._replaced[0]}",
                help="choose another --output, or use --force to replace it",
            )

    def _temporary(self, name: str) -> Path:
        return resolve(self._directory, f".{name}{UNFINISHED}")

    def _create(self, file: FileSpec) -> int:
        try:
            descriptor = os.open(self._temporary(file.name), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _reserve(descriptor, file.size)
                _write_all(descriptor, memoryview(file.header), 0)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise fail(
                "unwritable-output",
                f"cannot write {file.name} of {file.size} bytes to {self._directory}: {error.strerror}",
            ) from None
        return descriptor

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
            _write_all(self._descriptors[file], view[done : done + length * item], begin + first * item)
            done += length * item

    def read_box(
        self, file: int, begin: int, shape: Sequence[int], box: Sequence[tuple[int, int]], out: npt.NDArray[Any]
    ) -> None:
        """Reads back what `write_box` wrote, into an array like its `data`."""
        item = out.itemsize
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        for first, length in runs(shape, box):
            part, at = view[done : done + length * item], begin + first * item
            done += length * item
            while part:
                count = os.preadv(self._descriptors[file], [part], at)
                if not count:
                    raise OSError(errno.EIO, "an unfinished file ends early", self._files[file].name)
                part, at = part[count:], at + count

    def commit(self, texts: Mapping[str, str], copies: Mapping[str, Path]) -> None:
        """Makes the files durable and gives them their names, then the copies, then `texts`, in their order.

        `texts`: index and config by name, the config last. `copies`: files to copy, by the name they get.
        """
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        for name in reversed(self._replaced):  # the index goes before what it names
            (self._directory / name).unlink()
        for file in self._files:
            os.rename(self._temporary(file.name), resolve(self._directory, file.name))
        for name, source in copies.items():
            self._put(name, source.read_bytes())
        os.fsync(self._lock)
        for name, text in texts.items():
            self._put(name, text.encode())
        os.fsync(self._lock)
        self._committed = True

    def _put(self, name: str, content: bytes) -> None:
        """A file whole or not at all."""
        temporary = self._temporary(name)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, resolve(self._directory, name))

    def _discard(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        if self._lock < 0:
            return
        if not self._committed:
            for file in self._files:
                self._temporary(file.name).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()


def _reserve(descriptor: int, size: int) -> None:
    """Room on the disk for all of a file, so that a disk too small is known at once; where the system cannot say, its
    length alone.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, view: memoryview, at: int) -> None:
    while view:  # the system writes at most 2 GiB at a time
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


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

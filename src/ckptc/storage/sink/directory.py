"""Where a checkpoint's files go: what writing one needs of a place, and the place that is a local directory.

Files are known by names relative to the checkpoint's step, such as `items/_METADATA`. The other place is an object
store (`ckptc.storage.sink.bucket`). They differ in what a process can do with the chunks it makes: a local file grows, an object
is written once, whole; so a process has one data file there and many here, and `Data` is what both look like.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from ckptc.storage.sink import file as bulk
from ckptc.storage.sink.file import BulkFile


class Data(Protocol):
    """The data files of one writer, in `<below>d/`: chunks are appended, and known by file, offset and length."""

    files: list[str]  # names in the order that entries count them in, 32 hex digits each
    eager: bool  # whether what is taken is made durable unasked, while more comes

    def append(self, view: memoryview) -> tuple[int, int]:
        """Take the bytes of a chunk, and say in which file, from 0, and at which offset they are or will be."""

    def sync(self) -> None:
        """Make all that was taken durable."""

    def close(self) -> bool:
        """The same, and nothing more may come. False where nothing was ever taken; then nothing is left, either."""


class Place(Protocol):
    """Where the files of an unfinished checkpoint go."""

    def write(self, name: str, *parts: bytes) -> None:
        """A file, durable, in place of an older one of that name."""

    def names(self, below: str) -> list[str]:
        """The names that begin with `below`."""

    def holds(self, name: str, size: int) -> bool:
        """Whether the file is there with so many bytes at least."""

    def spec(self, below: str) -> dict[str, Any]:
        """TensorStore's specification of a key-value store of the files below a name that ends with a slash."""

    def result(self, future: Any, below: str) -> Any:
        """What TensorStore answers to a request to such a store.

        Raises RuntimeError with its words, or InputError where it is the place that fails.
        """

    def data(self, below: str, files: Sequence[str], end: int) -> Data:
        """The data files of a writer: `files` that are kept of an earlier one, whose last chunk ends at `end`; with no
        `files`, all that is there is nobody's.

        Raises RuntimeError when they are not there.
        """

    def reserved(self, name: str, size: int) -> BulkFile:
        """A file of `size` bytes that several processes write into, each at places of its own."""

    def supersede(self, kept: Collection[str]) -> None:
        """Makes way for this checkpoint's index and metadata, once all its chunks are known to be in `kept`.

        Raises RuntimeError where something else is in the way.
        """


class Directory:
    """A checkpoint in a local directory, of no other's files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, *parts: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())

    def names(self, below: str) -> list[str]:
        folder, _, first = below.rpartition("/")
        found = (p for top in (self.root / folder).glob(f"{first}*") for p in (top, *top.rglob("*")))
        return sorted(p.relative_to(self.root).as_posix() for p in found if not p.is_dir())

    def holds(self, name: str, size: int) -> bool:
        try:
            return (self.root / name).stat().st_size >= size
        except FileNotFoundError:
            return False

    def spec(self, below: str) -> dict[str, Any]:
        return {"driver": "file", "path": f"{self.root.absolute()}/{below}"}

    def result(self, future: Any, below: str) -> Any:
        try:
            return future.result()
        except Exception as error:  # TensorStore has no common class: ValueError, OSError, and its own
            raise RuntimeError(f"{below} cannot be read: {words(error)}") from None

    def data(self, below: str, files: Sequence[str], end: int) -> Data:
        return _OneFile(self.root / below, files, end)

    def reserved(self, name: str, size: int) -> BulkFile:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = BulkFile(path)
        if file.size < size:
            try:
                file.reserve(size)
            except BaseException:
                file.abandon()
                raise
        return file

    def supersede(self, kept: Collection[str]) -> None:
        took_part = {name.split("/")[1] for name in kept}
        for path in (self.root / "items").glob("ocdbt.process_*"):
            if path.name not in took_part:
                raise RuntimeError(f"{path.name} is there, but took no part")
        shutil.rmtree(self.root / "items" / "d", ignore_errors=True)  # an index that was interrupted


def words(error: Exception) -> str:
    """What TensorStore says, without where in it that was said."""
    return str(error).partition(" [")[0]


class _OneFile:
    """One data file that grows. Any thread may append."""

    def __init__(self, root: Path, files: Sequence[str], end: int) -> None:
        if not files:
            shutil.rmtree(root, ignore_errors=True)
        self._root, self._end, self._lock = root, end, threading.Lock()
        self.files = list(files) or [secrets.token_hex(16)]
        (root / "d").mkdir(parents=True, exist_ok=True)
        self._data = BulkFile(root / "d" / self.files[0])
        if (size := self._data.size) < end:
            self._data.abandon()
            raise RuntimeError(f"{self.files[0]} has {size} bytes, the chunks recorded in it end at {end}")
        self._data.truncate(end)

    @property
    def eager(self) -> bool:
        return self._data.eager

    @eager.setter
    def eager(self, eager: bool) -> None:
        self._data.eager = eager

    def append(self, view: memoryview) -> tuple[int, int]:
        with self._lock:
            offset = bulk.place(self._end, view.nbytes)
            self._end = offset + view.nbytes
        self._data.write(offset, view)
        return 0, offset

    def sync(self) -> None:
        self._data.sync()

    def close(self) -> bool:
        self._data.close()
        if not self._end:
            shutil.rmtree(self._root)
            return False
        for stale in (self._root / "d").iterdir():  # an index that an interrupted `close` of the writer left
            if stale.name != self.files[0]:
                stale.unlink()
        return True

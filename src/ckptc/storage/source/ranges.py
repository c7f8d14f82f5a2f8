"""Ranges of bytes of shard files, read into the caller's buffers.

Reading is `preadv` straight into a buffer the caller reuses: no page faults on fresh memory, no shared file
position, so any number of threads read at once. Where a reader is told that bytes are read once, large ranges that
the page cache does not have come past it (`ckptc.storage.source.direct`). Files are opened when first needed and kept open, up
to a bound, because opening one costs a round trip on network disks. A file's size is compared with what the plan
says whenever it is opened.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptc.diagnostics import InputError
from ckptc.ir.source import SourceFile
from ckptc.storage.source.direct import LEAST, Buffers, Uncached
from ckptc.storage.source.files import RECOMPILE, open_regular, refuse, resolve, shown, unreadable


class _Open:
    """An open file and the reads under way on it; it is closed only when there are none."""

    __slots__ = ("_tried", "_uncached", "descriptor", "readers")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.readers = 0
        self._tried, self._uncached = False, None  # type: bool, Uncached | None

    def uncached(self) -> Uncached | None:
        """The way past the page cache, opened when first asked for: two descriptors more. For one thread at a time."""
        if not self._tried:
            self._tried = True
            with suppress(OSError):
                self._uncached = Uncached(self.descriptor)
        return self._uncached

    def close(self) -> None:
        os.close(self.descriptor)
        if self._uncached is not None:
            self._uncached.close()


class RangeReader:
    """Byte ranges of a checkpoint's files. Safe from several threads; a context manager that closes them.

    At most `max_open` files are kept open, the most recently used ones; more are open only while more than
    `max_open` of them are being read at the same moment. `once`: hardly a byte will be read twice, so large ranges that
    the page cache does not have are read past it.
    """

    def __init__(self, directory: Path, files: Sequence[SourceFile], max_open: int = 64, *, once: bool = False) -> None:
        self._directory = directory
        self._files = tuple(files)
        self._max_open = max(1, max_open)
        self._once = once
        self._buffers = Buffers()
        self._from_disk = False
        self._open: OrderedDict[int, _Open] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()  # guards `_open`, its entries, `_closed`, `_bytes_read`; never held while reading
        self._closed = False
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes delivered into buffers so far, those of reads that then failed included."""
        return self._bytes_read

    @property
    def from_disk(self) -> bool:
        """Whether anything was read past the page cache."""
        return self._from_disk

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable, C-contiguous, any format) from byte `offset` of `files[file]` on.

        Raises `InputError`: `source-missing`, `source-truncated`, `source-changed` or `source-unreadable`;
        the buffer's content is then unspecified. Raises ValueError for an index or offset no file has, or
        once closed.
        """
        if not 0 <= file < len(self._files) or not 0 <= offset < 1 << 63:
            raise ValueError(f"no file {file} or no offset {offset}: there are {len(self._files)} files")
        if buffer.readonly or not buffer.c_contiguous:
            raise ValueError("the buffer must be writable and C-contiguous")
        if buffer.nbytes == 0:  # which `cast` refuses
            return
        with buffer.cast("B") as view:
            entry = self._acquire(file)
            done = 0
            try:
                if self._once and len(view) >= LEAST:
                    with self._lock:
                        uncached = entry.uncached()
                    if uncached is not None:
                        done, past = uncached.read(offset, view, self._buffers)
                        self._from_disk = self._from_disk or past > 0
                while done < len(view):  # Linux reads at most 2 GiB a call, and less when interrupted
                    count = os.preadv(entry.descriptor, [view[done:]], offset + done)
                    if count == 0:
                        size = os.fstat(entry.descriptor).st_size
                        raise self._wrong_size("source-truncated", file, size, offset + len(view))
                    done += count
            except OSError as error:
                raise unreadable(self._files[file].name, error) from None
            finally:
                self._release(file, entry, done)

    def close(self) -> None:
        """Close every descriptor, those being read from as soon as their read ends. May be called again."""
        with self._lock:
            self._closed = True
            self._shrink(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _acquire(self, file: int) -> _Open:
        with self._lock:
            if (entry := self._claim(file)) is not None:
                return entry
        # Not under the lock: opening may take as long as a read. Two threads may open one file; one wins.
        opened = self._open_file(file)
        with self._lock:
            try:
                entry = self._claim(file)
            except ValueError:
                opened.close()
                raise
            if entry is not None:
                opened.close()
                return entry
            self._shrink(self._max_open - 1)
            entry = self._open[file] = opened
            entry.readers = 1
            return entry

    def _claim(self, file: int) -> _Open | None:
        """The entry of an open file, claimed for one more read. Called with the lock held."""
        if self._closed:
            raise ValueError("the reader is closed")
        entry = self._open.get(file)
        if entry is not None:
            entry.readers += 1
            self._open.move_to_end(file)
        return entry

    def _release(self, file: int, entry: _Open, count: int) -> None:
        with self._lock:
            entry.readers -= 1
            self._bytes_read += count
            self._shrink(0 if self._closed else self._max_open)

    def _shrink(self, most: int) -> None:
        """Close idle files, least recently used first, until `most` are open or none is idle. Lock held."""
        excess = len(self._open) - most
        if excess <= 0:
            return
        for file in [file for file, entry in self._open.items() if entry.readers == 0][:excess]:
            self._open.pop(file).close()

    def _open_file(self, file: int) -> _Open:
        record = self._files[file]
        descriptor, size = open_regular(resolve(self._directory, record.name), record.name)
        try:
            if size < record.size:
                raise self._wrong_size("source-truncated", file, size, record.size)
            if size > record.size:
                raise self._wrong_size("source-changed", file, size, record.size)
            if hasattr(os, "posix_fadvise"):
                with suppress(OSError):  # advice only; some file systems take none
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            os.close(descriptor)
            raise
        return _Open(descriptor)

    def _wrong_size(self, code: str, file: int, size: int, needed: int) -> InputError:
        name = shown(self._files[file].name)
        message = f"{name} is truncated: byte {needed} is needed but the file is only {size} bytes"
        if code == "source-changed":
            message = f"{name} is not the file the plan was made from"
        return refuse(
            code,
            message,
            f"{max(needed, self._files[file].size)} bytes",
            f"{size} bytes",
            RECOMPILE,
        )

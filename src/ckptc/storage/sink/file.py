"""A file that grows by large pieces, written past the page cache where that is possible.

A write through the page cache costs a core about as much as the whole conversion (fresh pages, a copy, write-back); with
O_DIRECT the disk takes the bytes from where they are. It asks for addresses, offsets and lengths that are multiples of
the block size (open(2), "O_DIRECT"), so pieces begin at multiples of `ALIGN`, what is aligned of them goes directly,
and the rest, the end of a piece, through a second descriptor. The two never share a page.

A disk that empties its own cache, which a sync has it do, takes nothing else meanwhile. Left to the end, that is half of
the time; so it is begun every `EAGER` bytes, by a thread, and what is written until it is done, by any process forked from
the same one, goes into the page cache, whence the next sync takes it. Unless the disk is wanted for reads as well: they
would wait (a cold conversion of 12 GB was 1.4 times as fast without), and then the disk is busy enough (`BulkFile.eager`).

Only on file systems that lie on a block device (the kernel gives all others, network and memory ones among them,
device numbers of major 0): over a network, the page cache is what sends pieces side by side.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

ALIGN = 4096  # bytes: no disk in use has larger blocks
HUGE = 1 << 21  # bytes of a huge page on most machines
LEAST = 1 << 18  # bytes: smaller pieces are better gathered by the page cache
EAGER = 128 << 20  # bytes written to a file after which it is synced, unasked
BOUNCE = 4 << 20  # bytes copied at once of pieces that are not aligned in memory


def page_buffer(size: int) -> npt.NDArray[np.uint8]:
    """uint8[size], fresh memory that begins at a page, as direct reads and writes want it; in huge pages, where the
    system has them, if it is not small.

    A disk takes a write in as many requests as the memory lies in pieces, up to a number of pieces for each (254 for
    virtio, so about 1 MB of pages of 4 KiB): from huge pages, requests were seven times as large and a disk twice as
    fast. Raises MemoryError.
    """
    huge = size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE")
    # Whole huge pages, or Linux does not let them begin at one.
    length = -(-size // HUGE) * HUGE if huge else max(1, size)
    try:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE)  # a child that is forked later has a copy of its own
    except OSError as error:
        raise MemoryError(f"{length} bytes: {error.strerror}") from None
    if huge:
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)[:size]


def grown(buffer: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """The buffer, or a larger one that holds nothing yet."""
    return buffer if buffer.size >= size else page_buffer(size)


def place(end: int, size: int) -> int:
    """Where a piece of `size` bytes goes in a file that ends at `end`."""
    return -(-end // ALIGN) * ALIGN if size >= LEAST else end


# A byte for each process that waits for a sync, shared with those that are forked from this one. (Two of one byte write a
# little more through the page cache, or less.)
_SYNCING = mmap.mmap(-1, mmap.PAGESIZE)


@contextmanager
def _syncing() -> Iterator[None]:
    slot = os.getpid() % len(_SYNCING)
    _SYNCING[slot] = 1
    try:
        yield
    finally:
        _SYNCING[slot] = 0


def _anyone_syncs() -> bool:
    return _SYNCING.find(b"\1", 0) >= 0


class BulkFile:
    """Writes pieces at offsets that `place` gave, from any thread. Raises what the system does."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._direct: int | None = None
        self._lock = threading.Lock()  # of what follows
        self.eager = True  # whether syncs are begun unasked
        self._since = 0  # bytes written since a sync was begun
        self._eager: threading.Thread | None = None
        self._syncs = threading.Lock()  # held by a sync: the system tells only one of several what has failed
        self._error: OSError | None = None  # what a sync has failed with: it is told once only
        if hasattr(os, "O_DIRECT") and os.major(os.fstat(self._fd).st_dev):
            try:
                self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:  # which says that the file system has no such writes
                    os.close(self._fd)
                    raise

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def write(self, offset: int, view: memoryview) -> None:
        """All bytes of `view` at `offset`."""
        head, size = -offset % ALIGN, len(view)
        if size >= LEAST + head and self._direct is not None and not _anyone_syncs():
            _write(self._fd, offset, view[:head])
            offset, view = offset + head, view[head:]
            body = len(view) // ALIGN * ALIGN
            if self._write_directly(self._direct, offset, view[:body]):
                offset, view = offset + body, view[body:]
        _write(self._fd, offset, view)
        if self._direct is not None:
            self._sync_ahead(size)

    def _sync_ahead(self, size: int) -> None:
        with self._lock:
            self._since += size
            if self._error is not None:
                raise self._error
            if self.eager and self._since >= EAGER and (self._eager is None or not self._eager.is_alive()):
                self._since = 0
                self._eager = threading.Thread(target=self._sync_unasked, daemon=True)
                self._eager.start()

    def _sync_unasked(self) -> None:
        with suppress(OSError):  # which whoever asks gets
            self._sync(os.fdatasync)

    def _sync(self, ask: Callable[[int], None]) -> None:
        with self._syncs:
            if self._error is not None:
                raise self._error
            try:
                with _syncing():
                    ask(self._fd)
            except OSError as error:
                self._error = error
                raise

    def reserve(self, size: int) -> None:
        """Room on the disk for a file of `size` bytes, so that a disk too small is known at once; where the system
        cannot say, its length alone.
        """
        try:
            os.posix_fallocate(self._fd, 0, size)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            os.ftruncate(self._fd, size)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` with what is at `offset`."""
        while view:
            count = os.preadv(self._fd, [view], offset)
            if not count:
                raise OSError(errno.EIO, "an unfinished file ends early")
            view, offset = view[count:], offset + count

    def settle(self) -> None:
        """Waits for a sync that nobody has asked for, and raises what it failed with. To be called by a process that
        leaves `sync` or `close` to another one.
        """
        if self._eager is not None:
            self._eager.join()
        if self._error is not None:
            raise self._error

    def sync(self) -> None:
        """Makes what has been written durable."""
        self._sync(os.fdatasync)

    def close(self) -> None:
        """Makes everything durable, the file's size included, and closes it."""
        try:
            self._sync(os.fsync)
        finally:
            self.abandon()

    def abandon(self) -> None:
        if self._eager is not None:
            self._eager.join()
        os.close(self._fd)
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def _write_directly(self, descriptor: int, offset: int, view: memoryview) -> bool:
        """Whole blocks. False where the system refuses direct writes after all: nothing is lost by writing it again."""
        try:
            if np.frombuffer(view, dtype=np.uint8).ctypes.data % ALIGN == 0:
                _write(descriptor, offset, view)
            else:
                _write_bounced(descriptor, offset, view)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True


_BOUNCING = threading.Lock()
_BOUNCE: list[npt.NDArray[np.uint8]] = []  # none or one, for all files of the process


def _write_bounced(descriptor: int, offset: int, view: memoryview) -> None:
    with _BOUNCING:
        if not _BOUNCE:
            _BOUNCE.append(page_buffer(BOUNCE))
        bounce = _BOUNCE[0].data
        for begin in range(0, len(view), BOUNCE):
            part = view[begin : begin + BOUNCE]
            bounce[: len(part)] = part
            _write(descriptor, offset + begin, bounce[: len(part)])


def _write(descriptor: int, offset: int, view: memoryview) -> None:
    while len(view):  # the system writes at most 2 GiB at a time
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written

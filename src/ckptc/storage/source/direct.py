"""Reads past the page cache, of what is not in it.

A read through the page cache costs a core fresh pages for every byte, and a disk gets it in the pieces of the system's
read-ahead. What will be read once gains nothing from being kept: with O_DIRECT, into memory that is reused, cold files
were read up to three times as fast, for half of the processor time. What the page cache does have is copied from there
all the same, which no disk can match.

O_DIRECT asks for addresses, offsets and lengths that are multiples of the block size (open(2), "O_DIRECT"), and tensors
begin anywhere; so whole blocks are read into a buffer of its own, and what is wanted is copied from there. Only on file
systems that lie on a block device, as in `ckptc.storage.sink.file`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import numpy.typing as npt

from ckptc.storage.sink.file import ALIGN, page_buffer

LEAST = 1 << 20  # bytes: smaller ranges are better gathered by the system's read-ahead
PIECE = 4 << 20  # bytes read at once, and of memory for each thread that reads


class Uncached:
    """A second way to read an open file. Safe from several threads."""

    def __init__(self, descriptor: int) -> None:
        """Raises OSError where there is no such way."""
        if not (hasattr(os, "O_DIRECT") and hasattr(os, "RWF_NOWAIT") and os.major(os.fstat(descriptor).st_dev)):
            raise OSError(errno.EOPNOTSUPP, "no reads past the page cache")
        again = f"/proc/self/fd/{descriptor}"
        self._direct = os.open(again, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            self._cached = os.open(again, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._direct)
            raise
        with suppress(OSError):  # some file systems take no advice
            # Or the system would read ahead of what it has, and then have that as well, and so on.
            os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_RANDOM)

    def close(self) -> None:
        os.close(self._direct)
        os.close(self._cached)

    def read(self, offset: int, view: memoryview, buffers: Buffers) -> tuple[int, int]:
        """Fills the beginning of `view`, of bytes, from the file's `offset` on; each piece from the page cache if that
        has its beginning. Returns the bytes filled, and how many of them came from the disk. They are fewer than `view`
        has where the file ends or the system refuses: who goes on through the page cache gets the rest, or the reason.
        """
        done = past = 0
        with buffers.one() as buffer, suppress(OSError):
            while done < len(view):
                at = offset + done
                skip = at % ALIGN
                if self._has(at):  # to the end of a block, whose rest the next piece would find there
                    count = os.preadv(self._cached, [view[done : done + PIECE - skip]], at)
                else:
                    blocks = buffer[: -(-(skip + len(view) - done) // ALIGN) * ALIGN]
                    count = min(os.preadv(self._direct, [blocks.data], at - skip) - skip, len(view) - done)
                    view[done : done + max(0, count)] = blocks[skip : skip + max(0, count)].data
                    # Asking had the system read a page, which would make the next run take all of this for cached.
                    os.posix_fadvise(self._cached, at - skip, ALIGN, os.POSIX_FADV_DONTNEED)
                    past += max(0, count)
                if count <= 0:
                    break
                done += count
        return done, past

    def _has(self, offset: int) -> bool:
        """Whether the page cache has the byte at `offset`. Asked for more, the system would begin to read all of it."""
        try:
            return os.preadv(self._cached, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:  # it has not, or the file system cannot say
            return False


class Buffers:
    """Memory for whole blocks, `PIECE` bytes for each thread that reads at the same time."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    @contextmanager
    def one(self) -> Iterator[npt.NDArray[np.uint8]]:
        try:
            buffer = self._free.pop()  # which no two threads get
        except IndexError:
            buffer = page_buffer(PIECE)
        try:
            yield buffer
        finally:
            self._free.append(buffer)

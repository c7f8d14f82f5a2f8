"""Writing behind: a chunk goes to the disk while the next one is made."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy.typing as npt

from ckptc.io.bulk import LEAST
from ckptc.io.orbax import Entry, ItemsWriter
from ckptc.io.zarr3 import grid
from ckptc.plan.model import Plan
from ckptc.run import checksum


class WriteBehind:
    """A worker's sink: sums each chunk and writes it, large ones from a thread, one at a time. Not for several threads.

    A chunk is read until the next one is put, or until `take` returns. Both raise what writing failed with.
    """

    def __init__(self, plan: Plan, writer: ItemsWriter) -> None:
        self._writer = writer
        self._grids = [grid(a.shape, a.chunk) for a in plan.arrays]
        self._summer = checksum.Summer()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[Entry] | None = None
        self._entries: list[Entry] = []
        self._sum = 0

    def put(self, array: int, index: tuple[int, ...], chunk: npt.NDArray[Any]) -> None:
        self._sum += self._summer.chunk(checksum.cell_of(index, self._grids[array]), chunk)
        self._settle()
        if chunk.nbytes < LEAST:  # handing it over costs more than the page cache takes
            self._entries.append(self._writer.write_chunk(array, index, chunk))
        else:
            self._pending = self._thread.submit(self._writer.write_chunk, array, index, chunk)

    def _settle(self) -> None:
        """Waits for the chunk that is being written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._entries.append(pending.result())

    def take(self) -> tuple[list[Entry], int]:
        """What has been written since the last call, and the sum of its chunks."""
        self._settle()
        taken = self._entries, self._sum
        self._entries, self._sum = [], 0
        return taken

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()  # what is being written is finished: the file is closed next

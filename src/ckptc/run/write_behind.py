"""Writing behind: a chunk goes to the disk while the next one is made."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy.typing as npt

from ckptc.diagnostics import InputError
from ckptc.plan.model import Box, Plan
from ckptc.storage.checkpoint.orbax_writer import Entry, ItemsWriter
from ckptc.storage.formats import checksum
from ckptc.storage.formats.zarr3 import grid
from ckptc.storage.sink.file import LEAST


class WriteBehind:
    """A worker's sink: sums each chunk and writes it, large ones from a thread, one at a time. Not for several threads.

    A chunk is read until the next one is put, or until `settle` returns. `done` is called with each unit that was ended
    once all of it is written: its number, its array, its chunks' entries and their sum. `put`, `end` and `settle` raise
    what writing failed with, and what `done` raises.
    """

    def __init__(self, plan: Plan, writer: ItemsWriter, done: Callable[[int, int, list[Entry], int], None]) -> None:
        self._writer, self._done = writer, done
        self._kinds = [plan.kinds[o.kind] for o in plan.outputs]
        self._grids = [grid(k.shape, k.chunk) for k in self._kinds]
        self._summer = checksum.Summer()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[Entry | None] | None = None  # None: a piece of a large chunk, which nobody looks for
        self._ended: tuple[int, int] | None = None  # a unit, and its array, whose last chunk may still be written
        self._entries: list[Entry] = []
        self._sum = 0

    def put(self, array: int, box: Box, chunk: npt.NDArray[Any]) -> None:
        index = tuple(low // c for (low, _), c in zip(box, self._kinds[array].chunk, strict=True))
        part = self._summer.chunk(checksum.cell_of(index, self._grids[array]), chunk)
        self.settle()
        self._sum += part
        if chunk.nbytes < LEAST:  # handing it over costs more than the page cache takes
            self._note(self._writer.write_chunk(array, index, chunk))
        else:
            self._pending = self._thread.submit(self._writer.write_chunk, array, index, chunk)

    def _note(self, entry: Entry | None) -> None:
        if entry is not None:
            self._entries.append(entry)

    def end(self, unit: int, array: int) -> None:
        """All chunks of a unit have been put. The next unit is begun while the last of them is written."""
        self._ended = unit, array
        if self._pending is None:
            self.settle()

    def settle(self) -> None:
        """Waits until all that was put is written."""
        if self._pending is not None:
            entry = self._pending.result()  # what failed stays pending: a unit that lacks a chunk is never done
            self._pending = None
            self._note(entry)
        if self._ended is not None:
            ended, entries, total = self._ended, self._entries, self._sum
            self._ended, self._entries, self._sum = None, [], 0
            self._done(*ended, entries, total)

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()  # what is being written is finished: the file is closed next
        if error is None:
            self.settle()
        elif self._ended is not None:  # what is done is kept, if that is possible; the error is what is said
            with suppress(OSError, MemoryError, RuntimeError, InputError):
                self.settle()

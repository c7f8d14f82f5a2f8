"""The units of a run, or of one process of it: read, made and written by workers, each noted in a journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from math import prod

import numpy as np

from ckptc.diagnostics import fail
from ckptc.ir.source import SourceFile
from ckptc.ops.types import itemsize
from ckptc.plan.links import links
from ckptc.plan.model import Array, Orbax, Plan
from ckptc.plan.order import Unit, forwards, written
from ckptc.plan.stored import axis_order, file_bytes, places
from ckptc.run.coordinator import Alone
from ckptc.run.distributed import Written, divided
from ckptc.run.memory import peak_resident_bytes
from ckptc.run.output import Output, Unfinished
from ckptc.run.pool import Shared, run_workers
from ckptc.run.readers import Place, Readers
from ckptc.run.worker import Worker
from ckptc.run.write_behind import WriteBehind
from ckptc.storage.checkpoint.links import LinkedChunks
from ckptc.storage.checkpoint.orbax_writer import LARGE_FILE, ItemsWriter, LargeChunks, WriterState
from ckptc.storage.formats.compression import NONE
from ckptc.storage.formats.orbax_metadata import ArraySpec
from ckptc.storage.formats.zarr3 import grid
from ckptc.storage.sink.file import BOUNCE, HUGE, LEAST, place
from ckptc.storage.source.base import Source
from ckptc.storage.source.direct import PIECE

COMPRESSED_LEAST = 4  # times smaller, at most, is what compression makes of weights


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: bytes of target arrays written, of all, and the array being made."""

    written: int
    total: int
    array: str


class Work:
    """The units of a plan that this process makes, spread over workers."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        files: list[SourceFile],
        output: Output,
        unfinished: Unfinished,
        jobs: int,
        peers: Alone,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.peers, self.on_progress = peers, on_progress
        self.plan, self.source, self.files = plan, source, files
        self.output, self.unfinished = output, unfinished
        self.places = places(plan)
        self.large = LargeChunks(file_bytes(plan), {n: p.at for n, p in self.places.items()})
        self.specs = [_array_spec(a, plan) for a in plan.arrays]
        self.grids = [grid(s.shape, s.chunk) for s in self.specs]
        self.units = forwards(plan)
        self.todo = divided(peers, plan, self.units, [n for n in range(len(self.units)) if n not in unfinished.done])
        held = worker_bytes(plan.totals.peak_memory_bytes) + output.held()
        fitting = max(1, plan.choices.memory // max(1, held))
        self.jobs = max(1, min(jobs, fitting, len(self.todo)))
        self.shared = Shared(self.jobs)
        self.resumed = 0 if peers.process else sum(self._size(n) for n in unfinished.done)

    def _size(self, number: int) -> int:
        """Bytes of the arrays that a unit makes."""
        return written(self.plan, self.units[number])

    @property
    def to_write(self) -> int:
        """Bytes that the disk must still take: chunks are stored whole, large ones from a block's beginning on, and the
        index names each of them twice.

        How far they can be compressed is known when they are; to a quarter, it is taken: weights are not, and where the
        disk fills up after all, what is done is kept.
        """
        sizes = [prod(s.chunk) * itemsize(s.dtype) for s in self.specs]
        made = [prod(g) - links(a.kind).cells.size for a, g in zip(self.plan.arrays, self.grids, strict=True)]
        stored = sum(place(size, size) * n for size, n in zip(sizes, made, strict=True))
        kept = sum(e.length for state in self.unfinished.writers.values() for e in state.entries)
        if orbax(self.plan).compression != NONE:
            stored //= COMPRESSED_LEAST
        if self.large.size and self.unfinished.place.holds(f"items/{LARGE_FILE}", self.large.size):
            kept += self.large.size  # it has its room since it was begun
        return max(0, stored - kept) + 40 * sum(map(prod, self.grids)) + (1 << 16)

    def execute(self) -> Written:
        """Makes every unit that is not done, and closes every writer, those of earlier runs included."""
        total = self.resumed + sum(map(self._size, self.todo))

        def watch() -> None:
            self.peers.check()
            unit = self.units[self.todo[min(self.shared.unit, len(self.todo) - 1)] if self.todo else -1]
            name = self.plan.outputs[unit.outputs[0]].name
            self.on_progress(Progress(self.resumed + self.shared.written, total, name))

        if self.todo:
            run_workers(self.jobs, self._worker, watch, self.shared)
        working = [self._number(k) for k in range(self.jobs)] if self.todo else []
        mine = [k for k in self.unfinished.writers if k % self.peers.processes == self.peers.process]
        for k in mine:
            if k not in working:
                state = self.unfinished.writers[k]
                self._writer(k, state).close()
        written = self.resumed + self.shared.written
        return Written(self.shared.read, written, peak_resident_bytes(), tuple(sorted({*mine, *working})))

    def _number(self, k: int) -> int:
        """The writer's number of worker k: no two processes have one number, however many workers each has."""
        return self.peers.process + self.peers.processes * k

    def _writer(self, number: int, state: WriterState | None) -> ItemsWriter:
        return ItemsWriter(self.unfinished.place, self.specs, process=number, resume=state, large=self.large)

    def large_chunks(self) -> list[LinkedChunks]:
        """Where the large chunks lie, in the one file that holds them."""
        out = []
        for number, found in self.places.items():
            cells = np.arange(prod(found.grid), dtype=np.int64)
            out.append(LinkedChunks(number, cells, np.zeros_like(cells), found.begin + cells * found.step))
        return out

    def _worker(self, k: int, tick: Callable[[], None]) -> None:
        try:
            self._make_units(k, tick)
        except OSError as error:  # not of reading, which says so itself
            raise self.output.error(error) from None
        except MemoryError:
            raise fail(
                "out-of-memory",
                "the system has no more memory for this run's buffers",
                help="use fewer --jobs, or a plan with less --memory",
            ) from None

    def _make_units(self, k: int, tick: Callable[[], None]) -> None:
        number = self._number(k)
        state = self.unfinished.writers.get(number)
        writer = self._writer(number, state)
        written = 0
        with (
            Readers.of(self.plan, [Place(self.source)]) as readers,
            self.unfinished.journal(number, writer) as journal,
            WriteBehind(self.plan, writer, journal.add) as behind,
        ):
            worker = Worker(self.plan, readers, behind.put, behind.settle)
            # Closed before the files are that it reads.
            with closing(worker.make(self._take())) as made:
                for position, size in made:
                    written += size
                    writer.eager = not readers.from_disk  # or the reads would wait for its syncs
                    behind.end(self.todo[position], self.units[self.todo[position]].outputs[0])
                    self.shared.note(k, position, written, readers.bytes_read)
                    tick()
        if not self.shared.stopped:
            writer.close()

    def _take(self) -> Iterator[tuple[int, Unit]]:
        """Units for one worker, as it asks for them, each with its position in `todo`."""
        return ((position, self.units[self.todo[position]]) for position in self.shared.numbers(len(self.todo)))


def worker_bytes(buffers: int) -> int:
    """Bytes that a worker holds, whose plan asks for so many: with what it has to read and write past the page cache, and
    up to a huge page more for each of its four buffers, unless all that it reads and makes is too small for either."""
    return buffers if buffers < LEAST else buffers + PIECE + BOUNCE + 4 * HUGE


def _array_spec(array: Array, plan: Plan) -> ArraySpec:
    layout = orbax(plan)
    spec = array.spec if layout.mesh else None
    # Chunks that lie in source files are stored as they are, and so the others of their array.
    compression = layout.compression if array.link is None else NONE
    order = axis_order(array.chunk, array.stored) if array.stored else array.link
    chunk = array.stored or array.chunk
    return ArraySpec(array.path, array.shape, array.dtype, chunk, array.shards, spec, order, compression=compression)


def orbax(plan: Plan) -> Orbax:
    """The layout of a plan whose outputs become an Orbax checkpoint."""
    assert isinstance(plan.layout, Orbax)
    return plan.layout


def copied(plan: Plan) -> int:
    """Bytes of the arrays that a run makes."""
    return plan.totals.write_bytes - plan.totals.linked_bytes

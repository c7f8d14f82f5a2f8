"""Running a plan: check the source, make every unit, commit. The output appears complete or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ckptc.diagnostics import fail
from ckptc.io.bulk import place
from ckptc.io.compression import NONE
from ckptc.io.locate import recall
from ckptc.io.orbax import ItemsWriter, commit, finish, make_durable
from ckptc.io.orbax_metadata import ONE_DEVICE, ArraySpec
from ckptc.io.reader import RangeReader
from ckptc.io.restored import custom_metadata_of
from ckptc.io.zarr3 import grid
from ckptc.ir.source import SourceFile
from ckptc.ops.types import itemsize
from ckptc.plan.links import links
from ckptc.plan.model import Array, Plan
from ckptc.run import checksum
from ckptc.run.behind import WriteBehind
from ckptc.run.journal import UNFINISHED, Journal, Unfinished, open_unfinished, output_error, read_sums, replace
from ckptc.run.linking import Linked, link
from ckptc.run.memory import peak_resident_bytes
from ckptc.run.order import forwards
from ckptc.run.pool import Shared, run_workers
from ckptc.run.preflight import check_memory, check_room, check_sha256, check_source
from ckptc.run.worker import Worker

COMPRESSED_LEAST = 4  # times smaller, at most, is what compression makes of weights
STEP = "0"  # the step directory that MaxText's converter writes


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: bytes of target arrays written, of all, and the array being made."""

    written: int
    total: int
    array: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did."""

    output: str
    read_bytes: int
    write_bytes: int
    seconds: float
    peak_resident_bytes: int
    linked_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user chose for one run."""

    jobs: int  # worker processes at most
    restart: bool = False  # throw away what an unfinished run has done
    force: bool = False  # replace an existing output
    sha256: str | None = None  # "auto", or a file of sums, that the source's files are held against


def _nothing(_: object) -> None: ...


def run(
    plan: Plan,
    digest: str,
    output: Path,
    source: Path | None = None,
    on_progress: Callable[[Progress], None] = _nothing,
    settings: Settings | None = None,
    before_commit: Callable[[Path], None] = _nothing,
) -> Report:
    """Executes exactly the plan, into `<output>/0`; goes on with an unfinished run of the same plan. `digest` is the
    plan's. `before_commit` is given the directory of the finished checkpoint; when it raises, that stays unfinished.

    Raises InputError: `abstract-plan`, `unknown-source`, `output-exists`, what `ckptc.run.preflight` and
    `open_unfinished` raise, `cannot-link`, what reading files may raise, `worker-died`, `out-of-memory`, and `disk-full` or
    `unwritable-output` when the system refuses to write.
    """
    started, wall = time.perf_counter(), time.time_ns()
    settings = settings or Settings(jobs=1)
    directory = find_source(plan, source)
    final = output / STEP
    files = [SourceFile(f.name, f.size, f.header) for f in plan.files]
    check_memory(plan)
    check_source(plan, directory, files)
    if settings.sha256 is not None:
        check_sha256(settings.sha256, directory, files)
    if not settings.force and not (output / UNFINISHED).exists():  # else what is unfinished may tell more, below
        _refuse_existing(final)
    unfinished = open_unfinished(output, final, digest, settings.restart)
    try:
        if unfinished.committed and _is_of(final, digest):
            unfinished.forget()
            return _report(plan, final, 0, _copied(plan), started)
        if not settings.force:
            _refuse_existing(final)
        linked = link(plan, directory, files, unfinished)
        work = _Work(plan, directory, files, unfinished, settings.jobs)
        check_room(output, work.to_write)
        work.execute(on_progress)
        with _damage(output):
            finish(
                unfinished.checkpoint,
                work.specs,
                custom_metadata=custom_metadata(plan, digest, read_sums(unfinished), linked),
                final=final,
                started=wall,
                processes=work.writers,
                mesh=plan.choices.mesh or ONE_DEVICE,
                linked=linked.chunks,
                linked_files=list(linked.files),
            )
        before_commit(unfinished.checkpoint)
        make_durable(unfinished.checkpoint)  # which may take long, before an older output goes; then two renames
        replace(unfinished, final)
        commit(unfinished.checkpoint, final)
        unfinished.forget()
    except OSError as error:
        raise output_error(output, error) from None
    finally:
        unfinished.release()
    return _report(plan, final, work.shared.read, work.made, started)


def _report(plan: Plan, final: Path, read: int, written: int, started: float) -> Report:
    seconds = time.perf_counter() - started
    return Report(str(final), read, written, seconds, peak_resident_bytes(), plan.totals.linked_bytes)


def _copied(plan: Plan) -> int:
    """Bytes of the arrays that a run makes."""
    return plan.totals.write_bytes - plan.totals.linked_bytes


def _refuse_existing(final: Path) -> None:
    if os.path.lexists(final):
        raise fail(
            "output-exists",
            f"there is a checkpoint at {final} already",
            help="choose another --output, or use --force to replace it",
        )


@contextmanager
def _damage(output: Path) -> Iterator[None]:
    """`damaged-output` for chunks that journals speak of and the unfinished checkpoint does not have."""
    try:
        yield
    except RuntimeError as error:
        help = "use --restart, which makes all of it again; the disk is to be distrusted"
        raise fail("damaged-output", f"what is unfinished in {output} is not whole: {error}", help=help) from None


def _is_of(final: Path, digest: str) -> bool:
    """Whether the checkpoint there was made of this plan."""
    custom = custom_metadata_of(final)
    made = custom.get("ckptc") if custom else None
    return isinstance(made, dict) and made.get("plan") == digest


class _Work:
    """The units of a plan, spread over workers."""

    def __init__(self, plan: Plan, directory: Path, files: list[SourceFile], unfinished: Unfinished, jobs: int) -> None:
        self.plan, self.directory, self.files, self.unfinished = plan, directory, files, unfinished
        self.specs = [_array_spec(a, plan) for a in plan.arrays]
        self.grids = [grid(a.shape, a.chunk) for a in plan.arrays]
        self.units = forwards(plan)
        self.todo = [n for n in range(len(self.units)) if n not in unfinished.done]
        fitting = max(1, plan.choices.memory // max(1, plan.totals.peak_memory_bytes))
        self.jobs = max(1, min(jobs, fitting, len(self.todo)))
        self.writers = max([self.jobs, *(k + 1 for k in unfinished.writers)])
        self.shared = Shared(self.jobs)
        self.resumed = sum(self._size(n) for n in unfinished.done)
        self.made = 0

    def _size(self, number: int) -> int:
        """Bytes of the arrays that a unit makes."""
        unit = self.units[number]
        return prod(high - low for low, high in unit.box) * itemsize(self.plan.arrays[unit.array].dtype)

    @property
    def to_write(self) -> int:
        """Bytes that the disk must still take: chunks are stored whole, large ones from a block's beginning on, and the
        index names each of them twice.

        How far they can be compressed is known when they are; to a quarter, it is taken: weights are not, and where the
        disk fills up after all, what is done is kept.
        """
        sizes = [prod(a.chunk) * itemsize(a.dtype) for a in self.plan.arrays]
        made = [prod(g) - links(a).cells.size for a, g in zip(self.plan.arrays, self.grids, strict=True)]
        stored = sum(place(size, size) * n for size, n in zip(sizes, made, strict=True))
        kept = sum(e.length for state in self.unfinished.writers.values() for e in state.entries)
        if self.plan.choices.compression != NONE:
            stored //= COMPRESSED_LEAST
        return max(0, stored - kept) + 40 * sum(map(prod, self.grids)) + (1 << 16)

    def execute(self, on_progress: Callable[[Progress], None]) -> None:
        """Makes every unit that is not done, and closes every writer, those of earlier runs included."""
        total = _copied(self.plan)

        def watch() -> None:
            unit = self.units[self.todo[min(self.shared.unit, len(self.todo) - 1)] if self.todo else -1]
            name = self.plan.arrays[unit.array].name
            on_progress(Progress(self.resumed + self.shared.written, total, name))

        if self.todo:
            run_workers(self.jobs, self._worker, watch, self.shared)
        for k, state in self.unfinished.writers.items():
            if k >= self.jobs or not self.todo:
                ItemsWriter(self.unfinished.checkpoint, self.specs, process=k, resume=state).close()
        self.made = self.resumed + self.shared.written

    def _worker(self, k: int, tick: Callable[[], None]) -> None:
        try:
            self._make_units(k, tick)
        except OSError as error:  # not of reading, which says so itself
            raise output_error(self.unfinished.output, error) from None
        except MemoryError:
            raise fail(
                "out-of-memory",
                "the system has no more memory for this run's buffers",
                help="use fewer --jobs, or a plan with less --memory",
            ) from None

    def _make_units(self, k: int, tick: Callable[[], None]) -> None:
        writer = ItemsWriter(self.unfinished.checkpoint, self.specs, process=k, resume=self.unfinished.writers.get(k))
        written = 0
        with (
            RangeReader(self.directory, self.files) as reader,
            Journal(self.unfinished, k, writer) as journal,
            WriteBehind(self.plan, writer) as behind,
        ):
            worker = Worker(self.plan, reader, behind.put, behind.settle)
            while (position := self.shared.take()) < len(self.todo):
                unit = self.units[self.todo[position]]
                written += worker.make(unit.array, unit.box)
                journal.add(self.todo[position], unit.array, *behind.take())
                self.shared.note(k, position, written, reader.bytes_read)
                tick()
        if not self.shared.stopped:
            writer.close()


def _array_spec(array: Array, plan: Plan) -> ArraySpec:
    spec = array.spec if plan.choices.mesh else None
    # Chunks that lie in source files are stored as they are, and so the others of their array.
    compression = plan.choices.compression if array.link is None else NONE
    return ArraySpec(
        array.path, array.shape, array.dtype, array.chunk, array.shards, spec, array.link, compression=compression
    )


def find_source(plan: Plan, source: Path | None) -> Path:
    """The directory with the plan's files: the one given, else the one this machine last compiled them from."""
    if plan.made.source is None:
        raise fail(
            "abstract-plan", "the plan was made without a checkpoint: it names no bytes to read",
            help=f"compile it again with `--source DIR`, a checkpoint of {plan.made.repo}",
        )  # fmt: skip
    if source is not None:
        if not source.is_dir():
            raise fail("unknown-source", f"there is no directory {source}")
        return source
    found = recall(plan.made.source)
    if found is None:
        raise fail(
            "unknown-source",
            "where the plan's checkpoint lies is not known on this machine",
            help="say it with `--source DIR`",
        )
    return found


def custom_metadata(plan: Plan, digest: str, sums: dict[int, int], linked: Linked) -> dict[str, Any]:
    """What Orbax keeps with the checkpoint: MaxText's own key, what made it, and each array's checksum; of arrays that
    are linked and were not read, which files hold them."""
    sealed = {
        a.name: checksum.seal(sums.get(n, 0), a.shape, a.dtype, a.chunk)
        for n, a in enumerate(plan.arrays)
        if n not in linked.arrays
    }
    return {
        "scan_layers": plan.choices.layout == "scanned",
        "ckptc": {
            "version": plan.made.ckptc, "model": plan.made.model, "family": plan.made.family,
            "mapping": plan.made.mapping, "source": plan.made.source, "plan": digest,
            "checksum": checksum.NAME, "checksums": sealed, **linked.metadata(plan),
        },
    }  # fmt: skip

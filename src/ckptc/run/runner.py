"""Running a plan: check the source, make every unit, commit. The output appears complete or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ckptc.diagnostics import fail
from ckptc.io.locate import recall
from ckptc.io.orbax import ArraySpec, Entry, ItemsWriter, commit, finish
from ckptc.io.reader import RangeReader, check_unchanged
from ckptc.ir.source import SourceFile
from ckptc.plan.model import Plan
from ckptc.run.journal import Journal, Unfinished, open_unfinished
from ckptc.run.memory import peak_resident_bytes
from ckptc.run.order import forwards
from ckptc.run.pool import Shared, run_workers
from ckptc.run.worker import Worker

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


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user chose for one run."""

    jobs: int  # worker processes at most
    restart: bool = False  # throw away what an unfinished run has done
    force: bool = False  # replace an existing output


def run(
    plan: Plan,
    digest: str,
    output: Path,
    source: Path | None = None,
    settings: Settings | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Executes exactly the plan, into `<output>/0`; goes on with an unfinished run of the same plan. `digest` is the plan's.

    Raises InputError: `abstract-plan`, `unknown-source`, `source-changed`, `output-exists`, what `open_unfinished` raises, and
    what reading files may raise.
    """
    started, wall = time.perf_counter(), time.time_ns()
    settings = settings or Settings(jobs=1)
    directory = find_source(plan, source)
    final = output / STEP
    if final.exists() and not settings.force:
        raise fail(
            "output-exists",
            f"there is a checkpoint at {final} already",
            help="choose another --output, or use --force to replace it",
        )
    files = [SourceFile(f.name, f.size, f.header) for f in plan.files]
    check_unchanged(directory, files)
    unfinished = open_unfinished(output, digest, settings.restart)
    try:
        work = _Work(plan, directory, files, unfinished, settings.jobs)
        work.execute(on_progress)
        partial = unfinished.directory
        finish(
            partial,
            work.specs,
            custom_metadata=custom_metadata(plan, digest),
            final=final,
            started=wall,
            processes=work.writers,
        )
        for name in ("plan", *(f"journal.{k}" for k in range(work.writers))):
            (partial / name).unlink(missing_ok=True)
        if final.exists():
            shutil.rmtree(final)
        commit(partial, final)
    finally:
        unfinished.release()
    seconds = time.perf_counter() - started
    return Report(str(final), work.shared.read, work.made, seconds, peak_resident_bytes())


class _Work:
    """The units of a plan, spread over workers."""

    def __init__(self, plan: Plan, directory: Path, files: list[SourceFile], unfinished: Unfinished, jobs: int) -> None:
        self.plan, self.directory, self.files, self.unfinished = plan, directory, files, unfinished
        self.specs = [ArraySpec(a.path, a.shape, a.dtype, a.chunk, a.shards) for a in plan.arrays]
        self.units = forwards(plan)
        self.todo = [n for n in range(len(self.units)) if n not in unfinished.done]
        fitting = max(1, plan.choices.memory // max(1, plan.totals.peak_memory_bytes))
        self.jobs = max(1, min(jobs, fitting, len(self.todo)))
        self.writers = max([self.jobs, *(k + 1 for k in unfinished.writers)])
        self.shared = Shared(self.jobs)
        self.resumed = sum(e.length for state in unfinished.writers.values() for e in state.entries)
        self.made = 0

    def execute(self, on_progress: Callable[[Progress], None]) -> None:
        """Makes every unit that is not done, and closes every writer, those of earlier runs included."""
        total = self.plan.totals.write_bytes

        def watch() -> None:
            unit = self.units[self.todo[min(self.shared.unit, len(self.todo) - 1)]] if self.todo else self.units[-1]
            name = self.plan.arrays[unit.array].name
            on_progress(Progress(self.resumed + self.shared.written, total, name))

        run_workers(self.jobs, self._worker, watch)
        for k in range(self.jobs, self.writers):
            state = self.unfinished.writers.get(k)
            if state:
                ItemsWriter(self.unfinished.directory, self.specs, process=k, resume=state).close()
        self.made = self.resumed + self.shared.written

    def _worker(self, k: int) -> None:
        directory, state = self.unfinished.directory, self.unfinished.writers.get(k)
        writer = ItemsWriter(directory, self.specs, process=k, resume=state)
        entries: list[Entry] = []
        written = 0

        def sink(array: int, index: tuple[int, ...], chunk: npt.NDArray[Any]) -> None:
            entries.append(writer.write_chunk(array, index, chunk))

        with (
            RangeReader(self.directory, self.files) as reader,
            Journal(directory, k, writer, state is not None) as journal,
        ):
            worker = Worker(self.plan, reader, sink)
            while (position := self.shared.take()) < len(self.todo):
                unit = self.units[self.todo[position]]
                written += worker.make(unit.array, unit.box)
                journal.add(self.todo[position], entries)
                entries.clear()
                self.shared.note(k, position, written, reader.bytes_read)
            journal.flush()
        writer.close()


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


def custom_metadata(plan: Plan, digest: str) -> dict[str, Any]:
    """What Orbax keeps with the checkpoint: MaxText's own key, and what made it."""
    return {
        "scan_layers": plan.choices.layout == "scanned",
        "ckptc": {
            "version": plan.made.ckptc, "model": plan.made.model, "family": plan.made.family, "mapping": plan.made.mapping,
            "source": plan.made.source, "plan": digest,
        },
    }  # fmt: skip

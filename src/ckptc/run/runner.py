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
from ckptc.io.orbax import ArraySpec, ItemsWriter, commit, finish
from ckptc.io.reader import RangeReader, check_unchanged
from ckptc.ir.source import SourceFile
from ckptc.plan.model import Plan
from ckptc.run.memory import peak_resident_bytes
from ckptc.run.order import forwards
from ckptc.run.worker import Worker

STEP = "0"  # the step directory that MaxText's converter writes
UNFINISHED = ".ckptc-unfinished"  # not a step's name: no reader takes it for a checkpoint


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


def run(
    plan: Plan,
    digest: str,
    output: Path,
    source: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Executes exactly the plan, into `<output>/0`. `digest` is the plan's, kept in the checkpoint's metadata.

    Raises InputError: `abstract-plan`, `unknown-source`, `source-changed`, `output-exists`, and what reading files may raise.
    """
    started, wall = time.perf_counter(), time.time_ns()
    directory = find_source(plan, source)
    final, partial = output / STEP, output / UNFINISHED
    if final.exists():
        raise fail(
            "output-exists",
            f"there is a checkpoint at {final} already",
            help="choose another --output, or remove it first",
        )
    files = [SourceFile(f.name, f.size, f.header) for f in plan.files]
    check_unchanged(directory, files)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise fail("unwritable-output", f"cannot write to {output}: {error.strerror}") from None
    specs = [ArraySpec(a.path, a.shape, a.dtype, a.chunk, a.shards) for a in plan.arrays]
    writer = ItemsWriter(partial, specs)
    written, total = 0, plan.totals.write_bytes

    def sink(array: int, index: tuple[int, ...], chunk: npt.NDArray[Any]) -> None:
        nonlocal written
        writer.write_chunk(array, index, chunk)
        written += chunk.nbytes
        on_progress(Progress(written, total, plan.arrays[array].name))

    with RangeReader(directory, files) as reader:
        worker = Worker(plan, reader, sink)
        for unit in forwards(plan):
            worker.make(unit.array, unit.box)
        read = reader.bytes_read
    writer.close()
    finish(partial, specs, custom_metadata=custom_metadata(plan, digest), final=final, started=wall)
    commit(partial, final)
    return Report(str(final), read, written, time.perf_counter() - started, peak_resident_bytes())


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

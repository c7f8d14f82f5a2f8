"""Running an export's plan: check the checkpoint, make every tensor, look at what is left over, give the files their
names. The output appears complete or not at all.

Worker processes share the temporary files, which have their full size from the start: each takes the next unit, reads
what it needs and writes it in place. TensorStore, which reads what is compressed, has threads, and a process with
threads cannot be forked safely: so it is used in workers alone, or in this process when it has none.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ckptc.diagnostics import InputError, fail
from ckptc.ir.source import SourceFile
from ckptc.plan.files import headers, places, texts
from ckptc.plan.json import digest
from ckptc.plan.model import Box, Plan, Safetensors
from ckptc.plan.order import forwards, written
from ckptc.run.journal import SYNC_SECONDS, output_error
from ckptc.run.leftovers import trained_rows, twin_differs
from ckptc.run.memory import peak_resident_bytes, return_large_blocks
from ckptc.run.pool import Shared, run_workers, shared_memory
from ckptc.run.preflight import check_room
from ckptc.run.readers import Place, Readers, files_of
from ckptc.run.work import Progress, worker_bytes
from ckptc.run.worker import Values, Worker
from ckptc.storage.checkpoint.companions import KEPT, identify
from ckptc.storage.checkpoint.orbax_index import PlainIndex
from ckptc.storage.checkpoint.orbax_reader import (
    check_saved,
    list_plain,
    noted_sums,
    statuses_of,
)
from ckptc.storage.checkpoint.safetensors_writer import CheckpointWriter, FileSpec
from ckptc.storage.checkpoint.steps import find_step, require_directory
from ckptc.storage.checkpoint.sums import Summed, Sums
from ckptc.storage.forked_call import can_fork, forked_call
from ckptc.storage.source.base import Source, opened
from ckptc.storage.source.content import Status, changed_since, first_of
from ckptc.storage.source.directory import Directory
from ckptc.storage.source.remembered import located


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export did."""

    output: str
    read_bytes: int  # of decoded chunks
    write_bytes: int
    seconds: float
    peak_resident_bytes: int
    warnings: tuple[str, ...]
    checksums: int = 0  # arrays that have the checksum they were written with
    without_checksum: int = 0  # arrays that have none to compare
    again_bytes: int = 0  # of decoded chunks, read once more for checksums, since they had been read in parts


def export(
    plan: Plan,
    output: Path,
    source: Path | None = None,
    companions: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    force: bool = False,
    jobs: int = 1,
    plain: PlainIndex | None = None,
    restart: bool = False,
    fill: str | Path | None = None,
) -> ExportReport:
    """Executes exactly the plan, into `output`; goes on with an unfinished run of the same plan, unless `restart`.

    `companions`: the directory with the files to copy, if there are any. `jobs`: worker processes at most, as far as the
    plan's memory goes; with one, all is done in this process. `plain`: what `list_plain` says of the checkpoint, if it has
    been asked already. `fill`: where the plan's second source is, if it has one (default: where it was last seen).

    Raises InputError: `unknown-source`, `source-changed`, `checksum-differs`, `worker-died`, `out-of-memory`, what `find_step` and
    `CheckpointWriter` raise, what reading raises, and `disk-full` or `unwritable-output` when the system refuses to
    write.
    """
    started = time.perf_counter()
    layout = plan.layout
    assert isinstance(layout, Safetensors)
    items = find_step(source or located(plan.source or "", "the plan's checkpoint lies", "--source")).items
    files = [SourceFile(f.name, f.size, f.header, f.content) for f in plan.sources[0].files]
    before = statuses_of(items, files)
    check_saved(items, files)
    if plain is None:
        plain = PlainIndex.of(forked_call(lambda: list_plain(items).record()))
    copies = _companions(layout, companions, items)
    filling = _filling(plan, fill)
    _refuse_to_overwrite(
        output,
        items,
        [*({companions} if companions else ()), *(p.parent for p in copies.values()), *_directories(filling)],
    )
    specs = [FileSpec(f.name, f.size, begin) for f, begin in zip(layout.files, headers(plan, layout), strict=True)]
    try:
        with CheckpointWriter(output, specs, force=force, plan=digest(plan), source=before, restart=restart) as writer:
            check_room(output, sum(f.size for f in specs) if not writer.done else 0)
            writer.create()
            sums = Sums(noted_sums(items), _read_arrays(plan))
            work = _Work(plan, [Place(Directory(items), plain, sums), *filling], output, writer, jobs)
            work.make_tensors(on_progress)
            work.look_at_the_rest()
            for other, place in zip(plan.sources[1:], filling, strict=True):
                place.source.check_unchanged(files_of(other))
            try:
                _check_undisturbed(items, files, before)  # before what differs is called damage
                work.compare(sums)
                _check_undisturbed(items, files, before)
            except InputError:
                writer.forget()
                raise
            writer.commit(texts(plan, layout), copies)
    except OSError as error:  # not of reading, which says so itself
        raise output_error(output, error) from None
    seconds = time.perf_counter() - started
    return ExportReport(
        str(output), work.read, plan.totals.write_bytes, seconds, peak_resident_bytes(), tuple(work.warnings()),
        sums.compared, len(sums.without), work.again,
    )  # fmt: skip


def _read_arrays(plan: Plan) -> Iterator[Summed]:
    """The arrays that an export reads."""
    for output in (*plan.outputs, *plan.twins):
        for number, stored in zip(output.tensors, plan.kinds[output.kind].sources, strict=True):
            if plan.tensors[number].source:  # copied from files, which have no checksums
                continue
            yield Summed(plan.tensors[number].name, stored.shape, stored.dtype, stored.chunk or stored.shape)
    for p in plan.padding:
        yield Summed(plan.tensors[p.tensor].name, p.array.shape, p.array.dtype, p.array.chunk or p.array.shape)


def _filling(plan: Plan, given: str | Path | None) -> list[Place]:
    """Where tensors are copied from, if any are. Raises `unknown-source`, `source-changed`."""
    out = []
    for source in plan.sources[1:]:
        found: Source
        if given is not None:
            found = opened(given)
        elif source.name:
            found = opened(source.name)
        else:
            found = Directory(
                located(source.digest or "", "the checkpoint that tensors are copied from lies", "--fill-from")
            )
        found.check_unchanged(files_of(source))
        out.append(Place(found))
    return out


def _directories(found: Sequence[Place]) -> list[Path]:
    return [place.source.local for place in found if place.source.local is not None]


def _check_undisturbed(items: Path, files: list[SourceFile], before: dict[str, Status]) -> None:
    """Raises `source-changed` for files that changed since."""
    if lines := changed_since(before, statuses_of(items, files)):
        raise fail(
            "source-changed",
            f"the checkpoint in {items} changed while it was read",
            notes=first_of(lines),
            help="nothing was written; export again when no program writes to it",
        )


class _Work:
    """What there is to do, spread over workers: the units of the plan, then what no tensor has a place for."""

    def __init__(
        self,
        plan: Plan,
        where: Sequence[Place],
        output: Path,
        writer: CheckpointWriter,
        jobs: int,
    ) -> None:
        self.plan, self.where, self.output, self.writer = plan, where, output, writer
        fitting = plan.choices.memory // max(1, worker_bytes(plan.totals.peak_memory_bytes))
        self.jobs = max(1, min(jobs, fitting)) if can_fork() else 1
        self.read = self.again = 0
        context = mp.get_context("fork")
        with shared_memory():
            self.differ = context.Array("b", len(plan.twins), lock=False)  # whether a twin says other things
            self.trained = context.Array("q", len(plan.padding), lock=False)  # rows of a padding
        assert isinstance(plan.layout, Safetensors)
        self._places = places(plan, plan.layout)
        self._numbers = {o.name: n for n, o in enumerate(plan.outputs)}

    def make_tensors(self, on_progress: Callable[[Progress], None]) -> None:
        units, total = forwards(self.plan), self.plan.totals.write_bytes
        todo = [n for n in range(len(units)) if n not in self.writer.done]
        resumed = sum(written(self.plan, units[n]) for n in self.writer.done)

        def watch(shared: Shared) -> None:
            name = self.plan.outputs[units[todo[min(shared.unit, len(todo) - 1)]].outputs[0]].name
            on_progress(Progress(resumed + shared.written, total, name))

        def make(k: int, worker: Worker, boxes: _Boxes, shared: Shared, tick: Callable[[], None]) -> None:
            made, ended, noted = 0, list[int](), time.monotonic()

            def note() -> None:
                boxes.settle()
                self.writer.note(ended)
                ended.clear()

            try:
                numbers = ((i, units[todo[i]]) for i in shared.numbers(len(todo)))
                with closing(worker.make(numbers)) as making:
                    for i, size in making:
                        made += size
                        ended.append(todo[i])
                        if time.monotonic() - noted >= SYNC_SECONDS:
                            note()
                            noted = time.monotonic()
                        shared.note(k, i, made, worker.readers.bytes_read)
                        tick()
            except BaseException:
                with suppress(OSError, MemoryError, InputError):  # what is done is kept, if that is possible
                    note()
                raise
            note()

        self._spread(len(todo), make, watch)

    def look_at_the_rest(self) -> None:
        """Twins and padding: neither stops an export, both are said in its report."""
        twins = len(self.plan.twins)

        def look(worker: Worker, number: int) -> None:
            if number < twins:
                self.differ[number] = twin_differs(self.plan, number, worker, self._read_back)
            else:
                self.trained[number - twins] = trained_rows(self.plan, number - twins, worker)

        self._each(twins + len(self.plan.padding), look)

    def _read_back(self, name: str, box: Box, out: Values) -> None:
        """What has been written of a box of an output."""
        number = self._numbers[name]
        file, begin = self._places[number]
        self.writer.read_box(file, begin, self.plan.arrays[number].shape, box, out)

    def compare(self, sums: Sums) -> None:
        """Raises `checksum-differs`, for each array that has not the checksum it was written with."""
        missing, read = sums.missing(), self.read

        self._each(len(missing), lambda worker, number: worker.readers.read_for_sums(missing[number]))
        self.read, self.again = read, self.read - read
        if problems := sums.differ():
            raise InputError(problems)

    def _each(self, count: int, look: Callable[[Worker, int], None]) -> None:
        """Calls `look` with each number below `count`, by workers."""

        def body(k: int, worker: Worker, boxes: _Boxes, shared: Shared, tick: Callable[[], None]) -> None:
            for number in shared.numbers(count):
                look(worker, number)
                shared.note(k, number, 0, worker.readers.bytes_read)

        self._spread(count, body, lambda shared: None)

    def _spread(
        self,
        count: int,
        work: Callable[[int, Worker, _Boxes, Shared, Callable[[], None]], None],
        watch: Callable[[Shared], None],
    ) -> None:
        """Calls `work` in each worker process, with its number, for so many numbers that they share."""
        if not count:
            return
        shared = Shared(jobs := min(self.jobs, count))

        def body(k: int, tick: Callable[[], None]) -> None:
            return_large_blocks()
            try:
                with (
                    Readers.of(self.plan, self.where) as readers,
                    _Boxes(self.writer, self.plan, self._places) as boxes,
                ):
                    work(k, Worker(self.plan, readers, boxes.put, boxes.settle), boxes, shared, tick)
                self.writer.settle()
            except OSError as error:
                raise output_error(self.output, error) from None
            except MemoryError:
                raise fail(
                    "out-of-memory",
                    "the system has no more memory for this run's buffers",
                    help="use fewer --jobs, or less --memory",
                ) from None

        run_workers(jobs, body, lambda: watch(shared), shared)
        self.read += shared.read

    def warnings(self) -> Iterator[str]:
        """What is to be said of tensors that are stored twice and of padding."""
        differ: dict[str, list[str]] = {}
        for twin, differs in zip(self.plan.twins, self.differ, strict=True):
            if differs:
                differ.setdefault(self.plan.kinds[twin.kind].rule, []).append(twin.name)
        for rule, names in differ.items():
            count = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
            yield f"`{rule}` holds {count} of another array with other values: {names[0]}; the other array's are taken"
        for padding, rows in zip(self.plan.padding, self.trained, strict=True):
            if rows:
                name = self.plan.tensors[padding.tensor].name
                yield (
                    f"{rows} of the {padding.rows} rows of padding of `{name}` carry trained values (they should be "
                    f"{padding.value:g}): no tensor has a place for them, they are left out"
                )


class _Boxes:
    """Where a worker's pieces go: each is written, in place, while the next one is made."""

    def __init__(self, writer: CheckpointWriter, plan: Plan, located: Sequence[tuple[int, int]]) -> None:
        self._writer, self._plan, self._places = writer, plan, located
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def put(self, output: int, box: Box, piece: Values) -> None:
        file, begin = self._places[output]
        self.settle()
        shape = self._plan.arrays[output].shape
        self._pending = self._thread.submit(self._writer.write_box, file, begin, shape, box, piece)

    def settle(self) -> None:
        """Waits for what is being written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> _Boxes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            self._thread.shutdown()


def _refuse_to_overwrite(output: Path, items: Path, read: list[Path]) -> None:
    """`output-exists` for an output that is one of the directories `read`, or lies in the checkpoint's items: with
    `force`, too, what is there is read, such as the original's weights beside its config."""
    real = Path(os.path.realpath(output))
    if real in {Path(os.path.realpath(p)) for p in read} or real.is_relative_to(os.path.realpath(items)):
        message = f"{output} holds what this export reads, and is not replaced"
        raise fail("output-exists", message, help="choose another --output")


def companions_digest(layout: Safetensors) -> str:
    """By which a machine remembers where the files to copy lie."""
    return "companions " + " ".join(f.header for f in layout.companions)


def _companions(layout: Safetensors, directory: Path | None, items: Path) -> dict[str, Path]:
    """The files to copy: from `directory`, else from what the checkpoint has kept, else from where this machine last saw
    them. Raises `unknown-source`, `missing-directory` or `source-changed`.
    """
    if not layout.companions:
        return {}
    if directory is None and all((items / KEPT / f.name).is_file() for f in layout.companions):
        directory = items / KEPT
    if directory is None:
        what = f"{layout.companions[0].name} and other files of the original lie"
        directory = located(companions_digest(layout), what, "--config-from")
    require_directory(directory, f"give the directory with {layout.companions[0].name}")
    for file in layout.companions:
        if identify(directory, file.name) != SourceFile(file.name, file.size, file.header):
            raise fail(
                "source-changed", f"`{file.name}` is not the file the plan was made from", help="compile the plan again"
            )
    return {file.name: directory / file.name for file in layout.companions}

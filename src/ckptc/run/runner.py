"""Running a plan: check the source, make every unit, commit. The output appears complete or not at all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from ckptc.diagnostics import fail
from ckptc.ir.source import SourceFile
from ckptc.plan.model import Plan
from ckptc.run.coordinator import Alone
from ckptc.run.distributed import Written, agree, announce, gather, join_unfinished
from ckptc.run.linking import Linked, link
from ckptc.run.memory import peak_resident_bytes
from ckptc.run.output import LocalOutput, Output, Unfinished
from ckptc.run.preflight import check_memory, check_sha256, check_source
from ckptc.run.remote import RemoteOutput
from ckptc.run.sources import Sighting
from ckptc.run.work import Progress, Work, copied, orbax
from ckptc.storage.checkpoint.companions import KEPT, kept, to_keep
from ckptc.storage.checkpoint.orbax_writer import finish
from ckptc.storage.checkpoint.steps import require_directory
from ckptc.storage.forked_call import can_fork
from ckptc.storage.formats import checksum
from ckptc.storage.formats.orbax_metadata import ONE_DEVICE
from ckptc.storage.source.base import Source, as_source, opened
from ckptc.storage.source.directory import Directory
from ckptc.storage.source.remembered import located


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did."""

    output: str
    stored_bytes: int | None  # what it takes; None where that cannot be told, and for processes other than 0
    read_bytes: int
    write_bytes: int
    seconds: float
    peak_resident_bytes: int  # of the process with the most
    linked_bytes: int = 0
    process: int = 0  # of process 0, what all have done; of others, what they have done themselves
    processes: int = 1


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
    output: Path | str,
    source: Source | Path | None = None,
    on_progress: Callable[[Progress], None] = _nothing,
    settings: Settings | None = None,
    before_commit: Callable[[Path], None] | None = None,
    peers: Alone | None = None,
) -> Report:
    """Executes exactly the plan, into `<output>/0`; goes on with an unfinished run of the same plan.

    `digest`: the plan's. `output`: a directory, or the URL of an object store. `before_commit` is given the directory of
    the finished checkpoint; when it raises, that stays unfinished. An object store has no such directory. `peers`: the other processes that run this plan;
    process 0 opens, finishes and commits.

    Raises InputError: `abstract-plan`, `unsupported-url`, `unknown-source`, `missing-directory`, `output-exists`, what `ckptc.run.preflight`, the output
    (`ckptc.run.output`) and `ckptc.run.distributed` raise, `cannot-link`, what reading files may raise, `worker-died`,
    `out-of-memory`, and `disk-full` or `unwritable-output` when the system refuses to write.
    """
    started, wall = time.perf_counter(), time.time_ns()
    settings, peers = settings or Settings(jobs=1), peers or Alone()
    if is_url(output):
        plan = in_pieces(plan)
    where = output_at(output, plan)
    if before_commit is not None and isinstance(where, RemoteOutput):
        help = "run it without, and compare a copy of it in a directory"
        raise fail("unsupported-url", f"{output} cannot be looked at before it is committed", help=help)
    where.check()
    jobs = _jobs(settings.jobs)
    found = find_source(plan, source)
    files = [SourceFile(f.name, f.size, f.header, f.content) for f in plan.sources[0].files]
    check_memory(plan, where.held())
    seen = Sighting.of(found, files)
    check_source(plan, found, files)
    if settings.sha256 is not None:
        check_sha256(settings.sha256, found, files)
    peers.join()
    agree(peers, digest)
    if not peers.process:
        where.check_free(settings.force, seen)

    def work_on(unfinished: Unfinished) -> Work:
        return Work(plan, found, files, where, unfinished, jobs, peers, on_progress)

    try:
        if peers.process:
            done = _follow(where, peers, seen, work_on)
        else:
            make_links = partial(link, plan, found.local, files)
            beside = partial(kept_files, plan, found, to_keep(found))
            done = _lead(plan, digest, where, peers, settings, seen, make_links, work_on, beside, before_commit, wall)
    except OSError as error:
        raise where.error(error) from None
    return Report(
        output=where.step,
        stored_bytes=None if peers.process else where.stored_bytes(),
        read_bytes=sum(x.read for x in done),
        write_bytes=sum(x.written for x in done),
        seconds=time.perf_counter() - started,
        peak_resident_bytes=max([peak_resident_bytes(), *(x.peak for x in done)]),
        linked_bytes=0 if peers.process else plan.totals.linked_bytes,
        process=peers.process,
        processes=peers.processes,
    )


def _jobs(wanted: int) -> int:
    """Worker processes at most. They are forked: a process that has the threads of JAX or TensorStore has none."""
    if wanted > 1 and not can_fork():
        text = (
            f"1 job instead of {wanted}: JAX or TensorStore is loaded in this process, whose threads make forking unsafe; "
            "the ckptc command, or a process that loads neither, has them all"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return 1
    return wanted


def _lead(
    plan: Plan,
    digest: str,
    output: Output,
    peers: Alone,
    settings: Settings,
    source: Sighting,
    make_links: Callable[[Unfinished], Linked],
    work_on: Callable[[Unfinished], Work],
    beside: Callable[[], Iterable[tuple[str, bytes]]],
    before_commit: Callable[[Path], None] | None,
    started: int,
) -> list[Written]:
    """What process 0 does, or the only one. Returns what each has done."""
    unfinished = output.open(digest, settings.restart, settings.force, started, source)
    try:
        if unfinished.committed:
            announce(peers, unfinished)
            done = [Written(0, copied(plan), 0, ())]
        else:
            linked = make_links(unfinished)
            work = work_on(unfinished)
            output.check_room(work.to_write)
            announce(peers, unfinished)
            written = work.execute()
            source.check_undisturbed()
            done = gather(peers, unfinished, written)
            writers = [k for x in done for k in x.writers]

            def join(check: Callable[[], None] = lambda: None) -> None:
                with _damage(output):
                    finish(
                        unfinished.place,
                        work.specs,
                        custom_metadata=custom_metadata(plan, digest, unfinished.sums(), linked),
                        final=output.step,
                        started=unfinished.started,
                        writers=writers,
                        mesh=orbax(plan).mesh or ONE_DEVICE,
                        linked=linked.chunks,
                        linked_files=list(linked.files),
                        beside=beside(),
                        large=work.large_chunks(),
                        large_bytes=work.large.size,
                        check=check,
                    )

            def check() -> None:
                peers.check()
                source.check_undisturbed()
                output.check_target(settings.force, source)

            unfinished.complete(join, before_commit, check)
        unfinished.forget()
        peers.say("committed")
        return done
    finally:
        unfinished.release()


def _follow(output: Output, peers: Alone, source: Sighting, work_on: Callable[[Unfinished], Work]) -> list[Written]:
    """What every other process does. Returns what it has done."""
    unfinished = join_unfinished(peers, output)
    try:
        done = []
        if not unfinished.committed:
            written = work_on(unfinished).execute()
            source.check_undisturbed()
            unfinished.release()  # before process 0 removes what is unfinished
            done = gather(peers, unfinished, written)
        peers.hear("committed")
        return done
    finally:
        unfinished.release()


@contextmanager
def _damage(output: Output) -> Iterator[None]:
    """`damaged-output` for chunks that journals speak of and the unfinished checkpoint does not have."""
    try:
        yield
    except RuntimeError as error:
        help = "use --restart, which makes all of it again; the disk is to be distrusted"
        raise fail("damaged-output", f"what is unfinished in {output} is not whole: {error}", help=help) from None


def output_at(output: Path | str, plan: Plan) -> Output:
    """The directory of this path, or what a URL names."""
    return RemoteOutput(str(output), plan) if is_url(output) else LocalOutput(Path(output))


def is_url(output: Path | str) -> bool:
    """Whether an output is an object store's."""
    return isinstance(output, str) and "://" in output


def in_pieces(plan: Plan) -> Plan:
    """The plan without large chunks: what is written into objects is written once, whole, so each piece is a chunk there."""
    return replace(plan, kinds=tuple(replace(k, stored=()) for k in plan.kinds))


def find_source(plan: Plan, given: Source | Path | None) -> Source:
    """Where the plan's files are: the source given, else the one that the plan names, else the directory that this machine
    last compiled it from."""
    if plan.source is None:
        raise fail(
            "abstract-plan", "the plan was made without a checkpoint: it names no bytes to read",
            help=f"compile it again with `--source DIR`, a checkpoint of {plan.made.repo}",
        )  # fmt: skip
    if given is not None:
        source = as_source(given)
        if source.local is not None:
            require_directory(source.local, "give the directory with the plan's files")
        return source
    if plan.sources[0].name:
        return opened(plan.sources[0].name)
    return Directory(located(plan.source, "the plan's checkpoint lies", "--source"))


def kept_files(plan: Plan, source: Source, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """What an export of the checkpoint will need of its source, by names below `items`."""
    dtypes: dict[str, list[str]] = {}
    for operand in (s for a in plan.arrays for s in a.sources):
        dtypes.setdefault(operand.stored.dtype, []).extend(plan.tensors[n].name for n in operand.tensors)
        kinds = operand.stored.decode.beside if operand.stored.decode else ()
        for beside, column in zip(kinds, operand.beside, strict=True):
            dtypes.setdefault(beside.dtype, []).extend(plan.tensors[n].name for n in column)
    by_name = {dtype: sorted(set(tensors)) for dtype, tensors in sorted(dtypes.items())}
    for name, content in kept(source, names, by_name):
        yield f"{KEPT}/{name}", content


def custom_metadata(plan: Plan, digest: str, sums: dict[int, int], linked: Linked) -> dict[str, Any]:
    """What Orbax keeps with the checkpoint: MaxText's own key, what made it, and each array's checksum; of arrays that
    are linked and were not read, which files hold them."""
    sealed = {
        a.name: checksum.seal(sums.get(n, 0), a.shape, a.dtype, a.chunk)
        for n, a in enumerate(plan.arrays)
        if n not in linked.arrays
    }
    # A checksum is a sum over chunks, or over the pieces of large ones.
    summed = {a.name: list(a.chunk) for a in plan.arrays if a.stored}
    pieces = {"pieces": summed} if summed else {}
    return {
        "scan_layers": plan.choices.layout == "scanned",
        "ckptc": {
            "version": plan.made.ckptc, "model": plan.made.model, "family": plan.made.family, "dims": dict(plan.choices.dims),
            "multimodal": plan.choices.multimodal,
            "mapping": plan.made.mapping, "source": plan.source, "plan": digest,
            "checksum": checksum.NAME, "checksums": sealed, **pieces, **linked.metadata(plan),
        },
    }  # fmt: skip

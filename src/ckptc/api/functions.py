"""Compiling, running, comparing: what each command does, as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptc.api.compilation import ExportCompilation, Value, find
from ckptc.diagnostics import fail
from ckptc.plan.model import Orbax, Plan, Safetensors

if TYPE_CHECKING:
    from ckptc.run.coordinator import Alone
    from ckptc.run.diff import Comparison
    from ckptc.run.export import ExportReport
    from ckptc.run.runner import Report
    from ckptc.run.verify import Verified
    from ckptc.run.work import Progress
    from ckptc.spec.mapping import Family
    from ckptc.storage.checkpoint.orbax_index import PlainIndex
    from ckptc.storage.source.base import Source

MIB = 1 << 20

Rules = Sequence[tuple[str, Sequence[str]]]


def _nothing(_: object) -> None: ...


def compile(
    model: str,
    source: str | Path | Source | None = None,
    *,
    mapping: str | Path | None = None,
    target: str = "maxtext",
    scan: bool = True,
    dtype: str = "bfloat16",
    multimodal: bool = False,
    set: Mapping[str, Value] | None = None,
    shards: int = 16,
    mesh: str | Mapping[str, int] | None = None,
    rules: str | Path | Rules | None = None,
    compression: str = "none",
    memory: int | None = None,
    link: bool = False,
    scan_axis: int = 1,
    pipeline: str | None = None,
    on_source: Callable[[Source], None] = _nothing,
) -> Plan:
    """The plan of a conversion to an Orbax checkpoint, proved against the source's headers. Reads no weights.

    `source`: without one the plan is made from the numbers shipped for the model; it can be read, and not run.
    `scan`: whether layers are stacked, along `scan_axis`. `dtype`: of stored floating arrays where the mapping keeps no
    other. `set`: dims by name. `mesh`: `"fsdp=16,tensor=4"` or the sizes by axis; arrays are sharded for it by `rules`,
    a YAML file as MaxText's settings, or (logical axis, mesh axes) in the order in which they are tried; by default
    MaxText's. `compression`: none, `zstd:<level>`, blosc-lz4. `memory`: bytes of buffers of a run, 512 MiB by default.
    `on_source` is called once the source's headers are known.

    Raises InputError with all that is wrong: `unknown-model`, `shape-mismatch`, `missing-tensor`, `bad-mesh`, and others
    that `ckptc explain` tells.
    """
    from ckptc.compile.compiler import compile_plan
    from ckptc.compile.options import Options
    from ckptc.compile.stacking import read_pipeline
    from ckptc.storage.checkpoint.safetensors import open_checkpoint
    from ckptc.storage.source.base import opened
    from ckptc.storage.source.remembered import remember

    family, named = find(model, mapping, target)
    sizes, over = _mesh(mesh, rules, family)
    options = Options(
        layout="scanned" if scan else "unscanned",
        dtype=dtype,
        multimodal=multimodal,
        set=dict(set or {}),
        shards=shards,
        mesh=sizes,
        rules=over,
        compression=compression,
        memory=memory or Options().memory,
        link=link,
        scan_axis=scan_axis,
        pipeline=read_pipeline(pipeline) if pipeline else None,
    )
    found = opened(source) if isinstance(source, str | Path) else source
    checkpoint = open_checkpoint(found) if found is not None else None
    if found is not None:
        on_source(found)
    plan = compile_plan(family, named, options, checkpoint)
    if plan.source and found is not None and found.local is not None:
        remember(plan.source, found.local)
    return plan


def _mesh(
    mesh: str | Mapping[str, int] | None, rules: str | Path | Rules | None, family: Family
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    from ckptc.compile.mesh import read_mesh
    from ckptc.spec.rules import load_rules
    from ckptc.spec.target import target_tree

    if mesh is None:
        if rules is not None:
            raise fail("bad-mesh", "--rules say how a mesh shards, and there is none", help="give one with --mesh")
        return (), ()
    tree = target_tree(family.target)
    if isinstance(rules, str | Path):
        axes, over = load_rules(Path(rules), tree)
    elif rules is None:
        axes, over = tree.mesh_axes, tree.rules
    else:
        over = tuple((logical, tuple(names)) for logical, names in rules)
        # The mesh's own names, where rules speak of no others: they are the caller's.
        axes = tuple(
            dict.fromkeys([*(() if isinstance(mesh, str) else mesh), *(n for _, names in over for n in names)])
        )
    text = mesh if isinstance(mesh, str) else ",".join(f"{name}={size}" for name, size in mesh.items())
    return read_mesh(text, axes), over


def compile_export(source: str | Path, model: str | None = None, **options: Any) -> Plan:
    """The plan of an export: an Orbax checkpoint's way back to safetensors files. Reads no weights.

    `source`: an output or a run's directory, its `checkpoints`, a step, or its items. `model`: default: what a conversion
    has noted. `options`: those of `ExportCompilation.plan`: `config_from`, the original's directory; `fill_from`, a
    checkpoint whose tensors are copied where the target has no place for them; `scan`, `scan_axis`,
    which are found out by default; `dtype` of floating tensors, by default the original's; `max_shard_size`, bytes of a
    file; `memory`, 1 GiB by default; `mapping`, `multimodal`, `set`.

    Raises InputError: `no-model`, `no-checkpoint`, and all that does not fit the mapping.
    """
    with ExportCompilation(source) as compilation:
        return compilation.plan(model, **options)


def run(
    plan: Plan,
    output: str | Path,
    *,
    source: str | Path | Source | None = None,
    config_from: str | Path | None = None,
    fill_from: str | Path | None = None,
    jobs: int | None = None,
    restart: bool = False,
    force: bool = False,
    check_source: str | None = None,
    verify: bool = False,
    mapping: str | Path | None = None,
    on_progress: Callable[[Progress], None] = _nothing,
    on_verified: Callable[[Verified], None] = _nothing,
    peers: Alone | None = None,
    plain: PlainIndex | None = None,
) -> Report | ExportReport:
    """Executes exactly the plan into `output`, a directory or, of a conversion, `gs://BUCKET/PATH`; goes on with an
    unfinished run of the same plan, unless `restart`.

    `source`: where the plan's files are, by default where they were when it was compiled. `jobs`: worker processes at
    most, by default the cores; a process that has loaded JAX or TensorStore runs one. `force`: replace a checkpoint that
    is there, once the new one is complete. Of conversions: `check_source`, a file of SHA-256 sums, or `auto`; `verify`:
    read everything back and compare it with the source before it appears. Of exports: `config_from`, the directory with
    the files to copy; `fill_from`, the checkpoint that tensors are copied from.
    `peers`: the other processes of the run (`ckptc.run.coordinator`). `plain`: where an export's
    chunks lie, if that is known.

    Raises InputError: `abstract-plan`, `output-exists`, `source-changed`, `other-plan`, `disk-full`, `worker-died`, …
    """
    from ckptc.run.pool import cores

    jobs = jobs or cores()
    if isinstance(plan.layout, Safetensors):
        from ckptc.run.export import export as run_export

        if "://" in str(output):
            raise fail("unsupported-url", "an export is written to a directory", help="give one with --output")
        directory = None if source is None else Path(str(source))
        copied = Path(config_from) if config_from else None
        return run_export(plan, Path(output), directory, copied, on_progress, force, jobs, plain, restart, fill_from)
    from ckptc.run.runner import Settings
    from ckptc.run.runner import run as run_plan
    from ckptc.storage.source.base import opened

    found = opened(source) if isinstance(source, str | Path) else source

    def check(step: Path) -> None:
        on_verified(against_source(plan, step, found, mapping, on_progress, jobs))

    settings = Settings(jobs, restart, force, check_source)
    before_commit = check if verify else None
    return run_plan(plan, plan.digest, output, found, on_progress, settings, before_commit, peers)


def convert(
    model: str,
    output: str | Path,
    *,
    source: str | Path | None = None,
    run_with: Mapping[str, Any] | None = None,
    **options: Any,
) -> Report:
    """Compiles and runs in one. `source`: by default the model's own repository on the Hub. `options`: of `compile`;
    `run_with`: of `run`. Raises what they raise."""
    from ckptc.run.runner import Report

    repository = source or f"hf://{find(model, options.get('mapping'))[1].repo}"
    report = run(compile(model, repository, **options), output, **{"source": repository, **(run_with or {})})
    assert isinstance(report, Report)
    return report


def export(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    run_with: Mapping[str, Any] | None = None,
    **options: Any,
) -> ExportReport:
    """Turns an Orbax checkpoint, converted or trained, into what `transformers` loads, in the directory `output`.
    `options`: of `compile_export`; `run_with`: of `run`. Raises what they raise."""
    from ckptc.run.export import ExportReport

    with ExportCompilation(source, chunks=True) as compilation:
        plan = compilation.plan(model, **options)
    given = {"source": source, "config_from": compilation.companions, "plain": compilation.plain, **(run_with or {})}
    report = run(plan, output, **given)
    assert isinstance(report, ExportReport)
    return report


def diff(
    first: str | Path,
    second: str | Path,
    *,
    memory: int = 256 * MIB,
    all: bool = False,
    on_step: Callable[[Path, str], None] = lambda given, said: None,
) -> Comparison:
    """Compares trees and values of two checkpoints, each safetensors or Orbax: `differences` is empty where they are the
    same. `all`: the rest of a training state, too. `on_step`: told which of several steps of a checkpoint is taken.

    Raises InputError where one is no checkpoint, or cannot be read.
    """
    from ckptc.run.diff import compare, open_side

    sides = [open_side(Path(given), memory, all) for given in (first, second)]
    for given, side in zip((first, second), sides, strict=True):
        on_step(Path(given), side.said)
    return compare(sides[0], sides[1], memory)


def verify(
    output: str | Path,
    plan: Plan | None = None,
    *,
    source: str | Path | None = None,
    mapping: str | Path | None = None,
    jobs: int | None = None,
    on_progress: Callable[[Progress], None] = _nothing,
    on_step: Callable[[Path, str], None] = lambda given, said: None,
) -> Verified:
    """Reads an Orbax checkpoint back and compares: with a plan, every bit with what its source gives by the mapping's
    ops, taken one after the other; without, with the checksums that were noted when it was written. `jobs`: threads, by
    default the cores.

    Raises InputError: `output-differs`, `checksum-differs`, `missing-array`, `no-checksums`, …
    """
    from ckptc.run.pool import cores
    from ckptc.run.verify import check_sums
    from ckptc.run.work import Progress
    from ckptc.storage.checkpoint.steps import find_step
    from ckptc.storage.source.base import opened

    step = find_step(Path(output))
    on_step(Path(output), step.said)
    if plan is not None:
        return against_source(plan, step.items, opened(source) if source else None, mapping, on_progress, jobs)
    return check_sums(step.items, lambda done, total, name: on_progress(Progress(done, total, name)), jobs or cores())


def against_source(
    plan: Plan,
    step: Path,
    source: Source | Path | None,
    mapping: str | Path | None,
    on_progress: Callable[[Progress], None],
    jobs: int | None = None,
) -> Verified:
    """Compares the checkpoint in `step` with the plan's source, through ops of the plan's mapping (`mapping`: its file,
    where it is not a shipped one). Raises InputError for what differs, and for a mapping or source that is another one.
    """
    from ckptc.compile.recompile import recompiled_graph
    from ckptc.ir.source import SourceFile
    from ckptc.run.pool import cores
    from ckptc.run.preflight import check_source
    from ckptc.run.runner import find_source
    from ckptc.run.verify import compare
    from ckptc.run.work import Progress
    from ckptc.storage.checkpoint.safetensors import open_checkpoint

    if not isinstance(plan.layout, Orbax):
        raise fail("not-verified", "only conversions to Orbax are verified against their source")
    found = find_source(plan, source)
    check_source(plan, found, [SourceFile(f.name, f.size, f.header, f.content) for f in plan.sources[0].files])
    graph = recompiled_graph(plan, *find(plan.made.model, mapping), open_checkpoint(found))
    names = [f.name for f in plan.sources[0].files]

    def say(done: int, total: int, name: str) -> None:
        on_progress(Progress(done, total, name))

    return compare(graph, names, found, step, say, jobs or cores(), plan.choices.memory)

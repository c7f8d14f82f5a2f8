"""The compiler: a mapping, a model and (where there is one) a checkpoint's headers become a plan. Pure; no I/O.

names -> expand -> unique_targets, check, fold, coverage -> schedule
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping as MappingOf
from typing import Any

import ckptc
from ckptc.compile.check import check, missing
from ckptc.compile.coverage import LeftOut, coverage, unique_targets
from ckptc.compile.dims import evaluate_dims
from ckptc.compile.expand import expand
from ckptc.compile.fold import Folded, fold
from ckptc.compile.options import Options
from ckptc.compile.schedule import account, choose, read_ratio, shard_counts, unit_budget
from ckptc.compile.scope import Scope
from ckptc.diagnostics import Diagnostic, InputError, fail
from ckptc.ir.graph import Graph, Leaf, Target
from ckptc.ir.source import Checkpoint, SourceTensor
from ckptc.ir.verify import verify
from ckptc.ops.types import is_float, itemsize
from ckptc.plan import model as plan
from ckptc.spec.mapping import LAYOUTS, Mapping, Model

Tensors = MappingOf[str, SourceTensor]


def compile_plan(mapping: Mapping, model: Model, options: Options, checkpoint: Checkpoint | None = None) -> plan.Plan:
    """The plan. Without a checkpoint, dims come from the numbers shipped for the model and nothing is checked against headers.

    Raises InputError with everything that is wrong, found before a byte of weight data is read.
    """
    config = checkpoint.config if checkpoint and checkpoint.config else model.config
    dims = evaluate_dims(mapping, model, config, options.set)
    _supported(
        mapping,
        model,
        options,
        {**dims, "config": config, "multimodal": options.multimodal, "dtype": options.dtype},
    )
    tensors = checkpoint.tensors if checkpoint else None
    naming, graph = _expand(mapping, options, dims, config, tensors)
    folded = fold(graph)
    problems: list[Diagnostic] = []
    left_out: tuple[LeftOut, ...] = ()
    try:
        unique_targets(graph)
    except InputError as error:
        problems += error.diagnostics
    if tensors is not None:
        try:
            check(graph, tensors)
        except InputError as error:
            problems += error.diagnostics
    try:
        left_out = coverage(graph, folded, tensors or {})
    except InputError as error:
        problems += error.diagnostics
    if problems:
        raise InputError(dict.fromkeys(problems))
    return _assemble(mapping, model, options, dims, naming, graph, folded, left_out, checkpoint)


def layouts(mapping: Mapping, model: Model) -> tuple[str, ...]:
    """The layouts the target has for a model, judged by its shipped numbers."""
    names = {
        **evaluate_dims(mapping, model, model.config, {}),
        "config": model.config,
        "multimodal": False,
        "dtype": "bfloat16",
    }
    scope = Scope(mapping.document, names)
    absent = {u.layout for u in mapping.unsupported if scope.holds(u.when, dict(names), u.where)}
    return tuple(name for name in LAYOUTS if name not in absent)


def _supported(mapping: Mapping, model: Model, options: Options, names: MappingOf[str, Any]) -> None:
    scope = Scope(mapping.document, names)
    for entry in mapping.unsupported:
        if entry.layout == options.layout and scope.holds(entry.when, dict(names), entry.where):
            raise fail(
                "unsupported-layout", f"{model.name} has no {options.layout} layout: {entry.reason}", span=mapping.document.span((*entry.where, "reason")),
                help="use --no-scan" if options.layout == "scanned" else "use --scan",
            )  # fmt: skip
    if options.multimodal and not mapping.multimodal:
        raise fail("unsupported-layout", f"{model.name} has no vision or audio towers", help="leave out --multimodal")


def _expand(
    mapping: Mapping,
    options: Options,
    dims: MappingOf[str, Any],
    config: MappingOf[str, Any],
    tensors: Tensors | None,
) -> tuple[str, Graph]:
    """Expands under each of the mapping's namings; the headers decide which one the checkpoint has."""
    default = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    default = default if default in ("bfloat16", "float16", "float32") else "bfloat16"

    def stored(name: str) -> str:
        known = tensors.get(name) if tensors is not None else None
        return known.dtype if known else default

    best: tuple[int, str, Graph] | None = None
    for naming, values in mapping.sources.items():
        graph = verify(
            expand(
                mapping,
                options,
                dims,
                {
                    **dims,
                    **values,
                    "config": config,
                    "multimodal": options.multimodal,
                    "dtype": options.dtype,
                },
                stored,
            ),
            "expand",
        )
        absent = missing(graph, tensors) if tensors is not None else 0
        if best is None or absent < best[0]:
            best = (absent, naming, graph)
        if absent == 0:
            break
    assert best is not None
    return best[1], best[2]


def _assemble(
    mapping: Mapping, model: Model, options: Options, dims: MappingOf[str, Any], naming: str, graph: Graph, folded: tuple[Folded, ...],
    left_out: tuple[LeftOut, ...], checkpoint: Checkpoint | None,
) -> plan.Plan:  # fmt: skip
    table = _Table(checkpoint)
    for target in folded:
        for leaf in target.leaves:
            table.want(leaf)
    table.number()
    arrays = tuple(_array(t, f, options, table) for t, f in zip(graph.targets, folded, strict=True))
    accounts = [account(a) for a in arrays]
    tensors = checkpoint.tensors if checkpoint else {}
    return plan.Plan(
        made=plan.Made(
            ckptc.__version__, model.name, mapping.family, model.repo, sha256(mapping.document.text.encode()),
            source_digest(checkpoint) if checkpoint else None,
        ),
        choices=plan.Choices(options.layout, options.dtype, options.multimodal, options.shards, options.memory, naming, tuple(dims.items())),
        files=tuple(plan.File(f.name, f.size, f.header_digest) for f in checkpoint.files) if checkpoint else (),
        tensors=table.rows(),
        arrays=arrays,
        left_out=tuple(
            plan.LeftOut(x.pattern, x.reason, len(x.tensors), sum(tensors[n].end - tensors[n].begin for n in x.tensors))
            for x in left_out
            if x.tensors or not checkpoint
        ),
        totals=plan.Totals(
            arrays=len(arrays),
            tensors=len(table.rows()),
            parameters=sum(t.type.size for t in graph.targets),
            read_bytes=sum(read for read, _ in accounts),
            write_bytes=sum(a.nbytes for a in arrays),
            peak_memory_bytes=max((peak for _, peak in accounts), default=0),
        ),
    )  # fmt: skip


class _Table:
    """The tensors a plan reads, numbered in the order in which they lie in the files, so that reading by number reads forwards."""

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self.known: Tensors = checkpoint.tensors if checkpoint else {}
        self.bytes: dict[str, int] = {}
        self.position: dict[str, int] = {}

    def want(self, leaf: Leaf) -> None:
        stored = leaf.decoded.stored if leaf.decoded else leaf.each
        self.bytes.update(dict.fromkeys(leaf.tensors, stored.nbytes))
        if leaf.decoded:
            self.bytes.update(dict.fromkeys(leaf.decoded.scales, leaf.decoded.scale.nbytes))

    def number(self) -> None:
        def place(name: str) -> tuple[int, int]:
            tensor = self.known.get(name)
            return (tensor.file, tensor.begin) if tensor else (-1, 0)

        names = sorted(self.bytes, key=lambda n: (place(n), n)) if self.known else list(self.bytes)
        self.position = {n: i for i, n in enumerate(names)}

    def rows(self) -> tuple[plan.Tensor, ...]:
        out = []
        for name in self.position:
            known = self.known.get(name)
            out.append(
                plan.Tensor(name, known.file, known.begin, known.end)
                if known
                else plan.Tensor(name, -1, 0, self.bytes[name])
            )
        return tuple(out)


def _array(target: Target, folded: Folded, options: Options, table: _Table) -> plan.Array:
    shape, dtype = target.type.shape, target.type.dtype
    shards = shard_counts(shape, options.shards)
    sources = tuple(_source(leaf, table) for leaf in folded.leaves)
    stored = max((itemsize(s.dtype) for s in sources), default=0)
    cost = itemsize(dtype) + max(1, round(stored * read_ratio(folded.parts)))
    chunk, unit = choose(shape, folded.parts, shards, cost, unit_budget(options.memory))
    return plan.Array(
        target.path,
        shape,
        dtype,
        chunk,
        unit,
        shards,
        target.axes,
        target.rule,
        target.steps,
        sources,
        folded.parts,
    )


def _source(leaf: Leaf, table: _Table) -> plan.Source:
    positions = tuple(table.position[n] for n in leaf.tensors)
    if leaf.decoded is None:
        return plan.Source(leaf.each.dtype, leaf.each.shape, positions)
    d = leaf.decoded
    block = getattr(d.op, "block", ())
    decode = plan.Decode(d.op.name, block, d.scale.dtype, d.scale.shape, tuple(table.position[n] for n in d.scales))
    return plan.Source(d.stored.dtype, d.stored.shape, positions, decode)


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def source_digest(checkpoint: Checkpoint) -> str:
    """Of the names, sizes and header digests of all files, and of the config: what a plan depends on."""
    files = [[f.name, f.size, f.header_digest] for f in checkpoint.files]
    return sha256(json.dumps(files, separators=(",", ":")).encode())


__all__ = ["InputError", "Options", "compile_plan", "is_float", "source_digest"]

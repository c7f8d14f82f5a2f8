"""assemble: graph, parts and headers become the plan's records.

Before: targets whose leaves name tensors. After: arrays with chunks and units, whose sources are positions in one table of tensors,
numbered as they lie in the files.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ckptc
from ckptc.compile import link
from ckptc.compile.coverage import left_out
from ckptc.compile.fold import Folded
from ckptc.compile.large_chunks import enlarge
from ckptc.compile.mesh import Partition, partition
from ckptc.compile.options import Options
from ckptc.compile.quantised import Quantised
from ckptc.compile.schedule import (
    ACCOUNTED_MOST,
    UNIT_MOST,
    TooManyUnitsError,
    account,
    fit,
    shard_counts,
    stored_bytes,
    unit_budget,
)
from ckptc.diagnostics import fail
from ckptc.ir.graph import Graph, Leaf, Target
from ckptc.ir.source import Checkpoint, SourceTensor
from ckptc.plan import links
from ckptc.plan import model as plan
from ckptc.spec.mapping import Family, Model
from ckptc.spec.target import TargetTree, target_tree

Tensors = Mapping[str, SourceTensor]


def assemble(
    mapping: Family,
    model: Model,
    options: Options,
    dims: Mapping[str, Any],
    naming: str,
    graph: Graph,
    folded: tuple[Folded, ...],
    checkpoint: Checkpoint | None,
    quantised: Quantised,
) -> plan.Plan:
    """The plan of a checked graph."""
    table = _Table(checkpoint, folded)
    tree = target_tree(mapping.target)
    arrays = tuple(_array(t, f, options, table, tree) for t, f in zip(graph.targets, folded, strict=True))
    kinds, outputs = plan.tabulated(arrays)
    files = tuple(plan.File(f.name, f.size, f.header_digest, f.content) for f in checkpoint.files) if checkpoint else ()
    return plan.Plan(
        made=plan.Made(
            ckptc=ckptc.__version__,
            model=model.name,
            family=mapping.family,
            repo=model.repo,
            mapping=sha256(mapping.document.text.encode()),
        ),
        choices=plan.Choices(
            layout=options.layout,
            dtype=options.dtype,
            multimodal=options.multimodal,
            shards=options.shards,
            memory=options.memory,
            naming=naming,
            dims={n: v for n, v in dims.items() if not isinstance(v, Mapping)},
            scan_axis=options.scan_axis,
            pipeline=str(options.pipeline or ""),
        ),
        totals=_totals(arrays, table, options.compression != "none"),
        sources=(_source(files, checkpoint),),
        layout=plan.Orbax(options.mesh, options.compression, options.link),
        left_out=_left_out(graph, checkpoint, quantised),
        kinds=kinds,
        outputs=outputs,
        tensors=table.rows,
    )


def _left_out(graph: Graph, checkpoint: Checkpoint | None, quantised: Quantised) -> tuple[plan.LeftOut, ...]:
    """With a checkpoint, the entries of `ignore` that cover some of its tensors; without, all of them."""
    tensors = checkpoint.tensors if checkpoint else {}
    return tuple(
        plan.LeftOut(x.pattern, x.reason, len(x.tensors), sum(tensors[n].end - tensors[n].begin for n in x.tensors))
        for x in left_out(graph, tensors, quantised)
        if x.tensors or not checkpoint
    )


def _totals(arrays: tuple[plan.Array, ...], table: _Table, compressed: bool) -> plan.Totals:
    accounts = [account(a.kind) if a.kind.link is None else link.account(a.kind) for a in arrays]
    reads = [a.read for a in accounts]
    stored = [stored_bytes(x.kind, compressed) for x, a in zip(arrays, accounts, strict=True) if a.buffers]
    peak = 2 * max((a.held for a in accounts), default=0) + max((a.made for a in accounts), default=0)
    return plan.Totals(
        arrays=len(arrays),
        tensors=len(table.rows),
        parameters=sum(a.size for a in arrays),
        read_bytes=sum(reads),
        write_bytes=sum(a.nbytes for a in arrays),
        peak_memory_bytes=peak + max(stored, default=0),
        linked_bytes=sum(links.linked_bytes(a.kind) for a in arrays),
        reread_bytes=_reread(arrays, reads, table),
    )


def _reread(arrays: tuple[plan.Array, ...], reads: list[int], table: _Table) -> int:
    """Of what is read, what has been read before: what arrays that share tensors read together, beyond those tensors."""
    group: dict[int, int] = {}  # of each tensor, by the first one of its group
    read: dict[int, int] = {}

    def first(tensor: int) -> int:
        while (up := group.setdefault(tensor, tensor)) != tensor:
            group[tensor] = tensor = group[up]
        return tensor

    for array, count in zip(arrays, reads, strict=True):
        tensors = [t for s in array.sources for column in (s.tensors, *s.beside) for t in column]
        for tensor in tensors[:1]:
            read[tensor] = read.get(tensor, 0) + count
        for tensor in tensors[1:]:
            group[first(tensor)] = first(tensors[0])
    over: Counter[int] = Counter()
    for tensor, count in read.items():
        over[first(tensor)] += count
    for tensor in group:
        row = table.rows[tensor]
        over[first(tensor)] -= row.end - row.begin
    return sum(n for n in over.values() if n > 0)


class _Table:
    """The tensors a plan reads, numbered as they lie in the files, so that reading by number reads forwards."""

    def __init__(self, checkpoint: Checkpoint | None, folded: tuple[Folded, ...]) -> None:
        known: Tensors = checkpoint.tensors if checkpoint else {}
        size: dict[str, int] = {}
        for leaf in (leaf for fold in folded for leaf in fold.leaves):
            stored = leaf.decoded.stored if leaf.decoded else leaf.each
            size.update(dict.fromkeys(leaf.tensors, stored.nbytes))
            for beside in leaf.decoded.beside if leaf.decoded else ():
                size.update(dict.fromkeys(beside.tensors, beside.type.nbytes))

        def row(name: str) -> plan.Tensor:
            tensor = known.get(name)
            return (
                plan.Tensor(name, tensor.file, tensor.begin, tensor.end)
                if tensor
                else plan.Tensor(name, -1, 0, size[name])
            )

        rows = [row(name) for name in size]
        self.rows = tuple(sorted(rows, key=lambda t: (t.file, t.begin, t.name)) if known else rows)
        self.position = {t.name: i for i, t in enumerate(self.rows)}


def _array(target: Target, folded: Folded, options: Options, table: _Table, tree: TargetTree) -> plan.Array:
    shape, dtype = target.type.shape, target.type.dtype
    axes = target.axes or tree.axes(target.path[1:], len(shape))
    split = partition(axes, shape, options.mesh, options.rules) if options.mesh else Partition((), ())
    shards = split.shards(options.mesh, len(shape)) if options.mesh else shard_counts(shape, options.shards)
    sources = tuple(_operand(leaf, table) for leaf in folded.leaves)
    compressed = options.compression != "none"
    budget = unit_budget(options.memory, compressed)
    stored = tuple(s.stored for s in sources)
    content = plan.Content(shape, dtype, stored, folded.parts)
    linked = link.choose(content, shards, budget) if options.link else None

    def fitted(memory: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Chunk and unit within a budget; None where there would be too many."""
        try:
            return fit(content, shards, unit_budget(memory, compressed), bool(options.mesh))
        except TooManyUnitsError:
            return None

    made = (linked[0], linked[0]) if linked else fitted(options.memory)
    if made is None:
        enough = next((m for m in (1 << n for n in range(21, 31)) if m > options.memory and fitted(m)), None)
        raise fail(
            "too-little-memory",
            f"`{'/'.join(target.path)}`, of {target.type.nbytes} bytes, would be made in more than {ACCOUNTED_MOST} units",
            notes=(f"found: --memory of {options.memory} bytes",),
            help=f"use --memory {enough >> 20}MiB"
            if enough
            else f"no --memory makes it: units have at most {UNIT_MOST >> 20} MiB",
        )
    chunk, unit = made
    large: tuple[int, ...] = ()
    if not linked and not compressed:  # which cannot be written in pieces
        chunk, large = enlarge(content, shards, chunk, unit, bool(options.mesh))
    kind = plan.Kind(
        rule=target.rule,
        shape=shape,
        dtype=dtype,
        chunk=chunk,
        unit=unit,
        sources=stored,
        parts=folded.parts,
        ops=target.steps,
        shards=shards,
        axes=axes,
        spec=split.spec,
        indivisible=split.indivisible if any(split.indivisible) else (),
        link=linked[1] if linked else None,
        stored=large,
    )
    return plan.Array("/".join(target.path), kind, sources)


def _operand(leaf: Leaf, table: _Table) -> plan.Operand:
    positions = tuple(table.position[n] for n in leaf.tensors)
    if leaf.decoded is None:
        return plan.Operand(plan.Stored(leaf.each.dtype, leaf.each.shape, len(positions)), positions)
    d = leaf.decoded
    columns = tuple(tuple(table.position[n] for n in b.tensors) for b in d.beside)
    beside = tuple(plan.Beside(b.type.dtype, b.type.shape) for b in d.beside)
    decode = plan.Decode(d.code.name, d.code.settings(), leaf.each.shape, beside)
    return plan.Operand(plan.Stored(d.stored.dtype, d.stored.shape, len(positions), decode=decode), positions, columns)


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _source(files: tuple[plan.File, ...], checkpoint: Checkpoint | None) -> plan.Source:
    if checkpoint is None:
        return plan.Source("safetensors")
    return plan.Source("safetensors", files, source_digest(checkpoint), checkpoint.name)


def source_digest(checkpoint: Checkpoint) -> str:
    """Of the names, sizes, header digests and contents of all files."""
    files = [[f.name, f.size, f.header_digest, f.content] for f in checkpoint.files]
    return sha256(json.dumps(files, separators=(",", ":")).encode())

"""reading: which layout, naming and sizes a saved checkpoint has, found by trying the mapping on it.

The layout is what the checkpoint's metadata says, else the one whose arrays it has. Which axis stacked layers are, and
how a pipeline divides them, is tried until the shapes fit. Sizes that only pad (`pad`,
`resize`) are taken from the arrays, since any training may have chosen its own. The naming is the original's, but none
whose tensors are packed codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from ckptc.compile.compiler import all_namings, expand_namings, supported
from ckptc.compile.dims import evaluate_dims
from ckptc.compile.match import RANDOM, Matched, match, normal
from ckptc.compile.options import MIB, Options
from ckptc.compile.stacking import SCAN_AXES, SCAN_AXIS, Pipeline, guesses
from ckptc.diagnostics import InputError, fail
from ckptc.ir.graph import Graph, leaves
from ckptc.ir.saved import Original, Saved, SavedArray
from ckptc.spec.mapping import LAYOUTS, Family, Model, Value
from ckptc.spec.target import TargetTree, target_tree

GB = 10**9
SCALES = "_scale_inv"  # what a tensor of scales is called, after the tensor of codes


@dataclass(frozen=True, slots=True)
class ExportOptions:
    dtype: str | None = None  # of floating tensors; None: the original's, else the config's, else bfloat16
    multimodal: bool = False
    set: Mapping[str, Value] = field(default_factory=dict)
    layout: str | None = None  # None: the checkpoint's own
    scan_axis: int | None = None  # the axis that stacked layers are; None: what the shapes say
    memory: int = 1024 * MIB  # bytes of buffers a run may hold
    max_shard: int = 5 * GB  # bytes of tensors in a file


@dataclass(frozen=True)
class Reading:
    """One reading of the mapping: a layout, and what it gives."""

    layout: str
    scan_axis: int
    pipeline: Pipeline | None
    naming: str
    dims: dict[str, Any]
    graph: Graph
    matched: Matched

    @property
    def faults(self) -> int:
        """How many arrays do not fit."""
        wrong = sum(array.shape != target.type.shape for target, array in self.matched.pairs(self.graph))
        return len(self.matched.missing) + len(self.matched.others) + wrong


def read(
    mapping: Family,
    model: Model,
    options: ExportOptions,
    saved: Saved,
    original: Original | None,
    config: Mapping[str, Any],
) -> Reading:
    """The mapping in the checkpoint's layout. Raises `layout-mismatch` where an option says another."""
    scanned = saved.custom.get("scan_layers")
    stated = None if not isinstance(scanned, bool) else LAYOUTS[0] if scanned else LAYOUTS[1]
    if stated and options.layout and stated != options.layout:
        raise _contradiction(stated, "its metadata says")
    tree = target_tree(mapping.target)
    saved = replace(saved, arrays=tuple(a for a in saved.arrays if a.path[0] not in dict(tree.besides)))
    errors: list[InputError] = []

    def tries(layouts: Sequence[str], pipelines: Sequence[Pipeline | None], axes: Sequence[int]) -> Iterator[Reading]:
        for layout, pipeline, axis in product(layouts, pipelines, axes):
            try:
                yield _read_as(layout, pipeline, axis, mapping, model, options, saved, original, config)
            except InputError as error:
                errors.append(error)

    pipelines: Sequence[Pipeline | None] = _pipelines(saved, tree) or [None]
    usual = SCAN_AXIS if options.scan_axis is None else options.scan_axis
    tried = [*tries([stated] if stated else LAYOUTS, pipelines, [usual])]
    if not tried:
        raise errors[0]
    best = min(tried, key=lambda r: (r.faults, r.layout != options.layout))
    if best.faults and options.scan_axis is None:
        others = tries([best.layout], pipelines, [axis for axis in SCAN_AXES if axis != usual])
        best = min([best, *others], key=lambda r: r.faults)
    if options.layout and best.layout != options.layout and not best.matched.missing:
        raise _contradiction(best.layout, "its arrays are")
    return best


def _pipelines(saved: Saved, tree: TargetTree) -> list[Pipeline]:
    """How a pipeline may have divided the layers; empty where none has."""
    paths, shapes = [], []
    for array in saved.arrays:
        path = normal(array.path)
        for inside in {p.inside for p in tree.pipelines}:
            at = next((n for n in range(len(path)) if path[n : n + len(inside)] == inside), None)
            if at is not None and len(array.shape) > 1 and not any(RANDOM.fullmatch(part) for part in path):
                paths.append(path[at + len(inside) :])
                shapes.append(array.shape)
    return guesses(paths, shapes) if paths else []


def _contradiction(layout: str, why: str) -> InputError:
    option, other = ("--scan", "--no-scan") if layout == "scanned" else ("--no-scan", "--scan")
    return fail(
        "layout-mismatch",
        f"the checkpoint is {layout} ({why} so), {other} says otherwise",
        help=f"leave it out, or use {option}",
    )


def _read_as(
    layout: str,
    pipeline: Pipeline | None,
    scan_axis: int,
    mapping: Family,
    model: Model,
    options: ExportOptions,
    saved: Saved,
    original: Original | None,
    config: Mapping[str, Any],
) -> Reading:
    kept = original.dims if original and isinstance(original.dims, Mapping) else {}
    # What is 0 is no size that can be given: it is computed again.
    sizes = {n: v for n, v in kept.items() if n in mapping.dims and isinstance(v, int | float)}
    given = {n: v for n, v in sizes.items() if isinstance(v, bool) or v != 0} | dict(options.set)
    dtypes = original.dtypes if original else None
    stored = most(saved.arrays)
    places = target_tree(mapping.target).places
    choices = Options(
        layout=layout, dtype=stored, multimodal=options.multimodal, scan_axis=scan_axis, pipeline=pipeline
    )
    read: Reading | None = None
    while True:
        try:
            dims = evaluate_dims(mapping, model, config, given)
            names = {**dims, "config": config, "multimodal": options.multimodal, "dtype": stored}
            supported(mapping, model, choices, names)
            naming, graph = expand_namings(mapping, choices, dims, names, dtypes)
            if _unfit(graph):  # another naming may have the tensors as plain numbers
                plain = ((n, g) for n, g in all_namings(mapping, choices, dims, names, dtypes) if not _unfit(g))
                naming, graph = next(plain, (naming, graph))
            read = Reading(layout, scan_axis, pipeline, naming, dims, graph, match(graph, saved.arrays, places))
        except InputError:
            if read is None:
                raise
            return read  # arrays too small for any padding: better said of the arrays than of the ops
        sizes = {n: s for n, s in _paddings(mapping, read).items() if n not in given}
        if not sizes:
            return read
        given |= sizes


def _unfit(graph: Graph) -> bool:
    """Whether a naming is none to export under.

    Tensors of scales would be without their codes.
    """
    names = {name for t in graph.targets for leaf in leaves(t.node) for name in leaf.tensors}
    return any(n.endswith(SCALES) and n.removesuffix(SCALES) not in names for n in names)


def _paddings(mapping: Family, read: Reading) -> dict[str, int]:
    """Dims that are the sizes of padded axes, where the arrays have others than the mapping gives."""
    by_rule: dict[str, dict[str, str]] = {}
    for block, rules in [("", mapping.rules), *((f"{b.name}: ", b.rules) for b in mapping.blocks)]:
        for rule in rules:
            for op in rule.ops:
                if op.name in ("pad", "resize"):
                    ((axis, size),) = op.argument.items()
                    if isinstance(size, str) and re.fullmatch(r"\w+", size) and size in mapping.dims:
                        by_rule.setdefault(block + rule.target, {})[axis] = size
    out = {}
    for target in read.graph.targets:
        array = read.matched.arrays.get(target.path)
        axes = by_rule.get(target.rule)
        if array is None or not axes or len(array.shape) != len(target.type.shape):
            continue
        for axis, found in zip(target.type.axes, array.shape, strict=True):
            if axis.name in axes and axis.size != found:
                out[axes[axis.name]] = found
    return out


def most(arrays: Sequence[SavedArray]) -> str:
    """The dtype of most bytes; bfloat16 of none."""
    count: dict[str, int] = {}
    for array in arrays:
        count[array.dtype] = count.get(array.dtype, 0) + array.nbytes
    return max(count, key=lambda dtype: count[dtype], default="bfloat16")

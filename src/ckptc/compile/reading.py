"""reading: which layout, naming and sizes a saved checkpoint has, found by trying the mapping on it.

The layout is what the checkpoint's metadata says, else the one whose arrays it has. Sizes that only pad (`pad`,
`resize`) are taken from the arrays, since any training may have chosen its own. The naming is the original's, but none
whose tensors are packed codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptc.compile.compiler import all_namings, expand_namings, supported
from ckptc.compile.dims import evaluate_dims
from ckptc.compile.match import Matched, match
from ckptc.compile.options import MIB, Options
from ckptc.diagnostics import InputError, fail
from ckptc.ir.graph import Graph, leaves
from ckptc.ir.saved import Original, Saved, SavedArray
from ckptc.spec.mapping import LAYOUTS, Family, Model, Value
from ckptc.spec.target import target_tree

GB = 10**9
SCALES = "_scale_inv"  # what a tensor of scales is called, after the tensor of codes


@dataclass(frozen=True, slots=True)
class ExportOptions:
    dtype: str | None = None  # of floating tensors; None: the original's, else the config's, else bfloat16
    multimodal: bool = False
    set: Mapping[str, Value] = field(default_factory=dict)
    layout: str | None = None  # None: the checkpoint's own
    memory: int = 1024 * MIB  # bytes of buffers a run may hold
    max_shard: int = 5 * GB  # bytes of tensors in a file


@dataclass(frozen=True)
class Reading:
    """One reading of the mapping: a layout, and what it gives."""

    layout: str
    naming: str
    dims: dict[str, Any]
    graph: Graph
    matched: Matched


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
    tried: list[Reading] = []
    errors: list[InputError] = []
    for layout in [stated] if stated else LAYOUTS:
        try:
            tried.append(_read_as(layout, mapping, model, options, saved, original, config))
        except InputError as error:
            errors.append(error)
    if not tried:
        raise errors[0]
    best = min(tried, key=lambda r: (len(r.matched.missing) + len(r.matched.others), r.layout != options.layout))
    if options.layout and best.layout != options.layout and not best.matched.missing:
        raise _contradiction(best.layout, "its arrays are")
    return best


def _contradiction(layout: str, why: str) -> InputError:
    option, other = ("--scan", "--no-scan") if layout == "scanned" else ("--no-scan", "--scan")
    return fail(
        "layout-mismatch",
        f"the checkpoint is {layout} ({why} so), {other} says otherwise",
        help=f"leave it out, or use {option}",
    )


def _read_as(
    layout: str,
    mapping: Family,
    model: Model,
    options: ExportOptions,
    saved: Saved,
    original: Original | None,
    config: Mapping[str, Any],
) -> Reading:
    kept = original.dims if original and isinstance(original.dims, Mapping) else {}
    given = {n: v for n, v in kept.items() if n in mapping.dims and isinstance(v, int | float)} | dict(options.set)
    dtypes = original.dtypes if original else None
    stored = most(saved.arrays)
    places = target_tree(mapping.target).places
    choices = Options(layout=layout, dtype=stored, multimodal=options.multimodal)
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
            read = Reading(layout, naming, dims, graph, match(graph, saved.arrays, places))
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

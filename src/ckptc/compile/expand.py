"""expand: rules, layouts and loops become typed target arrays.

Before: `mlp/wi_0/kernel: { from: mlp.gate_proj.weight, as: mlp embed -> embed mlp }` in a block of 26 scanned layers.
After: one target `params/params/decoder/layers/mlp/wi_0/kernel`, float types on every node:
leaf [layer=26, mlp, embed] of 26 names -> rearrange -> cast -> move `layer` to axis 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ckptc.compile.chain import Chain, Expansion, Here, StoredDtype, restacked_axes
from ckptc.compile.options import Options
from ckptc.compile.quantised import Quantised
from ckptc.compile.scope import Names, Scope
from ckptc.compile.stacking import SCAN_AXIS, Pipeline, shares
from ckptc.diagnostics import InputError
from ckptc.ir.graph import Graph, Ignored, Target
from ckptc.spec.document import Path_
from ckptc.spec.mapping import Block, Family, Place, Rule
from ckptc.spec.target import Pipelined, target_tree

TARGETS_MOST = 10_000  # arrays of one checkpoint
ELEMENTS_MOST = 1 << 40  # of an array: the largest of published models has 2^37


def expand(
    mapping: Family,
    options: Options,
    dims: Mapping[str, Any],
    names: Names,
    stored: StoredDtype,
    quantised: Quantised | None = None,
) -> Graph:
    """The graph of one model in one layout. `names` are the dims, `config`, and the source variant's values; `stored` says
    a tensor's dtype, and `quantised` which weights are stored as codes.

    Raises InputError with the problems of every rule.
    """
    work = Expansion(mapping, Scope(mapping.document, dims), options, stored, quantised or Quantised())
    top = Here("", (), [names], [""], (), "")
    for rule in mapping.rules:
        _guarded(work, lambda rule=rule: _expand_rule(work, rule, top))  # type: ignore[misc]
    for block in mapping.blocks:
        if not work.scope.holds(block.when, names, block.where):
            continue
        found: list[Here] = []
        for place in block.places[options.layout]:
            _guarded(
                work,
                lambda block=block, place=place, found=found: found.extend(  # type: ignore[misc]
                    _places(work, block.name, block.source, place, names, block.where)
                ),
            )
        if options.pipeline is not None:
            whole, found = found, []
            _guarded(
                work,
                lambda block=block, whole=whole, found=found: found.extend(  # type: ignore[misc]
                    _pipelined(work, options.pipeline, block, whole, names)
                ),
            )
        for here in found:
            for rule in block.rules:
                _guarded(work, lambda rule=rule, here=here: _expand_rule(work, rule, here))  # type: ignore[misc]
    ignored = []
    for entry in mapping.ignore:
        where = (*entry.where, "source")
        patterns = tuple(
            work.scope.text(entry.source, looped, where)
            for looped in work.scope.loops(entry.loop, names, entry.where)
            if work.scope.holds(entry.when, looped, entry.where)
        )
        if patterns:
            shown = patterns[0] if len(patterns) == 1 else entry.source
            ignored.append(Ignored(patterns, shown, entry.reason, work.scope.span(where)))
    if work.problems:
        raise InputError(dict.fromkeys(work.problems))
    return Graph(tuple(sorted(work.targets, key=lambda t: t.path)), tuple(ignored))


def _guarded(work: Expansion, step: Callable[[], None]) -> None:
    try:
        step()
    except InputError as error:
        work.problems += error.diagnostics


def _places(work: Expansion, block: str, source: str, place: Place, names: Names, where: Path_) -> list[Here]:
    scope, out = work.scope, []
    for looped in scope.loops(place.loop, names, place.where):
        if not scope.holds(place.when, looped, place.where):
            continue
        grid, points = scope.stack(place.stack, looped, place.where)
        if any(a.size == 0 for a in grid):
            continue
        if len(place.axis) != len(grid):
            raise scope.error(
                (*place.where, "axis"),
                f"{len(place.axis)} positions for {len(grid)} stacking axes",
                "invalid-value",
            )
        for name, expression in place.let.items():
            for point in points:
                point[name] = scope.value(expression, point, (*place.where, "let", name))
        resized = tuple(n for n in place.let if n in scope.dims)
        for name in resized:
            if any(p[name] != points[0][name] for p in points):
                where_let = (*place.where, "let", name)
                raise scope.error(where_let, f"dim `{name}` differs among the stacked layers", "invalid-value")
        prefixes = [scope.text(source, p, (*where, "source")) + "." for p in points]
        out.append(
            Here(
                scope.text(place.at, looped, (*place.where, "at")) + "/",
                grid,
                points,
                prefixes,
                place.axis,
                block,
                resized,
            )
        )
    return out


def _pipelined(work: Expansion, pipeline: Pipeline, block: Block, found: list[Here], names: Names) -> list[Here]:
    """A block's places under pipeline parallelism: of layers that are pipelined, the shares of their stack."""
    facts = target_tree(work.mapping.target).pipelines
    stacked: list[Here] = []
    for place in block.places["scanned"]:
        stacked += _places(work, block.name, block.source, place, names, block.where)
    out = [here for here in found if not any(_below(fact, here.at) for fact in facts)]
    for here in stacked:
        fact = next((f for f in facts if _below(f, here.at)), None)
        if fact is None:
            continue
        if len(here.grid) != 1 or len([h for h in stacked if _below(fact, h.at)]) > 1:
            raise work.scope.error(
                (*block.where, "scanned"),
                "these layers are not all alike: MaxText's pipelines hold no cycles of layers",
                "unsupported-layout",
                help="leave out --pipeline",
            )
        for share in shares(pipeline, fact, here.at.removesuffix("/"), here.grid[0], work.options.layout == "scanned"):
            out.append(
                replace(
                    here,
                    at=share.at + "/",
                    grid=share.grid,
                    points=[here.points[n] for n in share.layers],
                    prefixes=[here.prefixes[n] for n in share.layers],
                    lead=share.lead,
                )
            )
    return out


def _below(fact: Pipelined, at: str) -> bool:
    """Whether layers at this place are of those that a pipeline divides: a stack of them, or one by its number."""
    parts = at.removesuffix("/").split("/")
    above, last = fact.at[:-1], fact.at[-1]
    return (
        tuple(parts[: len(above)]) == above
        and len(parts) > len(above)
        and re.fullmatch(rf"{re.escape(last)}(_\d+)?", parts[len(above)]) is not None
    )


def _expand_rule(work: Expansion, rule: Rule, here: Here) -> None:
    scope = work.scope
    # Loop variables of a rule mean separate arrays, so they may not differ along the grid: the first point stands for all.
    for looped in scope.loops(rule.loop, here.points[0], rule.where):
        added = {v: looped[v] for v in rule.loop}
        points = [{**p, **added} for p in here.points]
        wanted = {scope.holds(rule.when, p, rule.where) for p in points} if rule.when is not None else {True}
        if len(wanted) > 1:
            raise scope.error((*rule.where, "when"), "true for some of the stacked layers and false for others")
        if wanted == {False}:
            continue
        target = scope.text(rule.target, points[0], rule.where)
        parts = (here.at + target).split("/")
        if not all(parts):
            shown = target if not all(target.split("/")) else here.at + target
            raise scope.error(rule.where, f"`{shown}` is not a path", "invalid-template")
        path = ("params", rule.collection, *parts)
        chain = Chain(work, rule, here, points)
        node = chain.build()
        if node.type.size > ELEMENTS_MOST or len(work.targets) >= TARGETS_MOST:
            what = (
                f"{node.type} is larger than an array can be"
                if node.type.size > ELEMENTS_MOST
                else "more arrays than a model has"
            )
            raise scope.error(rule.where, what, "too-large", help="check the sizes in config.json, and --set")
        axes = tuple(None if a == "_" else a for a in rule.axes.split()) if rule.axes else ()
        if axes and len(axes) != len(node.type.axes):
            what = f"{len(axes)} logical axes for an array of {len(node.type.axes)} axes: {node.type}"
            raise scope.error((*rule.where, "axes"), what, "op-mismatch")
        if not axes and (work.options.pipeline is not None or work.options.scan_axis != SCAN_AXIS):
            axes = restacked_axes(work, here, chain, node, path)
        label = f"{here.block}: {rule.target}" if here.block else rule.target
        work.targets.append(
            Target(
                path,
                node,
                label,
                scope.document.key_span(rule.where),
                axes,
                rule.partial,
                chain.positions,
                rule.extra,
                tuple(chain.steps),
            )
        )

"""contract: explicit rules are held to what their target holds.

What is checked of a mapping, by the block that it fills: every path, whole; the order and the sizes of axes; modules half
filled; and what only a rule's ops can show: rotary halves or pairs, factors, what norms store. Rules that are derived from
two halves have all of it from the target's own half.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose, prod
from typing import Any

from ckptc.compile.dims import evaluate_dims
from ckptc.compile.options import Options
from ckptc.compile.stacking import SCAN_AXIS
from ckptc.diagnostics import Diagnostic, Span, did_you_mean
from ckptc.ir.graph import Apply, Graph, Node, Target, leaves
from ckptc.ops.arithmetic import Add, Scale
from ckptc.ops.sugar import PermuteRope
from ckptc.ops.types import Axis
from ckptc.spec.expressions import ExpressionError, evaluate
from ckptc.spec.halves.contract import Array, Contract, contract, contracts, stored
from ckptc.spec.halves.pieces import HEAD
from ckptc.spec.halves.vocabulary import MODEL
from ckptc.spec.mapping import Family, Model
from ckptc.spec.trees import digest, known_paths, plain, tree_digest

TOWER = "_encoder/"  # in the path of an array of a vision or audio tower
ENOUGH = 0.6  # of the kinds of arrays: then a mapping that names no block fills the one that has these
LAYOUT = {"scanned": "scan", "unscanned": "unscan"}
# What the target multiplies by, and what is added on the way: then the source multiplies by this.
NORMS = {("w", 0.0): "w", ("w", 1.0): "1 + w", ("1 + w", 0.0): "1 + w", ("1 + w", -1.0): "w"}
USUAL = {"rotary": "halves", "times": "1"}  # what checkpoints on the Hub hold, where a mapping does not say
Matched = list[tuple[Target, Array]]


def contract_problems(mapping: Family, options: Options, dims: Mapping[str, Any], graph: Graph) -> list[Diagnostic]:
    """What is wrong by the target: `not-in-target`, `half-filled`, `breaks-contract`."""
    if mapping.document.data.get("extra"):
        return []  # a tree of one's own
    if options.pipeline is not None or options.scan_axis != SCAN_AXIS:
        return []  # whose paths and axes are the layout's, not the rules'
    targets = [t for t in graph.targets if not t.extra]
    known = known_paths(mapping.target)
    if mapping.document.derived or mapping.document.name.startswith("mappings/"):
        return _unknown(mapping.target, targets, (), known, options)
    named = mapping.block is not None
    candidates = [contract(mapping.target, mapping.block)] if mapping.block else list(contracts(mapping.target))
    if not candidates:
        return []
    towers = frozenset(p for p in known if TOWER in p)  # which blocks do not have yet
    decoder = {plain(mapping.target, p): p for t in targets if TOWER not in (p := _path(t))}
    fits = {c: sum(c.find(p, options.layout) is not None for p in decoder.values()) for c in candidates}
    most = max(fits.values())
    if not named and most < ENOUGH * len(decoder):  # a tree of its own, made of known arrays
        return _unknown(mapping.target, targets, candidates, known, options) or _by_name(targets, candidates, options)
    best = [c for c in candidates if fits[c] == most]
    unknown = [_unknown(mapping.target, targets, (c,), towers, options) for c in best]
    if most < len(decoder) or all(unknown):
        return min(unknown, key=len)
    return min((_held(c, mapping, options, dims, graph) for c in best), key=len)


def guarded(mapping: Family, model: Model, options: Options, dims: Mapping[str, Any], graph: Graph) -> list[Diagnostic]:
    """`not-in-target`, where a shipped model's arrays, in the sizes that the target has settings for, are not the tree that
    the target itself makes.
    """
    named = f"{LAYOUT[options.layout]}{'.mm' if options.multimodal else ''}"
    expected = tree_digest(mapping.target, model.name, named)
    usual = options.pipeline is None and options.scan_axis == SCAN_AXIS and not options.set
    if expected is None or not usual or not mapping.document.name.startswith("mappings/"):
        return []
    if dict(dims) != dict(evaluate_dims(mapping, model, model.config, {})):
        return []  # another size of it, of which the target says nothing
    if digest(("/".join(t.path), t.type.shape) for t in graph.targets) == expected:
        return []
    what = f"the arrays of {model.name} are not those of {mapping.target}'s own tree"
    help = "compare `ckptc models NAME --json` with the target's tree; a mapping or a block was changed"
    return [Diagnostic("not-in-target", what, mapping.document.span(("family",)), (f"layout: {named}",), help)]


def _path(target: Target) -> str:
    return "/".join(target.path[2:])


def _unknown(
    name: str, targets: list[Target], blocks: Sequence[Contract], known: frozenset[str], options: Options
) -> list[Diagnostic]:
    problems, said = [], set[str]()
    for target in targets:
        path = _path(target)
        short = plain(name, path)
        if short in said or short in known or any(b.find(path, options.layout) for b in blocks):
            continue
        if not blocks and not known:
            continue
        said.add(short)
        places = {re.sub(r"\{\{.*?\}\}", "#", a.path) for b in blocks for a in b.of(options.layout)} | known
        held = f"`{blocks[0].name}`" if len(blocks) == 1 else "the target"
        problems.append(
            Diagnostic(
                "not-in-target",
                f"{held} has no array `{path}`",
                target.span,
                (f"rule: {target.rule}",),
                did_you_mean(short, sorted(places))
                or "`ckptc targets` lists what there is; `extra: true` writes it all the same",
            )
        )
    return problems


def _by_name(targets: list[Target], blocks: list[Contract], options: Options) -> list[Diagnostic]:
    """Of arrays that several blocks have, no two ways: what all of them say of the order of axes."""
    problems: list[Diagnostic] = []
    for target in targets:
        found = [a for b in blocks if (a := b.find(_path(target), options.layout))]
        if found and all(_misordered(target, a) for a in found):
            problems.append(_order(target, found[0]))
    return problems


@dataclass
class _Facts:
    """What a rule's ops come to."""

    times: float
    plus: float
    turned: list[str]  # axes of rotary permutations


def _facts(node: Node) -> _Facts:
    seen = list(dict.fromkeys(id(n) for n in _nodes(node)))
    nodes = {id(n): n for n in _nodes(node)}
    ops = [n.op for i in seen if isinstance(n := nodes[i], Apply)]
    return _Facts(
        prod(op.factor for op in ops if isinstance(op, Scale)),
        sum(op.term for op in ops if isinstance(op, Add)),
        [op.axis for op in ops if isinstance(op, PermuteRope)],
    )


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node.inputs if isinstance(node, Apply) else ():
        yield from _nodes(child)


def _held(
    block: Contract, mapping: Family, options: Options, dims: Mapping[str, Any], graph: Graph
) -> list[Diagnostic]:
    pairs: Matched = []
    for target in graph.targets:
        array = None if target.extra else block.find(_path(target), options.layout)
        if array is not None and leaves(target.node):
            pairs.append((target, array))
    problems = [_order(t, a) for t, a in pairs if _misordered(t, a)]
    bound = _sizes(pairs, block, mapping, dims)
    problems += [] if problems else [d for t, a in pairs for d in _wrong_size(t, a, bound)]
    if not problems:
        problems += _conventions(block, mapping, pairs, {**bound, **dims})
        problems += _half_filled(block, mapping, options, graph)
    out: dict[tuple[str, Span | None, str], Diagnostic] = {}
    for d in problems:
        out.setdefault((d.code, d.span, re.sub(r"\d+", "#", d.message)), d)
    return list(out.values())


# Axes


def _own(target: Target) -> list[Axis]:
    """Its axes, without those of stacked layers."""
    return [a for n, a in enumerate(target.type.axes) if n not in target.layers]


def _declared(array: Array) -> list[str]:
    """The declared axes; "" for one that is made of several."""
    return [g[0] if len(g) == 1 else "" for g in array.axes]


def _misordered(target: Target, array: Array) -> bool:
    own, declared = [a.name for a in _own(target)], _declared(array)
    if len(own) != len(declared):
        return True
    return own != declared and sorted(own) == sorted(declared) and "" not in declared


def _order(target: Target, array: Array) -> Diagnostic:
    found = ", ".join(map(str, _own(target)))
    return Diagnostic(
        "breaks-contract",
        f"`{_path(target)}` has its axes otherwise in the target",
        target.span,
        (f"expected: [{', '.join(_shown(array))}]", f"found:    [{found}]", f"rule: {target.rule}"),
        "bring the axes into that order with the pattern in `as`",
    )


def _shown(array: Array) -> list[str]:
    return [g[0] if len(g) == 1 else f"({' '.join(g)})" for g in array.axes]


def _sizes(pairs: Matched, block: Contract, mapping: Family, dims: Mapping[str, Any]) -> dict[str, int]:
    """The size of each declared axis: the mapping's dim of that name where some array has it, else what most arrays have."""
    varies = {n for b in mapping.blocks for places in b.places.values() for p in places for n in p.let}
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for target, array in pairs:
        for axis, name in zip(_own(target), _declared(array), strict=False):
            if name and name != "*" and name not in varies and name not in block.half.sizes:
                votes[name][axis.size] += 1
    return {n: dims[n] if dims.get(n) in counted else counted.most_common(1)[0][0] for n, counted in votes.items()}


def _wrong_size(target: Target, array: Array, bound: dict[str, int]) -> Iterator[Diagnostic]:
    own, declared = _own(target), _declared(array)
    wrong = [n for a, n in zip(own, declared, strict=True) if n in bound and a.size != bound[n]]
    if wrong:
        expected = ", ".join(f"{n}={bound[n]}" if n in bound else n or "…" for n in declared)
        yield Diagnostic(
            "breaks-contract",
            f"`{_path(target)}` has other axes than in the target",
            target.span,
            (f"expected: [{expected}]", f"found:    [{', '.join(map(str, own))}]", f"rule: {target.rule}"),
            "check the order of axes in `as`, and the dims",
        )


# Conventions


def _conventions(block: Contract, mapping: Family, pairs: Matched, names: dict[str, Any]) -> Iterator[Diagnostic]:
    words = block.half.vocabulary
    half = stored(words, mapping.document, mapping.document.data.get("stored", {}), mapping.family)
    names = {**names, "query_scalar": names.get("query_scalar", names.get(HEAD))}
    usual = _usual_norm(pairs)
    for target, array in pairs:
        if len(array.holding.names) > 1:
            continue
        tensor, facts = words.tensors[array.holding.names[0]], _facts(target.node)
        said = {w: s.value for w in ("rotary", "norm", "times") if (s := half.convention(w, tensor))}
        yield from _rotary(target, array, facts, said.get("rotary", USUAL["rotary"]), block)
        yield from _times(target, array, facts, str(said.get("times", USUAL["times"])), block, names)
        yield from _norm(target, array, facts, said.get("norm", usual), block)


def _rotary(target: Target, array: Array, facts: _Facts, here: str, block: Contract) -> Iterator[Diagnostic]:
    there = array.says.get("rotary")
    wanted = 1 if there == "pairs" and here == "halves" else 0
    if len(facts.turned) != wanted:
        what = "is not turned from halves to pairs" if wanted else "is turned from halves to pairs"
        says = f"`{block.name}` rotates {there}" if there else f"`{block.name}` does not rotate it"
        help = "add `ops: [{ permute_rope: … }]`" if wanted else "leave out `permute_rope`"
        yield _breaks(
            target, what, f"{says}, the source {here}", f"{help}, or say under `stored` what the source holds"
        )
    elif wanted and len(leaves(target.node)) == 1:
        own, declared = _own(target), _declared(array)
        at = declared.index(HEAD) if HEAD in declared else len(own) - 1
        if facts.turned[0] != own[at].name:
            yield _breaks(
                target,
                f"is turned along `{facts.turned[0]}`",
                f"heads turn along `{own[at].name}`",
                f"permute_rope: {own[at].name}",
            )


def _times(
    target: Target, array: Array, facts: _Facts, here: str, block: Contract, names: dict[str, Any]
) -> Iterator[Diagnostic]:
    there = str(array.says.get("times", "1"))
    try:
        wanted = float(evaluate(there, names)) / float(evaluate(here, names))
    except (ExpressionError, TypeError, ZeroDivisionError):
        return  # in dims that these rules do not have
    if not isclose(facts.times, wanted, rel_tol=1e-6):
        yield _breaks(
            target,
            f"is multiplied by {facts.times:.6g}, not by {wanted:.6g}",
            f"`{block.name}` holds it times {there}, the source times {here}",
            "add `ops: [{ scale: … }]` with that factor" if facts.times == 1 else "correct the factor of `scale`",
        )


def _usual_norm(pairs: Matched) -> str | None:
    """What most norms of the source store, as far as the rules show it."""
    said = (("1 + w" if a.says["norm"] == "1 + w" else "w", _facts(t.node).plus) for t, a in pairs if "norm" in a.says)
    shown = Counter(NORMS[s] for s in said if s in NORMS)
    return shown.most_common(1)[0][0] if shown else None


def _norm(target: Target, array: Array, facts: _Facts, here: str | None, block: Contract) -> Iterator[Diagnostic]:
    there = array.says.get("norm")
    wanted = 0.0 if there is None or here is None or there == here else 1.0 if here == "1 + w" else -1.0
    if facts.plus != wanted and not (there is not None and here is None):
        yield _breaks(
            target,
            f"has {facts.plus:g} added to it, not {wanted:g}",
            f"`{block.name}`'s norms multiply by {there}, the source's by {here}"
            if there
            else f"`{block.name}` adds nothing to it",
            "as the other norms do; or say under `stored` what the source holds",
        )


def _breaks(target: Target, what: str, why: str, help: str) -> Diagnostic:
    return Diagnostic("breaks-contract", f"`{_path(target)}` {what}", target.span, (why, f"rule: {target.rule}"), help)


# Modules


def _template(target: str) -> re.Pattern[str]:
    return re.compile("[^/]+".join(map(re.escape, re.split(r"\{\{.*?\}\}", target))))


def _any(rules: list[re.Pattern[str]], array: Array) -> bool:
    """Whether the mapping has a rule for the array, under a condition that does not hold."""
    name = re.sub(r"\{\{.*?\}\}", "0", array.holding.name.value)
    return any(r.fullmatch(name) for r in rules)


def _half_filled(block: Contract, mapping: Family, options: Options, graph: Graph) -> Iterator[Diagnostic]:
    """Modules of which a mapping fills some arrays and not all."""
    paths = {_path(t): t for t in graph.targets}
    open_ = {m for t in graph.targets if t.extra for m in ["/".join(_path(t).split("/")[:n]) for n in range(1, 9)]}
    conditional = [_template(r.target) for b in mapping.blocks for r in b.rules if r.when is not None]
    found: defaultdict[str, dict[int, Target]] = defaultdict(dict)  # by module as it is in the tree
    modules: defaultdict[str, list[Array]] = defaultdict(list)
    for array in block.of(options.layout):
        if array.module and array.section != MODEL:
            modules[array.module].append(array)
    for module, arrays in modules.items():
        if len(arrays) < 2:
            continue
        prefix = re.compile("(" + "[^/]+".join(map(re.escape, re.split(r"\{\{.*?\}\}", module))) + ")/.*")
        for path, target in paths.items():
            for n, array in enumerate(arrays):
                if array.pattern.fullmatch(path) and (match := prefix.fullmatch(path)):
                    found[match.group(1)][n] = target
        for at, filled in found.items():
            missing = [
                a for n, a in enumerate(arrays) if n not in filled and not a.optional and not _any(conditional, a)
            ]
            if missing and at not in open_:
                target = next(iter(filled.values()))
                names = ", ".join(f"`{a.path.rsplit(module, 1)[-1].lstrip('/')}`" for a in missing)
                yield Diagnostic(
                    "half-filled",
                    f"`{at}` lacks {names}",
                    target.span,
                    (f"`{block.name}` has it whole", f"rule: {target.rule}"),
                    "add the rule; an array that the checkpoint does not have can be a `fill`",
                )
        found.clear()

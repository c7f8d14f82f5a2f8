"""coverage: nothing is silent.

Every target array is filled by one rule; every source tensor is consumed whole, or ignored with a reason. What is left out is listed in the
plan, with the reasons.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptc.compile.fold import Folded
from ckptc.compile.quantised import REASON, Quantised
from ckptc.compile.scope import matches
from ckptc.diagnostics import Diagnostic, Span, nearest
from ckptc.ir.graph import Graph
from ckptc.ir.source import SourceTensor
from ckptc.ops.nest import Part

SHOWN = 8  # names of unconsumed tensors that one error lists


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Source tensors that a pattern of `ignore` covers."""

    pattern: str
    reason: str
    tensors: tuple[str, ...]


@dataclass
class Consumption:
    """How much of each source tensor the rules read."""

    elements: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    size: dict[str, int] = field(default_factory=dict)  # elements of each tensor, decoded
    beside: set[str] = field(default_factory=set)  # tensors that decoding needs beside codes
    partial: set[str] = field(default_factory=set)  # tensors of which a rule says that it leaves some
    rules: dict[str, Span] = field(default_factory=dict)  # names, with `#` for numbers, and the rule that reads them

    def consumed(self, name: str) -> bool:
        return name in self.size or name in self.beside


def consumption(graph: Graph, folded: tuple[Folded, ...]) -> Consumption:
    """What the rules read."""
    out = Consumption()
    walks: dict[str, set[object]] = {}  # what has been read of each tensor: the same elements count once
    for target, fold in zip(graph.targets, folded, strict=True):
        for number, leaf in enumerate(fold.leaves):
            parts = [(_walk(p), p.size // len(leaf.tensors)) for p in fold.parts if p.source == number]
            out.rules.setdefault(_shape(leaf.tensors[0]), leaf.span)
            for name in leaf.tensors:
                known = walks.setdefault(name, set())
                out.elements[name] += sum(size for walk, size in parts if walk not in known)
                known.update(walk for walk, _ in parts)
                out.size[name] = leaf.each.size
            for beside in leaf.decoded.beside if leaf.decoded else ():
                out.beside.update(beside.tensors)
            if target.partial:
                out.partial.update(leaf.tensors)
    return out


def _walk(part: Part) -> object:
    """Which elements of a tensor a part reads, whatever it makes of them: equal walks are the same elements."""
    return part.base, frozenset((f.size, f.step) for a in part.axes for f in a.factors if not f.tensor and f.size > 1)


def unique_targets(graph: Graph) -> list[Diagnostic]:
    """`duplicate-target`, where two rules fill one array, or one lies inside another."""
    problems, seen = [], dict[tuple[str, ...], str]()
    for target in graph.targets:
        shown = "/".join(target.path)
        if target.path in seen:
            what, other = f"two rules fill `{shown}`", seen[target.path]
        elif inside := next((p for n in range(1, len(target.path)) if (p := target.path[:n]) in seen), None):
            what, other = f"`{shown}` lies inside the array `{'/'.join(inside)}`", seen[inside]
        else:
            seen[target.path] = target.rule
            continue
        help = "give one of them a `when`, or another target"
        problems.append(Diagnostic("duplicate-target", what, target.span, (f"the other rule: {other}",), help))
    return problems


def coverage(
    graph: Graph, folded: tuple[Folded, ...], tensors: Mapping[str, SourceTensor], quantised: Quantised
) -> list[Diagnostic]:
    """`unconsumed-tensor`, `partly-consumed-tensor`, `ignored-and-consumed`: one for tensors that differ in numbers only."""
    read = consumption(graph, folded)
    problems = []
    for ignored in graph.ignored:
        both = next((n for n in read.size if n in tensors and matches(n, *ignored.patterns)), None)
        if both:
            problems.append(
                Diagnostic("ignored-and-consumed", f"`{both}` is ignored, but a rule consumes it", ignored.span)
            )
    unused, patterns = set(quantised.unused), tuple(p for i in graph.ignored for p in i.patterns)
    left = [n for n in tensors if not read.consumed(n) and n not in unused and not quantised.ignored(n, patterns)]
    if left:
        problems.append(_unconsumed(left, read, tensors))
    for target, fold in zip(graph.targets, folded, strict=True):
        for leaf in fold.leaves:
            short = next((n for n in leaf.tensors if read.elements[n] < read.size[n] and n not in read.partial), None)
            if short:
                what = f"rules read {read.elements[short]} of the {read.size[short]} elements of `{short}`"
                help = "another rule should take the rest, or `partial` say why it is left"
                problems.append(Diagnostic("partly-consumed-tensor", what, leaf.span, (f"rule: {target.rule}",), help))
    return _first_of_each(problems)


def _unconsumed(left: list[str], read: Consumption, tensors: Mapping[str, SourceTensor]) -> Diagnostic:
    """One diagnostic for all of them, at the rule whose tensors have the nearest names."""
    notes = [f"`{n}` {tensors[n].dtype}{list(tensors[n].shape)}" for n in left[:SHOWN]]
    notes += [f"and {len(left) - SHOWN} more"] if len(left) > SHOWN else []
    best = nearest(_shape(left[0]), read.rules)
    count = "a tensor" if len(left) == 1 else f"{len(left)} tensors"
    help = "add a rule, or an entry under `ignore` with the reason" + ("; the nearest rule is this one" if best else "")
    span = read.rules[best] if best else next(iter(read.rules.values()), None)
    return Diagnostic("unconsumed-tensor", f"no rule consumes {count} of the checkpoint", span, tuple(notes), help)


def left_out(graph: Graph, tensors: Iterable[str], quantised: Quantised) -> tuple[LeftOut, ...]:
    """The tensors each entry of `ignore` covers; one that several cover counts for the first. And those that decoding
    does not need, by the last part of their names."""
    rest, out = list(tensors), []
    for ignored in graph.ignored:
        covered = tuple(n for n in rest if quantised.ignored(n, ignored.patterns))
        rest = [n for n in rest if not quantised.ignored(n, ignored.patterns)]
        out.append(LeftOut(ignored.shown, ignored.reason, covered))
    there, unused = set(rest), defaultdict[str, list[str]](list)
    for name in (n for n in quantised.unused if n in there):
        unused[f"*.{name.rpartition('.')[2]}"].append(name)
    out += [LeftOut(pattern, REASON, tuple(names)) for pattern, names in sorted(unused.items())]
    return tuple(out)


def _shape(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _first_of_each(problems: list[Diagnostic]) -> list[Diagnostic]:
    seen: dict[str, Diagnostic] = {}
    for d in problems:
        seen.setdefault(d.code + _shape(d.message), d)
    return list(seen.values())

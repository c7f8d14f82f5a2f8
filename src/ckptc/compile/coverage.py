"""coverage: nothing is silent. Every target array is filled by one rule; every source tensor is consumed whole, or ignored with a reason.

Before: a graph whose rules are right one by one. After: the same graph, and what is left out, with the reasons.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass

from ckptc.compile.fold import Folded
from ckptc.compile.scope import matches
from ckptc.diagnostics import Diagnostic, InputError, Span, nearest
from ckptc.ir.graph import Graph, leaves
from ckptc.ir.source import SourceTensor

SHOWN = 8  # names of unconsumed tensors that one error lists


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Source tensors that a pattern of `ignore` covers."""

    pattern: str
    reason: str
    tensors: tuple[str, ...]


def unique_targets(graph: Graph) -> Graph:
    """The same graph. Raises InputError `duplicate-target` where two rules fill one array, or one lies inside another."""
    problems, seen = [], {}  # type: list[Diagnostic], dict[tuple[str, ...], str]
    for target in graph.targets:
        shown = "/".join(target.path)
        if target.path in seen:
            problems.append(
                Diagnostic(
                    "duplicate-target",
                    f"two rules fill `{shown}`",
                    target.span,
                    (f"the other rule: {seen[target.path]}",),
                    "give one of them a `when`, or another target",
                )
            )
        inside = next((p for n in range(1, len(target.path)) if (p := target.path[:n]) in seen), None)
        if inside:
            problems.append(
                Diagnostic(
                    "duplicate-target",
                    f"`{shown}` lies inside the array `{'/'.join(inside)}`",
                    target.span,
                    (f"the other rule: {seen[inside]}",),
                )
            )
        seen[target.path] = target.rule
    if problems:
        raise InputError(problems)
    return graph


def coverage(graph: Graph, folded: tuple[Folded, ...], tensors: MappingOf[str, SourceTensor]) -> tuple[LeftOut, ...]:
    """What `ignore` leaves out. Raises InputError: `unconsumed-tensor`, `partly-consumed-tensor`, `ignored-and-consumed`."""
    read: defaultdict[str, int] = defaultdict(int)  # elements of each tensor that some rule reads
    size: dict[str, int] = {}  # elements of each tensor, decoded
    scales: set[str] = set()
    partial = {n for t in graph.targets if t.partial for leaf in leaves(t.node) for n in leaf.tensors}
    rule: dict[str, Span] = {}  # names with `#` for numbers, and the rule that consumes them
    for target, fold in zip(graph.targets, folded, strict=True):
        for number, leaf in enumerate(fold.leaves):
            elements = sum(p.size for p in fold.parts if p.source == number) // len(leaf.tensors)
            rule.setdefault(_shape(leaf.tensors[0]), leaf.span)
            for name in leaf.tensors:
                read[name] += elements
                size[name] = leaf.each.size
            if leaf.decoded:
                scales.update(leaf.decoded.scales)
    problems, left, out = [], [n for n in tensors if n not in read and n not in scales], []
    for ignored in graph.ignored:
        both = [n for n in read if matches(ignored.pattern, n)] if tensors else []
        if both:
            problems.append(
                Diagnostic("ignored-and-consumed", f"`{both[0]}` is ignored, but a rule consumes it", ignored.span)
            )
        out.append(LeftOut(ignored.pattern, ignored.reason, tuple(n for n in left if matches(ignored.pattern, n))))
        left = [n for n in left if not matches(ignored.pattern, n)]
    if left:
        notes = [f"`{n}` {tensors[n].dtype}{list(tensors[n].shape)}" for n in left[:SHOWN]]
        notes += [f"and {len(left) - SHOWN} more"] if len(left) > SHOWN else []
        best = nearest(_shape(left[0]), rule)
        count = "a tensor" if len(left) == 1 else f"{len(left)} tensors"
        problems.append(
            Diagnostic(
                "unconsumed-tensor",
                f"no rule consumes {count} of the checkpoint",
                rule[best] if best else graph.targets[0].span,
                tuple(notes),
                "add a rule, or an entry under `ignore` with the reason"
                + ("; the nearest rule is this one" if best else ""),
            )  # fmt: skip
        )
    for target, fold in zip(graph.targets, folded, strict=True):
        for leaf in fold.leaves:
            short = next((n for n in leaf.tensors if read[n] < size[n] and n not in partial), None)
            if short:
                what = f"rules read {read[short]} of the {size[short]} elements of `{short}`"
                problems.append(
                    Diagnostic(
                        "partly-consumed-tensor",
                        what,
                        leaf.span,
                        (f"rule: {target.rule}",),
                        "another rule should take the rest, or `partial` say why it is left",
                    )
                )
    if problems:
        raise InputError(_first_of_each(problems))
    return tuple(out)


def _shape(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _first_of_each(problems: list[Diagnostic]) -> list[Diagnostic]:
    """One diagnostic for tensors that differ only in numbers."""
    seen: dict[str, Diagnostic] = {}
    for d in problems:
        seen.setdefault(d.code + _shape(d.message), d)
    return list(seen.values())

"""check: every source tensor a rule names exists, with the shape and dtype the rule expects.

Before: leaf [layer=26, mlp=9216, embed=2304] of 26 names. After: the same, proved against the shard headers; or one diagnostic for
each rule and kind of problem, however many tensors have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod

from ckptc.diagnostics import Diagnostic, nearest
from ckptc.ir.graph import Graph, Leaf, leaves
from ckptc.ir.source import SourceTensor
from ckptc.ops.types import TensorType


def check(graph: Graph, tensors: Mapping[str, SourceTensor]) -> list[Diagnostic]:
    """What is wrong, without repetitions: `missing-tensor`, `shape-mismatch`, `dtype-mismatch`."""
    shapes = _Names(tensors)
    found = (d for t in graph.targets for leaf in leaves(t.node) for d in _leaf(leaf, t.rule, tensors, shapes))
    return list(dict.fromkeys(found))


def missing(graph: Graph, tensors: Iterable[str]) -> int:
    """How many distinct source names the graph uses that are not among `tensors`."""
    known = set(tensors)
    return len({n for t in graph.targets for leaf in leaves(t.node) for n in _names(leaf) if n not in known})


def _names(leaf: Leaf) -> tuple[str, ...]:
    return (*leaf.tensors, *(n for b in (leaf.decoded.beside if leaf.decoded else ()) for n in b.tensors))


def _leaf(leaf: Leaf, rule: str, tensors: Mapping[str, SourceTensor], shapes: _Names) -> list[Diagnostic]:
    stored = leaf.decoded.stored if leaf.decoded else leaf.each
    problems = _list(leaf, leaf.tensors, stored, rule, tensors, shapes)
    if leaf.decoded:
        for wanted, beside in zip(leaf.decoded.code.layout(leaf.each.shape).beside, leaf.decoded.beside, strict=True):
            if not wanted.most:
                problems += _list(leaf, beside.tensors, beside.type, rule, tensors, shapes)
    return problems


def _list(
    leaf: Leaf,
    names: tuple[str, ...],
    expected: TensorType,
    rule: str,
    tensors: Mapping[str, SourceTensor],
    shapes: _Names,
) -> list[Diagnostic]:
    absent = [n for n in names if n not in tensors]
    here = [tensors[n] for n in names if n in tensors]
    one = expected.size == 1  # of a single number, the axes say nothing
    shaped = [t for t in here if t.shape != expected.shape and not (one and prod(t.shape) == 1)]
    typed = [t for t in here if t.dtype != expected.dtype]
    out = []
    if absent:
        best = shapes.nearest(absent[0])
        out.append(
            Diagnostic(
                "missing-tensor",
                f"the checkpoint has no tensor `{absent[0]}`{_more(absent)}",
                leaf.span,
                (f"rule: {rule}",),
                f"the nearest name is `{best}`" if best else "is this a checkpoint of another family?",
            )
        )
    if shaped:
        first = shaped[0]
        axes = ", ".join(str(a) for a in expected.axes)
        out.append(
            Diagnostic(
                "shape-mismatch",
                f"`{first.name}` has another shape than the rule expects{_more(shaped)}",
                leaf.span,
                (f"expected: [{axes}]", f"found:    {list(first.shape)}", f"rule: {rule}"),
                "check the pattern in `as`, the dims, and that config.json belongs to these shards",
            )
        )
    if typed:
        first = typed[0]
        out.append(
            Diagnostic(
                "dtype-mismatch",
                f"`{first.name}` has another dtype than the rule's other tensors{_more(typed)}",
                leaf.span,
                (f"expected: {expected.dtype}", f"found:    {first.dtype}", f"rule: {rule}"),
            )
        )
    return out


def _more(items: list[str] | list[SourceTensor]) -> str:
    return (
        f" (nor {len(items) - 1} others)"
        if len(items) > 1 and isinstance(items[0], str)
        else f" ({len(items)} tensors)"
        if len(items) > 1
        else ""
    )


class _Names:
    """Nearest names among tens of thousands: compared by their shape (digits as `#`), of which there are few."""

    def __init__(self, tensors: Iterable[str]) -> None:
        self.all, self.by_shape = tensors, dict[str, str]()

    def nearest(self, name: str) -> str | None:
        if not self.by_shape:
            for known in self.all:
                self.by_shape.setdefault(re.sub(r"\d+", "#", known), known)
        best = nearest(re.sub(r"\d+", "#", name), self.by_shape)
        if best is None:
            return None
        digits = iter(re.findall(r"\d+", name))
        filled = re.sub("#", lambda _: next(digits, "0"), best)
        return filled if filled in self.all else self.by_shape[best]

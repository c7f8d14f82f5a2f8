"""unproved: what neither headers nor the target can tell from a mistake, rule by rule.

A header gives names and shapes. Parts of equal size in another order, a square matrix the other way round, and tensors of
one shape in each other's places have the same. Only running the model tells.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ckptc.ir.graph import Apply, Graph, Leaf, Node, Target, leaves
from ckptc.ops.slicing import Slice
from ckptc.ops.sugar import Split


@dataclass(frozen=True, slots=True)
class Unproved:
    """One thing that is taken on trust."""

    rule: str  # as the mapping writes its target
    arrays: int
    tensor: str  # an example at the source
    reason: str


def unproved(graph: Graph) -> list[Unproved]:
    """In the order of the arrays; each reason of a rule once."""
    found: dict[tuple[str, str], list[tuple[Target, str]]] = defaultdict(list)
    for target in graph.targets:
        for leaf, reason in _reasons(target.node):
            found[target.rule, reason].append((target, leaf.tensors[0]))
    for target, leaf, other in _alike(graph):
        reason = f"of the shape of `{other}`: either may be the other"
        found[target.rule, reason].append((target, leaf.tensors[0]))
    return [
        Unproved(rule, len({t.path for t, _ in where}), where[0][1], reason) for (rule, reason), where in found.items()
    ]


def _reasons(node: Node) -> Iterator[tuple[Leaf, str]]:
    for leaf in dict.fromkeys(leaves(node)):
        sizes = defaultdict(list)
        for axis in leaf.each.axes:
            if axis.size > 1:
                sizes[axis.size].append(axis.name)
            if axis.name.startswith("("):
                yield leaf, f"the order within `{axis.name}`: no header shows it"
        for size, names in sizes.items():
            if len(names) > 1:
                yield leaf, f"the order of {' and '.join(f'`{n}`' for n in names)}, both of {size}"
    for op in _ops(node):
        if isinstance(op, Slice | Split):
            yield leaves(node)[0], "which part it is, of several that fit"


def _ops(node: Node) -> Iterator[object]:
    if isinstance(node, Apply):
        yield node.op
        for child in node.inputs:
            yield from _ops(child)


def _alike(graph: Graph) -> Iterator[tuple[Target, Leaf, str]]:
    """Tensors under one prefix, of one shape, that go to arrays of one shape: gate and up, key and value."""
    groups: dict[object, list[tuple[Target, Leaf]]] = defaultdict(list)
    for target in graph.targets:
        for leaf in leaves(target.node)[:1]:
            if len(leaf.each.axes) > 1:
                above = leaf.tensors[0].rsplit(".", 2)[0]
                groups[above, leaf.each.shape, target.type.shape].append((target, leaf))
    for members in groups.values():
        names = list(dict.fromkeys(leaf.tensors[0] for _, leaf in members))
        for target, leaf in members if len(names) > 1 else ():
            other = next(n for n in names if n != leaf.tensors[0])
            yield target, leaf, _last(other)


def _last(name: str) -> str:
    return ".".join(name.rsplit(".", 2)[-2:])

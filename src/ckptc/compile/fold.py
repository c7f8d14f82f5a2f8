"""fold: a chain of ops becomes index nests over source tensors.

Before: leaf [layer, (heads head_dim), embed] -> rearrange -> permute_rope -> scale 0.25 -> cast bfloat16.
After: one part, five loops, math (scale 0.25) (cast bfloat16): nothing is materialised between source and target, and any
box of the target can be traced to the byte ranges it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ckptc.ir.graph import Apply, Fill, Graph, Leaf, Node, leaves
from ckptc.ops.nest import AxisMap, Part, whole


@dataclass(frozen=True, slots=True)
class Folded:
    """The parts of one target array; `Part.source` numbers its leaves in order."""

    leaves: tuple[Leaf, ...]
    parts: tuple[Part, ...]


def fold(graph: Graph) -> tuple[Folded, ...]:
    """The parts of every target, in the graph's order: together they cover each array once."""
    out = []
    for target in graph.targets:
        numbers = iter(range(len(leaves(target.node))))
        parts = tuple(_fold(target.node, numbers))
        covered = sum(p.size for p in parts)
        assert covered == target.type.size, (
            f"{'/'.join(target.path)}: parts cover {covered} of {target.type.size} elements"
        )
        out.append(Folded(tuple(leaves(target.node)), parts))
    return tuple(out)


def _fold(node: Node, numbers: Iterator[int]) -> list[Part]:
    if isinstance(node, Leaf):
        return [leaf_part(node, next(numbers))]
    if isinstance(node, Fill):
        return [Part(None, 0, 0, tuple(whole(a.size, 0) for a in node.type.axes), (), float(node.value))]
    assert isinstance(node, Apply)
    return node.op.lower([_fold(child, numbers) for child in node.inputs], [child.type for child in node.inputs])


def leaf_part(leaf: Leaf, number: int) -> Part:
    """A leaf as it is: its grid counts tensors, its own axes count elements, both row-major unless a code says otherwise."""
    axes: list[AxisMap] = []
    step = prod(a.size for a in leaf.grid)
    for axis in leaf.grid:
        step //= axis.size
        axes.append(whole(axis.size, 0, step))
    if leaf.decoded:
        axes += leaf.decoded.code.place(leaf.each.shape)
        return Part(number, 0, 0, tuple(axes))
    step = leaf.each.size
    for axis in leaf.each.axes:
        step //= axis.size
        axes.append(whole(axis.size, step))
    return Part(number, 0, 0, tuple(axes))

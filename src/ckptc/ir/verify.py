"""What is true of every graph, checked after every pass. A failure is a bug in ckptc, not in the input."""

from __future__ import annotations

from math import prod

from ckptc.ir.graph import Apply, Fill, Graph, Leaf, Node


class VerifyError(AssertionError):
    """A pass broke the graph."""


def verify(graph: Graph, after: str) -> Graph:
    """The same graph. Raises VerifyError naming the pass and the array."""
    paths = [t.path for t in graph.targets]
    if paths != sorted(paths):
        raise VerifyError(f"after {after}: targets are not in the order of their paths")
    for target in graph.targets:
        if len(target.axes) not in (0, len(target.type.axes)):
            raise VerifyError(
                f"after {after}: {'/'.join(target.path)} has {len(target.axes)} logical axes for {target.type}"
            )
        _verify(target.node, f"after {after}: {'/'.join(target.path)}")
    return graph


def _verify(node: Node, where: str) -> None:
    if isinstance(node, Leaf):
        if len(node.tensors) != prod(a.size for a in node.grid):
            raise VerifyError(f"{where}: {len(node.tensors)} tensors for a grid of {[str(a) for a in node.grid]}")
        if any(a.size < 1 for a in node.type.axes):
            raise VerifyError(f"{where}: an empty axis in {node.type}")
        d = node.decoded
        if d and (d.code.stored(node.each.shape) != d.stored.shape or node.each.dtype != "float32"):
            raise VerifyError(f"{where}: {d.code.describe()} decodes {d.stored} to another type than {node.each}")
        if d and any(len(b.tensors) != len(node.tensors) for b in d.beside):
            raise VerifyError(f"{where}: other numbers of tensors of codes than beside them")
        return
    if isinstance(node, Fill):
        return
    assert isinstance(node, Apply)
    if node.op.arity is not None and len(node.inputs) != node.op.arity:
        raise VerifyError(f"{where}: {node.op.name} has {len(node.inputs)} inputs")
    for child in node.inputs:
        _verify(child, where)
    inferred = node.op.infer([child.type for child in node.inputs])
    if inferred != node.type:
        raise VerifyError(f"{where}: {node.op.describe()} gives {inferred}, the node says {node.type}")

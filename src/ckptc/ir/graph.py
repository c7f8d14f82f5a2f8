"""The typed graph: source tensors, ops, target arrays.

Types are on every node. Axes of stacking (layers, experts) are axes of a leaf: a leaf is a list of equally shaped tensors seen as one array
whose leading axes count them, so a stack of 12,000 experts is one node.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptc.diagnostics import Span
from ckptc.ops.base import Op
from ckptc.ops.codes import Code
from ckptc.ops.types import Axis, TensorType


@dataclass(frozen=True, slots=True)
class Beside:
    """Tensors beside those of a leaf, one for each."""

    tensors: tuple[str, ...]
    type: TensorType  # of one tensor


@dataclass(frozen=True, slots=True)
class Decoded:
    """How a leaf's tensors are stored, where that is not as numbers: the code, and what is beside the tensors of codes."""

    code: Code
    stored: TensorType  # one tensor of codes
    beside: tuple[Beside, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """Source tensors as one array: axes `grid` count them (row-major), then come the axes of each."""

    tensors: tuple[str, ...]
    grid: tuple[Axis, ...]
    each: TensorType  # one tensor, after decoding
    span: Span
    decoded: Decoded | None = None

    @property
    def type(self) -> TensorType:
        return self.each.with_axes((*self.grid, *self.each.axes))


@dataclass(frozen=True, slots=True)
class Fill:
    """No source: one value everywhere."""

    value: float
    type: TensorType
    span: Span


@dataclass(frozen=True, slots=True)
class Apply:
    """An op on nodes. `type` is what its shape and dtype rules gave."""

    op: Op
    inputs: tuple[Node, ...]
    type: TensorType
    span: Span


Node = Leaf | Fill | Apply


@dataclass(frozen=True, slots=True)
class Target:
    """One array of the tree that is written."""

    path: tuple[str, ...]  # as saved
    node: Node
    rule: str  # the rule's target as the mapping writes it, with its block's name: `decoder: mlp/wi_0/kernel`
    span: Span  # of the rule
    axes: tuple[str | None, ...] = ()  # logical axis names, one per axis
    partial: str | None = None  # why part of a source tensor is not converted
    layers: tuple[int, ...] = ()  # positions of the axes of stacked layers
    extra: bool = False  # whether the target itself need not have it
    steps: tuple[str, ...] = ()  # what is done, in the mapping's words with numbers, for people

    @property
    def type(self) -> TensorType:
        return self.node.type


@dataclass(frozen=True, slots=True)
class Ignored:
    """Patterns of source names that are left out, and why."""

    patterns: tuple[str, ...]
    shown: str  # for people: the pattern, or the template of several
    reason: str
    span: Span


@dataclass(frozen=True)
class Graph:
    targets: tuple[Target, ...]
    ignored: tuple[Ignored, ...]


def leaves(node: Node) -> list[Leaf]:
    """The leaves under a node, in order."""
    if isinstance(node, Leaf):
        return [node]
    return [leaf for child in node.inputs for leaf in leaves(child)] if isinstance(node, Apply) else []

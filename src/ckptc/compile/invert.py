"""invert: parts of the arrays that a conversion makes become parts of the tensors that it reads. Nothing is said twice.

Before: array [embed, layer=26, mlp] of one part, whose loops step through 26 tensors [mlp, embed], math (add 1) (cast
float32).
After: each of the 26 tensors is one part, whose loops step through the array from its layer's first element, math (add
-1) (cast bfloat16).

A part's loop moves an index of the array by a weight and a place in a tensor by a step. Seen from the tensor, weight
and step change sides: steps become weights along the tensor's axes, weights become steps through the array, both
row-major. Loops over tensors are fixed: they say where in the array a tensor begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from ckptc.compile.fold import Folded
from ckptc.ir.graph import Graph, Leaf, Target
from ckptc.ops.nest import AxisMap, Factor, Part, split_axis
from ckptc.plan.regions import strides

Math = tuple[tuple[str, float | str], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """What one forward part says of each of its tensors, but for where in the array the tensor begins.

    `parts` are parts of the tensor; `Part.source` is meaningless, `Part.base` counts from the tensor's own beginning
    in the array.
    """

    target: int  # position in `Graph.targets`
    math: Math  # forward
    parts: tuple[Part, ...]
    size: int  # elements


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, or some of it, as one array holds it."""

    template: Template
    offset: int  # elements from the array's first to where the template begins


@dataclass
class Inverted:
    """One tensor of the original: its type, and where its elements are."""

    name: str
    leaf: Leaf
    pieces: list[Piece]  # cover it, each element once
    twins: list[Piece]  # hold again what `pieces` hold
    partial: str | None = None  # why some of it is nowhere, where that is so


@dataclass(frozen=True, slots=True)
class Constant:
    """A region of an array that comes from no tensor."""

    target: int
    part: Part  # forward


def invert(graph: Graph, folded: Sequence[Folded]) -> tuple[dict[str, Inverted], list[Constant]]:
    """Every tensor that the rules read, by name, and every region of an array that comes from none.

    Where several arrays hold a tensor, or some of it, the first of them, in the order of their paths, is taken; the
    others are `twins`.
    """
    tensors: dict[str, Inverted] = {}
    constants = []
    for number, (target, fold) in enumerate(zip(graph.targets, folded, strict=True)):
        for part in fold.parts:
            if part.source is None:
                constants.append(Constant(number, part))
                continue
            leaf = fold.leaves[part.source]
            template = _template(number, target, leaf, part)
            for position, offset in _tensors(part, target.type.shape):
                name = leaf.tensors[position]
                found = tensors.setdefault(name, Inverted(name, leaf, [], []))
                found.pieces.append(Piece(template, offset))
                found.partial = found.partial or target.partial
    memo: dict[object, tuple[list[int], list[int]]] = {}
    for tensor in tensors.values():
        key = (tensor.leaf.each.shape, tuple(p.template for p in tensor.pieces))
        if key not in memo:
            memo[key] = _first_of_each(tensor.leaf.each.shape, [p.template for p in tensor.pieces])
        taken, twins = memo[key]
        tensor.pieces, tensor.twins = [tensor.pieces[i] for i in taken], [tensor.pieces[i] for i in twins]
    return tensors, constants


def _template(number: int, target: Target, leaf: Leaf, part: Part) -> Template:
    steps = strides(target.type.shape)
    loops = [
        Factor(f.size, f.step, f.weight * step)
        for axis, step in zip(part.axes, steps, strict=True)
        for f in axis.factors
        if f.tensor == 0 and f.size > 1
    ]
    flat = AxisMap(part.base, tuple(sorted(loops, key=lambda f: -f.weight)))
    parts = tuple(Part(0, base, 0, axes) for axes, base in _unflatten(flat, leaf.each.shape))
    return Template(number, part.math, parts, sum(p.size for p in parts))


def _unflatten(flat: AxisMap, shape: tuple[int, ...]) -> Iterator[tuple[tuple[AxisMap, ...], int]]:
    """A row-major index as one index along each axis of `shape`: maps, and what is added to the base.

    Loops are not joined, so that each goes on moving along the one axis of the array that it came from.
    """
    pieces: list[tuple[tuple[AxisMap, ...], AxisMap, int]] = [((), flat, 0)]
    for axis in range(len(shape)):
        inner = prod(shape[axis + 1 :])
        if inner == 1:
            pieces = [((*axes, rest), AxisMap(0, ()), base) for axes, rest, base in pieces]
        else:
            pieces = [
                ((*axes, outer), rest, base + added)
                for axes, whole, base in pieces
                for outer, rest, added, _ in split_axis(whole, inner, join=False)
            ]
    for axes, _, base in pieces:
        yield axes, base


def _tensors(part: Part, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The tensors a forward part reads: position in the leaf's list, and elements from the array's first to the
    tensor's first.
    """
    steps = strides(shape)
    start = sum(a.start * step for a, step in zip(part.axes, steps, strict=True))
    loops = [(f, step) for a, step in zip(part.axes, steps, strict=True) for f in a.factors if f.tensor]
    for at in product(*(range(f.size) for f, _ in loops)):
        position = part.first + sum(i * f.tensor for i, (f, _) in zip(at, loops, strict=True))
        yield position, start + sum(i * f.weight * step for i, (f, step) in zip(at, loops, strict=True))


def _first_of_each(shape: tuple[int, ...], templates: Sequence[Template]) -> tuple[list[int], list[int]]:
    """Positions of templates that hold each element once, and of those that hold some of the same elements again."""
    if len(templates) == 1:
        return [0], []
    taken, twins, boxes = [], [], list[tuple[frozenset[int], ...]]()
    for number, template in enumerate(templates):
        own = [tuple(_indices(a) for a in part.axes) for part in template.parts]
        if any(_meet(a, b) for a in own for b in boxes):
            twins.append(number)
        else:
            taken.append(number)
            boxes += own
    return taken, twins


def _indices(axis: AxisMap) -> frozenset[int]:
    out = {axis.start}
    for f in axis.factors:
        out = {i + k * f.weight for i in out for k in range(f.size)}
    return frozenset(out)


def _meet(a: Sequence[frozenset[int]], b: Sequence[frozenset[int]]) -> bool:
    """Whether two boxes of indices have an element in common."""
    return all(not x.isdisjoint(y) for x, y in zip(a, b, strict=True))

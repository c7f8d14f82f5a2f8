"""`rearrange`: transpose, split and fuse axes, as one pattern in named axes. Its inverse is the pattern swapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from msgspec.structs import replace

from ckptc.ops.base import Array, Op, Parts, one
from ckptc.ops.nest import AxisMap, Part, merge_axes, split_axis
from ckptc.ops.pattern import Group, show
from ckptc.ops.types import Axis, OpError, TensorType

SizedGroup = tuple[Axis, ...]


def fused(group: SizedGroup) -> Axis:
    """The axis a group makes: its own if it is alone, else an axis named like the group, `(heads head_dim)`."""
    if len(group) == 1:
        return group[0]
    return Axis(f"({' '.join(a.name for a in group)})" if group else "", prod(a.size for a in group))


@dataclass(frozen=True, slots=True)
class Rearrange(Op):
    """From the axes `left` to the axes `right`, both groups of the same sized names.

    Shape rule: input axis i has the size of left[i]; the output has those of `right`. The dtype stays. Exact.
    """

    left: tuple[SizedGroup, ...]
    right: tuple[SizedGroup, ...]
    name = "rearrange"

    def __post_init__(self) -> None:
        lefts, rights = [a for g in self.left for a in g], [a for g in self.right for a in g]
        for names in ([a.name for a in lefts], [a.name for a in rights]):
            if len(set(names)) < len(names):
                twice = " ".join(sorted({n for n in names if names.count(n) > 1}))
                raise OpError(f"an axis stands once on each side of a pattern; more often: {twice}")
        for here, there, side in ((lefts, rights, "left"), (rights, lefts, "right")):
            only = [a.name for a in here if a not in there]
            if only:
                raise OpError(f"every axis stands on both sides of a pattern; only on the {side}: {' '.join(only)}")

    def infer(self, inputs: Sequence[TensorType]) -> TensorType:
        input = one(inputs, self.name)
        if len(input.axes) != len(self.left):
            raise OpError(f"the pattern has {len(self.left)} axes, the input has {len(input.axes)}: {input}")
        for group, axis in zip(self.left, input.axes, strict=True):
            if fused(group).size != axis.size:
                raise OpError(
                    f"`{show(_names((group,)))}` is {fused(group).size}, the input's axis is {axis.size}: {input}"
                )
        return input.with_axes(tuple(fused(g) for g in self.right))

    def forward(self, arrays: Sequence[Array], inputs: Sequence[TensorType]) -> Array:
        atoms = [a for g in self.left for a in g]
        order = [atoms.index(a) for g in self.right for a in g]
        apart = np.reshape(arrays[0], [a.size for a in atoms])
        return np.ascontiguousarray(apart.transpose(order)).reshape([fused(g).size for g in self.right])

    def lower(self, parts: Sequence[Parts], inputs: Sequence[TensorType]) -> Parts:
        return [done for part in parts[0] for done in self._lower_one(part)]

    def _lower_one(self, part: Part) -> Parts:
        # Cut every input axis into its atoms (an axis that starts inside a row gives several parts), then fuse them in the new order.
        found: list[tuple[Part, dict[str, AxisMap]]] = [(part, {})]
        for group, axis in zip(self.left, part.axes, strict=True):
            found = [done for p, atoms in found for done in _split_group(p, atoms, group, axis)]
        out = []
        for p, atoms in found:
            axes = tuple(merge_axes(tuple(atoms[a.name] for a in g), tuple(a.size for a in g)) for g in self.right)
            out.append(replace(p, axes=axes))
        return out

    def describe(self) -> str:
        return f"{show(_names(self.left))} -> {show(_names(self.right))}"


def _names(groups: tuple[SizedGroup, ...]) -> tuple[Group, ...]:
    return tuple(tuple(a.name for a in g) for g in groups)


def _split_group(
    part: Part, atoms: dict[str, AxisMap], group: SizedGroup, axis: AxisMap
) -> list[tuple[Part, dict[str, AxisMap]]]:
    pieces = [(part, {**atoms}, axis)]
    for position, atom in enumerate(group):
        inner = prod(a.size for a in group[position + 1 :])
        if inner == 1:
            pieces = [(p, {**done, atom.name: rest}, AxisMap(0, ())) for p, done, rest in pieces]
            pieces = [
                (p, {**done, **{a.name: AxisMap(0, ()) for a in group[position + 1 :]}}, rest)
                for p, done, rest in pieces
            ]
            break
        pieces = [
            (replace(p, base=p.base + base, first=p.first + first), {**done, atom.name: outer}, rest_)
            for p, done, rest in pieces
            for outer, rest_, base, first in split_axis(rest, inner)
        ]
    return [(p, done) for p, done, _ in pieces]

"""One logical tensor on its way from what holds it at the source to the axes it has in the target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ckptc.diagnostics import Span
from ckptc.spec.halves.axes import Join, Names, flat, show
from ckptc.spec.halves.records import Holding
from ckptc.spec.halves.sides import Groups, Sides, differ

Step = tuple[dict[str, Any], Span, str]  # an op, where it comes from, and why
HEAD = "head_dim"  # the axis that a rotary embedding turns
ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th")


@dataclass
class Piece:
    """Where it comes from, its axes as stored and as they are now, and the ops so far."""

    source: Holding
    left: Groups
    right: Groups | None = None  # of the pattern; None: the axes stay
    steps: list[Step] = field(default_factory=list)
    current: Groups = ()

    def op(self, word: str, argument: Any, span: Span, reason: str = "") -> None:
        self.steps.append(({word: argument}, span, reason))

    def turn(self, goal: Groups, span: Span) -> None:
        """Brings the axes into the order of `goal`: by the pattern itself while nothing was done before it."""
        if self.current == goal:
            return
        if self.right is None and not self.steps:
            self.right = goal
        else:
            self.op("rearrange", f"{show(self.current)} -> {show(goal)}", span)
        self.current = goal

    @property
    def pattern(self) -> str:
        return show(self.left) + (f" -> {show(self.right)}" if self.right is not None else "")


class Pieces:
    """Makes them. `dims`: the lengths of what lies side by side, as they are needed."""

    def __init__(self, sides: Sides) -> None:
        self.sides = sides
        self.dims: dict[str, str] = {}

    def whole(self, source: Holding, target: Holding) -> Piece:
        """Several tensors that lie alike on both sides: nothing is taken apart."""
        name = self._joint_name(source)
        piece = self._begin(source, source.axes.joined(name))
        right = self.sides.stacked(source, target.axes.joined(name))
        for n, logical in enumerate(target.names):
            self.sides.check_axes(logical, source, target, source.axes.of(n), target.axes.of(n))
        piece.turn(right, target.span("as"))
        return piece

    def one(self, source: Holding, target: Holding, position: int, goal: Groups | None) -> Piece:
        """The target's tensor of that position. `goal`: its axes, where the target joins it to others."""
        name = target.names[position]
        theirs = target.axes.of(position) if goal is None else goal
        here = source.names.index(name)
        same: dict[str, str] = target.get("same") or {}  # axes of one size, under the holding's condition
        own = tuple(tuple(same.get(n, n) for n in g) for g in source.axes.of(here))
        own, right = self.sides.grain(own, self.sides.stacked(source, theirs))
        if not same:
            self.sides.check_axes(name, source, target, own, right)
        if len(source.names) == 1:
            piece = self._begin(source, own)
        elif isinstance(source.axes.join, Join):
            piece = self._cut(source, here)
        else:
            piece = self._count(source, here, own)
        self._shape(piece, target, name, right)
        self._arithmetic(piece, target, name)
        return piece

    def _begin(self, source: Holding, left: Groups) -> Piece:
        piece = Piece(source, left, current=left)
        for op in source.get("ops") or ():
            piece.op(*_only(op), source.span("ops"), "as its holding says")
        return piece

    def _cut(self, source: Holding, here: int) -> Piece:
        """One of several that lie one after the other."""
        join = source.axes.join
        assert isinstance(join, Join)
        name, span = self._joint_name(source), source.span("as")
        piece = self._begin(source, source.axes.joined(name))
        single = tuple((n,) for n in flat(piece.current))
        piece.turn(single, span)
        own = join.parts[here]
        begin = " + ".join(_product(p) for p in join.parts[:here]) or 0
        end = f"{begin} + {_product(own)}" if begin else _product(own)
        piece.op("slice", {name: [begin, end] if own else begin}, span, _reason(source, here))
        if own:
            piece.op("reshape_heads", {name: " ".join(own)}, span)
        at = single.index((name,))
        piece.current = (*single[:at], *((n,) for n in own), *single[at + 1 :])
        return piece

    def _count(self, source: Holding, here: int, own: Groups) -> Piece:
        """One of several of the same shape."""
        number = str(len(source.names))
        piece = self._begin(source, source.axes.joined(number))
        piece.turn(((number,), *own), source.span("as"))
        piece.op("slice", {number: here}, source.span("as"), _reason(source, here))
        piece.current = own
        return piece

    def _shape(self, piece: Piece, target: Holding, name: str, right: Groups) -> None:
        """Axes in the target's order, and heads that turn as they turn there."""
        source, there = self.sides.source.label, self.sides.target.label
        a, b = self.sides.both("rotary", name, piece.source, target)
        if a == b:
            piece.turn(right, target.span("as"))
            return
        span = self.sides.said("rotary", name, self.sides.target).span
        reason = f"{source} rotates {a}, {there} {b}"
        single = tuple((n,) for n in flat(right))
        if (HEAD,) not in single:
            raise differ(span, f"{reason}, and `{name}` has no axis `{HEAD}`")
        if {a, b} != {"halves", "pairs"}:
            raise differ(span, f"`{name}` rotates `{a}` here and `{b}` there; there are `halves` and `pairs`")
        if a == "halves":
            piece.turn(right if len(single) == len(right) else single, target.span("as"))
            piece.op("permute_rope", HEAD, span, reason)
            piece.turn(right, target.span("as"))
        else:
            half = f"half_{HEAD}"
            self.dims[half] = f"{HEAD} // 2"
            piece.turn(single, target.span("as"))
            pairs = tuple((half, "2") if g == (HEAD,) else g for g in single)
            halves = tuple(tuple(m for n in g for m in (("2", half) if n == HEAD else (n,))) for g in right)
            piece.op("rearrange", f"{show(pairs)} -> {show(halves)}", span, reason)
            piece.current = right

    def _arithmetic(self, piece: Piece, target: Holding, name: str) -> None:
        source, there = self.sides.source.label, self.sides.target.label
        a, b = self.sides.both("times", name, piece.source, target)
        if str(a) != str(b):
            factor = str(b) if str(a) == "1" else f"1 / ({a})" if str(b) == "1" else f"({b}) / ({a})"
            span = self.sides.said("times", name, self.sides.target).span
            piece.op("scale", factor, span, f"{source} holds it times {a}, {there} times {b}")
        a, b = self.sides.both("norm", name, piece.source, target)
        if a != b:
            span = self.sides.said("norm", name, self.sides.target).span
            if {a, b} != {"w", "1 + w"}:
                raise differ(span, f"`{name}` multiplies by `{a}` here and `{b}` there; there are `w` and `1 + w`")
            reason = f"the norm multiplies by {a} of what {source} holds, by {b} of what {there} holds"
            piece.op("add", 1 if a == "1 + w" else -1, span, reason)

    # Side by side

    def _joint_name(self, holding: Holding) -> str:
        """What the axis along which several tensors lie is called: a dim for its length, or their number."""
        join = holding.axes.join
        if not isinstance(join, Join):
            return str(join)
        name = "_".join(holding.names)
        self.dims[name] = " + ".join(_product(p) for p in join.parts)
        return name

    def joined(self, target: Holding) -> tuple[list[Groups], list[Step]]:
        """For each tensor of those that the target holds as one the axes to bring it to, and the ops that join them."""
        axes, span, join = target.axes, target.span("as"), target.axes.join
        reason = f"{self.sides.target.label} holds {', '.join(target.names)} as one"
        if not isinstance(join, Join):  # on a new axis, which is then brought to its place
            name = "_".join(target.names)
            goal = tuple(tuple(name if n == str(join) else n for n in g) for g in axes.joined(str(join)))
            each = tuple((n,) for n in flat(axes.of(0)))
            steps: list[Step] = [({"stack": name}, span, reason)]
            return [each] * len(target.names), steps + _turned(((name,), *each), goal, span)
        heads, common = _common(join)
        if max(map(len, heads)) > 1 or (any(heads) and not all(heads)):
            raise differ(span, "tensors are joined along one axis, and these differ in more than one")
        if not any(heads):
            heads, common = [common[:1]] * len(heads), common[1:]
        whole, along = axes.joined("*"), heads[0][0]

        def put(names: Names) -> Groups:
            return tuple(tuple(m for n in g for m in (names if n == "*" else (n,))) for g in whole)

        each_of = [tuple((n,) for n in flat(put((*head, *common)))) for head in heads]
        goal = put((along, *common))
        steps = [({"concat": along}, span, reason)]
        return list(each_of), steps + _turned(tuple((n,) for n in flat(goal)), goal, span)


def one_dtype(pieces: list[Piece], span: Span) -> None:
    """What is joined is of one type, and arithmetic is in float32."""
    computed = [any(word in ("scale", "add") for op, _, _ in p.steps for word in op) for p in pieces]
    for piece, done in zip(pieces, computed, strict=True):
        if any(computed) and not done:
            piece.op("cast", "float32", span, "as what it is joined to")


def _common(join: Join) -> tuple[list[Names], Names]:
    """The parts without the last axes that all of them have, and those."""
    n = 0
    while all(len(p) > n for p in join.parts) and len({p[-1 - n] for p in join.parts}) == 1:
        n += 1
    return [p[: len(p) - n] for p in join.parts], join.parts[0][len(join.parts[0]) - n :]


def _turned(current: Groups, goal: Groups, span: Span) -> list[Step]:
    return [] if current == goal else [({"rearrange": f"{show(current)} -> {show(goal)}"}, span, "")]


def _reason(source: Holding, here: int) -> str:
    return f"`{source.names[here]}` is the {ORDINALS[here]} of {', '.join(source.names)} in one tensor"


def _only(op: dict[str, Any]) -> tuple[str, Any]:
    ((word, argument),) = op.items()
    return word, argument


def _product(names: Names) -> str:
    return " * ".join(names) or "1"

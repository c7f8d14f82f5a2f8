"""From two halves to the rule of each array: what differs between them becomes ops, each with its reason.

For one logical tensor, in this order: take it out of what it lies in, bring its axes into the target's order, turn its
rotary halves into pairs, multiply, add, lengthen. Where the target holds several as one, that is done for each, and they are
joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckptc.diagnostics import Diagnostic, InputError, Span
from ckptc.spec.halves.axes import Names, flat
from ckptc.spec.halves.pieces import Piece, Pieces, Step, one_dtype
from ckptc.spec.halves.records import Half, Holding, Said
from ckptc.spec.halves.sides import Sides, differ

Where = tuple[str | int, ...]


@dataclass
class Rule:
    """An explicit rule, with the places of its keys and the reasons of its ops, by their paths in it."""

    holding: Holding  # of the target
    data: dict[str, Any] = field(default_factory=dict)
    spans: dict[Where, Span] = field(default_factory=dict)
    reasons: dict[Where, str] = field(default_factory=dict)


class Derivation:
    """The rules that lead from one half to the other. `axes`: those that the family says are made of others."""

    def __init__(self, source: Half, target: Half, axes: Mapping[str, Names]) -> None:
        self.source, self.target = source, target
        self.sides = Sides(source, target, axes)
        self.pieces = Pieces(self.sides)
        self.used: set[tuple[int, str]] = set()  # of the source's holdings, each tensor

    def rules(self) -> list[Rule]:
        """Of every array of the target. Raises InputError with all that the halves do not agree on."""
        out: list[Rule] = []
        problems: list[Diagnostic] = []
        for target in self.target.holdings():
            try:
                out += [self._rule(target, sources) for sources in self._sources(target)]
            except InputError as error:
                problems += error.diagnostics
        problems += self._left_over()
        if problems:
            raise InputError(dict.fromkeys(problems))
        return out

    def _sources(self, target: Holding) -> list[tuple[Holding, ...]]:
        """For each way in which the source holds them, what holds each of the target's tensors."""
        held = [self._held(name, target) for name in target.names]
        return [tuple(one if one in others else others[0] for others in held) for one in held[0]]

    def _held(self, name: str, target: Holding) -> list[Holding]:
        held = self.source.held(name)
        if not held:
            raise differ(
                target.key,
                f"{self.target.label} holds `{name}`, and {self.source.label} says nowhere where it is",
                (("the source's half", self.source.span),),
                "say under `hub` where the checkpoint has it, or run as a block without it",
            )
        self.used |= {(id(h), name) for h in held}
        return held

    def _left_over(self) -> list[Diagnostic]:
        """What only the source holds. A copy of the embedding needs no place in the target: it is left out where it is one."""
        return [
            d
            for held in self.source.holdings()
            for name in held.names
            if (id(held), name) not in self.used and "tied" not in held.given
            for d in differ(
                held.key,
                f"{self.source.label} holds `{name}`, which {self.target.label} does not have",
                (("the target's tree", self.target.span),),
                "run as a block that has it, or `ignore` the tensor with a reason instead",
            ).diagnostics
        ]

    def _rule(self, target: Holding, sources: tuple[Holding, ...]) -> Rule:
        joining: list[Step] = []
        if self._alike(target, sources):
            pieces = [self.pieces.whole(sources[0], target)]
        elif len(sources) == 1:
            pieces = [self.pieces.one(sources[0], target, 0, None)]
        else:
            goals, joining = self.pieces.joined(target)
            pieces = [self.pieces.one(s, target, n, goals[n]) for n, s in enumerate(sources)]
            one_dtype(pieces, target.span("as"))
        rule = Rule(target)
        self._conditions(rule, target, sources)
        self._write(rule, pieces, joining)
        self._sizes(rule, target)
        dtype = next((s for n in target.names if (s := self.target.convention("dtype", self.sides.tensor(n)))), None)
        said = {**({"dtype": dtype} if dtype else {}), **sources[0].given, **target.given}
        for word in ("dtype", "collection", "axis", "axes", "partial"):
            if word in said:
                rule.data[word], rule.spans[(word,)] = said[word].value, said[word].span
        return rule

    def _alike(self, target: Holding, sources: tuple[Holding, ...]) -> bool:
        """Whether both sides hold the same several tensors side by side in the same way."""
        first = sources[0]
        return (
            len(sources) > 1
            and first.names == target.names
            and all(s is first for s in sources)
            and first.axes.join == target.axes.join
            and all(self.sides.alike(n, first, target) for n in target.names)
        )

    def _conditions(self, rule: Rule, target: Holding, sources: tuple[Holding, ...]) -> None:
        found = [h.given["when"] for h in (*sources, target) if "when" in h.given]
        for half in (self.source, self.target):
            stated = (half.convention("when", self.sides.tensor(name)) for name in target.names)
            found += [said for said in stated if said]
        texts = list(dict.fromkeys(str(s.value) for s in found))
        tied: Said | None = next((s.given["tied"] for s in sources if "tied" in s.given), None)
        if tied is not None and tied.value is not False:
            found.append(tied)
            texts.append(_negated(str(tied.value)))
        if texts:
            rule.data["when"] = both(texts)
            rule.spans[("when",)] = found[0].span

    def _write(self, rule: Rule, pieces: list[Piece], joining: list[Step]) -> None:
        """Fills in `from`, `as`, `stack` and `ops`."""
        parts: list[dict[str, Any]] = []
        for n, piece in enumerate(pieces):
            at: Where = () if len(pieces) == 1 else ("from", n)
            pattern = piece.source.span("as")
            also = (*pattern.also, (f"{self.target.label} has it as", rule.holding.span("as")))
            rule.spans[(*at, "from")] = piece.source.name.span
            rule.spans[(*at, "as")] = replace(pattern, also=also)
            part = {"from": piece.source.name.value, "as": piece.pattern}
            parts.append(part | self._ops(rule, piece.steps, at))
        if len(parts) == 1:
            rule.data |= parts[0]
        else:
            rule.data |= {"from": parts} | self._ops(rule, joining, ())
        stack = next((p.source.given["stack"] for p in pieces if "stack" in p.source.given), None)
        if stack is not None:
            rule.data["stack"], rule.spans[("stack",)] = dict(stack.value), stack.span

    def _ops(self, rule: Rule, steps: list[Step], at: Where) -> dict[str, Any]:
        for n, (op, span, reason) in enumerate(steps):
            (word,) = op
            rule.spans[(*at, "ops", n)] = rule.spans[(*at, "ops", n, word)] = span
            if reason:
                rule.reasons[(*at, "ops", n, word)] = reason
        return {"ops": [op for op, _, _ in steps]} if steps else {}

    def _sizes(self, rule: Rule, target: Holding) -> None:
        """Axes that the target has longer."""
        axes = flat(target.axes.of(0))
        ops = rule.data.get("ops", [])
        for axis, (word, said) in self.target.sizes.items():
            if axis in axes:
                at: Where = ("ops", len(ops), word)
                ops = [*ops, {word: {axis: said.value}}]
                rule.spans[at], rule.reasons[at] = said.span, f"{self.target.label} has {said.value} of `{axis}`"
        if ops:
            rule.data["ops"] = ops


def both(conditions: list[str]) -> str:
    """One expression that holds where all do."""
    return conditions[0] if len(conditions) == 1 else " and ".join(f"({c})" for c in conditions)


def _negated(condition: str) -> str:
    loose = any(word in condition for word in (" and ", " or ", " if "))
    return f"not ({condition})" if loose else f"not {condition}"

"""Names in scope while a mapping is expanded: evaluation of loops, conditions, templates and patterns, with errors at their place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

from ckptc.diagnostics import Diagnostic, InputError, Span, did_you_mean
from ckptc.ops.pattern import Group, Pattern, PatternError, parse_pattern
from ckptc.ops.rearrange import SizedGroup
from ckptc.ops.types import Axis
from ckptc.spec.document import Document, Path_
from ckptc.spec.expressions import ExpressionError, Key, Meter, TooManySteps, evaluate, render
from ckptc.spec.mapping import LoopOver, Value

Names = dict[str, Any]

NAMES_MOST = 20_000_000  # that all of these points know together, dims and all: the largest models have 5 million
POINTS_MOST = 150_000  # that loops and stacks may have in all: the largest models have some 70,000 tensors


def matches(name: str, *patterns: str) -> bool:
    """Whether `name` fits one of the patterns, in which `*` stands for any run of characters."""
    return _compiled(patterns).fullmatch(name) is not None


@lru_cache(maxsize=1024)
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(_expression, patterns)), re.DOTALL)


def _expression(pattern: str) -> str:
    """A pattern as a regular expression. What stands between two stars is taken at the first place that has it, for good
    (an atomic group): a later place would not help, and trying all of them takes time exponential in the stars.
    """
    first, *rest = map(re.escape, pattern.split("*"))
    if not rest:
        return first
    *middle, last = rest
    return first + "".join(f"(?>.*?{text})" for text in middle if text) + ".*" + last


class _Budget:
    """What an expansion may take: points of loops and stacks, and steps of all that is evaluated at them."""

    def __init__(self) -> None:
        self.points = POINTS_MOST
        self.names = NAMES_MOST
        self.meter = Meter()


class Scope:
    """The mapping's document and the values of dims; raises InputError for what fails, at `where` in the YAML."""

    def __init__(self, document: Document, dims: Mapping[str, Any], budget: _Budget | None = None) -> None:
        self.document, self.dims = document, dims
        self._budget = budget or _Budget()

    def resized(self, dims: Mapping[str, Any]) -> Scope:
        """The scope in which `dims` have other values."""
        return Scope(self.document, {**self.dims, **dims}, self._budget) if dims else self

    def span(self, where: Path_) -> Span:
        return self.document.span(where)

    def with_reason(self, step: str, where: Path_) -> str:
        """What is done, and why, where it was derived."""
        reason = self.document.reasons.get(where)
        return f"{step} ({reason})" if reason else step

    def error(
        self,
        where: Path_,
        message: str,
        code: str = "invalid-expression",
        notes: Sequence[str] = (),
        help: str | None = None,
    ) -> InputError:
        return InputError([Diagnostic(code, message, self.document.span(where), tuple(notes), help)])

    def value(self, expression: Value, names: Names, where: Path_) -> Any:
        """A number as it is, text as an expression."""
        if not isinstance(expression, str):
            return expression
        try:
            return evaluate(expression, names, self._budget.meter)
        except TooManySteps:
            raise self._too_many(where) from None
        except ExpressionError as error:
            raise self.error(where, str(error), notes=(f"expression: {expression}",)) from None

    def holds(self, condition: Value | None, names: Names, where: Path_) -> bool:
        return condition is None or bool(self.value(condition, names, (*where, "when")))

    def text(self, template: str, names: Names, where: Path_) -> str:
        try:
            return render(template, names, self._budget.meter)
        except TooManySteps:
            raise self._too_many(where) from None
        except ExpressionError as error:
            raise self.error(where, str(error), "invalid-template", notes=(f"template: {template}",)) from None

    def integer(self, expression: Value, names: Names, where: Path_) -> int:
        value = self.value(expression, names, where)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(where, f"`{expression}` is {value!r}, a whole number is needed")
        return value

    def span_of(self, over: LoopOver, names: Names, where: Path_) -> Sequence[Any]:
        """What a loop or stacking variable ranges over."""
        if isinstance(over, dict):
            return [Key(k, v, i) for i, (k, v) in enumerate(over.items())]
        if isinstance(over, list):
            return over
        value = self.value(over, names, where)
        if isinstance(value, int) and not isinstance(value, bool):
            return range(min(value, POINTS_MOST + 1))  # more is refused where it is counted
        if isinstance(value, range | list | tuple):
            return value
        raise self.error(where, f"`{over}` is {value!r}, a count, a range or a list is needed")

    def loops(self, loop: Mapping[str, LoopOver], names: Names, where: Path_) -> Iterator[Names]:
        """Every combination of the loop variables, outermost slowest; later ones may use earlier ones."""
        if not loop:
            yield names
            return
        (variable, over), *rest = loop.items()
        for value in self.span_of(over, names, (*where, "for", variable)):
            self._spend(1, len(names), (*where, "for", variable))
            yield from self.loops(dict(rest), {**names, variable: value}, where)

    def stack(self, stack: Mapping[str, Value], names: Names, where: Path_) -> tuple[tuple[Axis, ...], list[Names]]:
        """The stacking axes, and the names at each point of their grid, row-major. An empty stack is one point."""
        ranges = {v: self.span_of(over, names, (*where, "stack", v)) for v, over in stack.items()}
        axes = tuple(Axis(v, len(r)) for v, r in ranges.items())
        self._spend(prod(a.size for a in axes), len(names), (*where, "stack"))
        return axes, [{**names, **dict(zip(ranges, point, strict=True))} for point in product(*ranges.values())]

    def _spend(self, points: int, names: int, where: Path_) -> None:
        """Raises `too-large` when loops and stacks have more points than a model has tensors."""
        budget = self._budget
        if points > budget.points or points * names > budget.names:
            few = points <= budget.points
            raise self.error(
                where,
                f"loops and stacks have more than {POINTS_MOST} points" + (f", for {names} names" if few else ""),
                "too-large",
                help="check the numbers of layers and experts in config.json, and --set",
            )
        budget.points -= points
        budget.names -= points * names

    def _too_many(self, where: Path_) -> InputError:
        return self.error(
            where,
            f"going through loops and stacks takes more than {self._budget.meter.most} steps",
            "too-large",
            help="check the numbers of layers and experts in config.json, and that expressions are not longer than "
            "they need to be",
        )

    def pattern(self, text: str, where: Path_) -> Pattern:
        try:
            return parse_pattern(text)
        except PatternError as error:
            span = self.document.within(where, error.at, error.length)
            raise InputError([Diagnostic("invalid-pattern", str(error), span)]) from None

    def groups(
        self, groups: Sequence[Group], known: Mapping[str, int], text: str, where: Path_
    ) -> tuple[SizedGroup, ...]:
        """The groups with sizes, from `known` axes and from dims. Raises InputError `unknown-dim` at the name."""
        return tuple(tuple(Axis(n, self.size(n, known, text, where)) for n in group) for group in groups)

    def size(self, name: str, known: Mapping[str, int], text: str, where: Path_) -> int:
        if name in known:
            return known[name]
        if name.isdigit():
            return int(name)
        value = self.dims.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        match = re.search(rf"\b{re.escape(name)}\b", text)
        span = self.document.within(where, match.start(), len(name)) if match else self.document.span(where)
        if name in self.dims:
            raise InputError(
                [
                    Diagnostic(
                        "invalid-pattern",
                        f"dim `{name}` is {value!r}, which is not the size of an axis",
                        span,
                    )
                ]
            )
        known_names = [*known, *(d for d, v in self.dims.items() if isinstance(v, int))]
        raise InputError(
            [
                Diagnostic(
                    "unknown-dim",
                    f"there is no dim `{name}`",
                    span,
                    (f"dims: {', '.join(known_names)}",),
                    did_you_mean(name, known_names),
                )
            ]
        )

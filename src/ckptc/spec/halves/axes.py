"""The axes of a stored tensor that may hold several logical ones: `(heads head_dim | kv_heads head_dim) embed`.

The notation is that of `ckptc.ops.pattern`, with parentheses that nest, and one thing more: where several logical tensors
lie in one, exactly one place of the pattern says how.

    (a | b) embed     one after the other along an axis, each of its own length
    (2 mlp) embed     two, one after the other; (mlp 2): alternating; 2 mlp embed: on an axis of their own
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(r"\s*([()|]|[a-z][a-z0-9_]*|[1-9][0-9]{0,3}(?![0-9a-z_]))")

Names = tuple[str, ...]


class AxesError(ValueError):
    """A pattern that does not parse; `at` is the offending character's position, `length` how many to underline."""

    def __init__(self, message: str, at: int = 0, length: int = 1) -> None:
        super().__init__(message)
        self.at, self.length = at, length


@dataclass(frozen=True, slots=True)
class Join:
    """Logical tensors one after the other along (a part of) an axis: the axes that each has there."""

    parts: tuple[Names, ...]


Axis = tuple["str | Join", ...]  # what is fused into one axis, slowest first; () has size 1


@dataclass(frozen=True, slots=True)
class Axes:
    """The axes of one stored tensor that holds `count` logical ones."""

    axes: tuple[Axis, ...]
    count: int

    @property
    def join(self) -> str | Join | None:
        """Where several tensors meet: a Join, or the number that counts them. None for one tensor."""
        if self.count == 1:
            return None
        return next(i for axis in self.axes for i in axis if isinstance(i, Join) or i == str(self.count))

    def of(self, position: int) -> tuple[Names, ...]:
        """The axes of one of the tensors by itself. An axis that only counts tensors is not one of its axes."""
        join = self.join
        out: list[Names] = []
        for axis in self.axes:
            own: list[str] = []
            for item in axis:
                if isinstance(item, Join):
                    own += item.parts[position]
                elif item != join:
                    own.append(item)
            if own or axis != (join,):
                out.append(tuple(own))
        return tuple(out)

    def joined(self, name: str) -> tuple[Names, ...]:
        """The axes of the whole, with `name` where the tensors meet."""
        join = self.join
        return tuple(tuple(name if i == join else str(i) for i in axis) for axis in self.axes)


def parse(text: str, count: int) -> Axes:
    """The axes of a tensor that holds `count` logical ones. Raises AxesError with the position."""
    tokens: list[tuple[str, int]] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            at = position + len(text[position:]) - len(text[position:].lstrip())
            raise AxesError("axes are names, whole numbers, parentheses and `|`", at)
        tokens.append((match.group(1), match.start(1)))
        position = match.end()
    axes: list[Axis] = []
    while tokens:
        token, at = tokens.pop(0)
        if token == "(":
            axes.append(_group(tokens, at))
        elif token in ")|":
            raise AxesError(f"`{token}` outside parentheses", at)
        else:
            axes.append(() if token == "1" else (token,))
    out = Axes(tuple(axes), count)
    _check(out, text)
    return out


def _group(tokens: list[tuple[str, int]], opened: int) -> Axis:
    """The items up to the closing parenthesis. One that holds `|` is a Join; one without is as if it were not there."""
    parts: list[list[str | Join]] = [[]]
    while tokens:
        token, at = tokens.pop(0)
        if token == "(":
            parts[-1] += _group(tokens, at)
        elif token == "|":
            parts.append([])
        elif token != ")":
            parts[-1] += [] if token == "1" else [token]
        elif len(parts) == 1:
            return tuple(parts[0])
        elif any(isinstance(i, Join) for part in parts for i in part):
            raise AxesError("`|` within `|`", opened)
        else:
            return (Join(tuple(tuple(str(i) for i in part) for part in parts)),)
    raise AxesError("`(` is never closed", opened)


def _check(axes: Axes, text: str) -> None:
    items = [i for axis in axes.axes for i in axis]
    joins = [i for i in items if isinstance(i, Join)]
    counts = [i for i in items if axes.count > 1 and i == str(axes.count)]
    for join in joins:
        if axes.count == 1 or len(join.parts) != axes.count:
            found = f"{axes.count} logical tensor{'s' if axes.count > 1 else ''}"
            raise AxesError(f"{len(join.parts)} parts for {found}", max(0, text.find("|")))
    if axes.count > 1 and len(joins) + len(counts) != 1:
        what = "says nowhere how they lie" if not joins and not counts else "says twice how they lie"
        raise AxesError(
            f"holds {axes.count} logical tensors and {what}: `( … | … )`, or the number {axes.count}", 0, len(text)
        )
    for position in range(axes.count):
        own = [n for axis in axes.of(position) for n in axis]
        twice = next((n for n in own if own.count(n) > 1), None)
        if twice:
            at = [m.start() for m in re.finditer(rf"\b{twice}\b", text)]
            raise AxesError(f"`{twice}` stands twice among the axes of one tensor", at[-1], len(twice))


def show(axes: tuple[Names, ...]) -> str:
    """The text of a pattern's side."""
    return " ".join("1" if not a else a[0] if len(a) == 1 else f"({' '.join(a)})" for a in axes)


def flat(axes: tuple[Names, ...]) -> Names:
    """Every name, in order."""
    return tuple(n for axis in axes for n in axis)

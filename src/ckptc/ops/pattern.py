"""Patterns such as `(heads head_dim) embed -> embed heads head_dim`: axes by name, grouped where they are fused.

A whole number is an axis of that size, and its own name: `(2 mlp) embed -> 2 embed mlp`. `1` is an axis of nothing.

Parsing knows no sizes; `ckptc.ops.rearrange` adds them. The notation is that of einops: https://einops.rocks/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptc.ops.types import OpError

Group = tuple[str, ...]  # names fused into one axis, slowest first; () is an anonymous axis of size 1

_TOKEN = re.compile(r"\s*(->|[()]|[a-z][a-z0-9_]*|[1-9][0-9]{0,3}(?![0-9a-z_]))")


@dataclass(frozen=True, slots=True)
class Pattern:
    """`right` is None where the pattern has no arrow: the axes stay as they are."""

    left: tuple[Group, ...]
    right: tuple[Group, ...] | None

    def names(self) -> list[str]:
        """Every name of the left side, in order, then those only the right side has."""
        sides = [*self.left, *(self.right or ())]
        return list(dict.fromkeys(name for group in sides for name in group))


class PatternError(OpError):
    """A pattern that does not parse; `at` is the offending character's position, `length` how many to underline."""

    def __init__(self, message: str, at: int, length: int = 1) -> None:
        super().__init__(message)
        self.at, self.length = at, length


def parse_pattern(text: str) -> Pattern:
    """Parse one or two sides. Raises PatternError with the position."""
    sides: list[list[Group]] = [[]]
    group: list[str] | None = None
    opened, position, end = 0, 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            at = position + len(text[position:]) - len(text[position:].lstrip())
            raise PatternError("a pattern has names, whole numbers, parentheses and one `->`", at)
        token, at, position = match.group(1), match.start(1), match.end()
        if token == "->":
            if len(sides) == 2 or group is not None:
                raise PatternError("one `->`, outside parentheses", at, 2)
            sides.append([])
        elif token == "(":
            if group is not None:
                raise PatternError("parentheses do not nest", at)
            group, opened = [], at
        elif token == ")":
            if group is None:
                raise PatternError("`)` without `(`", at)
            sides[-1].append(tuple(group))
            group = None
        elif token == "1":
            if group is None:
                sides[-1].append(())
        elif any(token in g for g in sides[-1]) or token in (group or ()):
            raise PatternError(f"`{token}` stands twice on one side", at, len(token))
        elif group is not None:
            group.append(token)
        else:
            sides[-1].append((token,))
    if group is not None:
        raise PatternError("`(` is never closed", opened)
    return Pattern(tuple(sides[0]), tuple(sides[1]) if len(sides) == 2 else None)


def show(groups: tuple[Group, ...]) -> str:
    """The text of one side."""
    return " ".join("1" if not g else g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)

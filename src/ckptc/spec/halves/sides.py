"""Where the two halves must agree: on conventions, and on the axes of each logical tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptc.diagnostics import Diagnostic, InputError, Span
from ckptc.spec.halves.axes import Names, flat
from ckptc.spec.halves.records import Half, Holding, Said
from ckptc.spec.halves.vocabulary import Logical

Groups = tuple[Names, ...]


def differ(
    span: Span,
    message: str,
    also: Sequence[tuple[str, Span]] = (),
    help: str | None = None,
    notes: tuple[str, ...] = (),
) -> InputError:
    """`halves-differ`, at a place in one half, with the place in the other."""
    return InputError([Diagnostic("halves-differ", message, replace(span, also=(*span.also, *also)), notes, help)])


@dataclass
class Sides:
    """Both halves, and the axes that are made of others."""

    source: Half
    target: Half
    made_of: Mapping[str, Names]

    def tensor(self, name: str) -> Logical:
        return self.target.vocabulary.tensors[name]

    def said(self, word: str, name: str, half: Half) -> Said:
        """What a half says, which is known to say it."""
        said = half.convention(word, self.tensor(name))
        assert said is not None
        return said

    def both(self, word: str, name: str, source: Holding, target: Holding) -> tuple[Any, Any]:
        """What either side says by a convention; None twice where it concerns neither.

        Raises `halves-differ` where one says nothing: nothing has a silent default.
        """
        tensor = self.tensor(name)
        a, b = self.source.convention(word, tensor), self.target.convention(word, tensor)
        if a is not None and b is not None:
            return a.value, b.value
        if a is None and b is None:
            if word not in tensor.says:
                return None, None
            raise differ(
                source.key,
                f"`{name}` has `{word}`, and neither side says which",
                ((f"{self.target.label} holds it here", target.key),),
                f"say `{word}` on both sides",
            )
        silent, holding, said = (self.target, target, a) if a is not None else (self.source, source, b)
        assert said is not None
        raise differ(
            holding.key,
            f"{silent.label} does not say `{word}` of `{name}`, and the other side does",
            (("it is said here", said.span),),
            f"say it here, too: `{word}: {{ …: [{name}] }}`",
        )

    def alike(self, name: str, source: Holding, target: Holding) -> bool:
        """Whether nothing is computed on the way."""
        pairs = [self.both(word, name, source, target) for word in ("rotary", "norm", "times")]
        return all(str(a) == str(b) for a, b in pairs)

    def stacked(self, source: Holding, groups: Groups) -> Groups:
        """The target's axes, of which those that the source spreads over names are called by their variables."""
        names = {axis: variable for variable, axis in (source.get("stack") or {}).items()}
        return tuple(tuple(names.get(n, n) for n in g) for g in groups)

    def grain(self, own: Groups, right: Groups) -> tuple[Groups, Groups]:
        """Both sides in axes of one grain: one that only one side has is written as what it is made of."""
        for axis, into in self.made_of.items():
            if (axis in flat(own)) != (axis in flat(right)):
                own, right = (
                    tuple(tuple(m for n in g for m in (into if n == axis else (n,))) for g in side)
                    for side in (own, right)
                )
        return own, right

    def check_axes(self, name: str, source: Holding, target: Holding, own: Groups, right: Groups) -> None:
        """Raises `halves-differ` at the half whose axes are not the logical tensor's; where both may be, at both."""
        tensor = self.tensor(name)
        stack: dict[str, str] = source.get("stack") or {}
        names = [*flat(own), *stack.values()]
        theirs = [stack.get(n, n) for n in flat(right)]
        for holding, half, found in ((source, self.source, names), (target, self.target, theirs)):
            forms = [sorted(m for n in form for m in self._made(n, found)) for form in tensor.forms]
            if sorted(found) not in forms:
                said = " or ".join(f"`{' '.join(f)}`" for f in tensor.forms)
                raise differ(
                    holding.span("as"),
                    f"{half.label} has `{name}` with axes that it does not have",
                    (("its axes are declared here", tensor.span),),
                    "check the names in `as`; a family whose tensor has other axes adds a form in mappings/logical.yaml",
                    (f"expected: {said}, in any order", f"found:    `{' '.join(found)}`"),
                )
        if sorted(names) != sorted(theirs):
            raise differ(
                source.span("as"),
                f"`{name}` has other axes on either side",
                ((f"{self.target.label} has it as", target.span("as")),),
                None,
                (f"source: `{' '.join(names)}`", f"target: `{' '.join(theirs)}`"),
            )

    def _made(self, axis: str, found: Sequence[str]) -> Names:
        return (axis,) if axis in found or axis not in self.made_of else self.made_of[axis]

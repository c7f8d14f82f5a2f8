"""What ckptc says when an input is at fault.

Every stage reports problems as `Diagnostic` records, collected and raised together as one `InputError`, so that
a user sees all of them at once and a program can read each one. Rendering is the command line's business.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Span:
    """A place in a text file: 1-based line and column, and the number of characters to underline.

    `also`: other places that led here, each with what it is: who uses a shared part, the other half of a rule.
    """

    file: str
    line: int
    column: int
    length: int = 1
    also: tuple[tuple[str, Span], ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One problem: what is wrong, where, and what to do.

    `code` is stable and kebab-case (`shape-mismatch`); `message` is one sentence without a full stop;
    `notes` state expected and found, one per line; `help` says what to do.
    """

    code: str
    message: str
    span: Span | None = None
    notes: tuple[str, ...] = ()
    help: str | None = None


@dataclass
class InputError(Exception):
    """The input is at fault: a mapping, a checkpoint or a plan. Carries at least one diagnostic."""

    diagnostics: tuple[Diagnostic, ...] = field(default_factory=tuple)

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("; ".join(f"{d.code}: {d.message}" for d in self.diagnostics))


def fail(
    code: str, message: str, *, span: Span | None = None, notes: Sequence[str] = (), help: str | None = None
) -> InputError:
    """An `InputError` with a single diagnostic, ready to raise."""
    return InputError([Diagnostic(code, message, span, tuple(notes), help)])


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name most like `word`, or None when nothing is close. Swapped letters (form, from) are the closest."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    swapped = [name for name in close if sorted(name) == sorted(word)]
    return next(iter(swapped + close), None)


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A help sentence naming the nearest known name, or None."""
    best = nearest(word, known)
    return f"did you mean `{best}`?" if best else None

"""The logical tensors of a model, from `mappings/logical.yaml`: the words in which both halves speak.

Each has its axes by name, in no order (the order is a half's business), and the conventions that both halves must state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ckptc.diagnostics import InputError, Span, did_you_mean, fail
from ckptc.spec.document import Document, load
from ckptc.spec.resources import logical_file
from ckptc.spec.schema import check

MODEL = "model"  # the section of what a model has once; a half writes it without a section's name


@dataclass(frozen=True, slots=True)
class Logical:
    """A logical tensor."""

    name: str
    section: str  # `model`, or what repeats: `layers`, `vision_layers`, …
    forms: tuple[tuple[str, ...], ...]  # axes, sorted; several where models differ; none of a single number: `1`
    says: tuple[str, ...]  # conventions that whoever holds it states
    span: Span


@dataclass(frozen=True)
class Vocabulary:
    """Logical tensors by name, and the sections there are."""

    tensors: Mapping[str, Logical]

    @property
    def sections(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t.section for t in self.tensors.values()))

    def find(self, name: str, section: str | None, span: Span, also: tuple[str, ...] = ()) -> Logical:
        """The tensor of that name. Raises `unknown-logical` for none, and for one of another section. `also`: words that
        could have been meant, too.
        """
        found = self.tensors.get(name)
        if found is None:
            known = [n for n, t in self.tensors.items() if section in (None, t.section)]
            raise fail(
                "unknown-logical",
                f"there is no logical tensor `{name}`" + (f" in `{section}`" if section not in (None, MODEL) else ""),
                span=span,
                help=did_you_mean(name, [*known, *also, *self.tensors])
                or "mappings/logical.yaml lists them; `logical` adds more",
            )
        if section not in (None, found.section):
            place = f"`{found.section}`" if found.section != MODEL else "the model itself, not to one of its sections"
            raise fail("unknown-logical", f"`{name}` belongs to {place}", span=span)
        return found

    def extended(self, document: Document, data: Mapping[str, Any], where: tuple[str, ...]) -> Vocabulary:
        """This vocabulary and what `data` adds, which stands at `where` in the document."""
        tensors = dict(self.tensors)
        for section, entries in data.items():
            for name, entry in entries.items():
                span = document.key_span((*where, section, name))
                if name in self.tensors:
                    raise fail("duplicate-key", f"there is a logical tensor `{name}` already", span=span)
                given = entry if isinstance(entry, dict) else {"axes": entry}
                forms = given["axes"] if isinstance(given["axes"], list) else [given["axes"]]
                axes = tuple(tuple(sorted(n for n in f.split() if n != "1")) for f in forms)
                tensors[name] = Logical(name, section, axes, tuple(given.get("says", ())), span)
        return Vocabulary(tensors)


@cache
def vocabulary() -> Vocabulary:
    """The shipped one. Raises InputError where the file is not as its schema says."""
    document = load(logical_file(), "mappings/logical.yaml")
    check(document, "logical")
    return Vocabulary({}).extended(document, document.data, ())


__all__ = ["MODEL", "InputError", "Logical", "Vocabulary", "vocabulary"]

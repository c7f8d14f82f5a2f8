"""What a target holds, whoever fills it: the arrays of each of its blocks, with their axes and conventions.

Families in two halves get their paths from here. A mapping of explicit rules writes them, and is held to the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from ckptc.spec.document import Document
from ckptc.spec.halves.lower import LAYOUTS, chain, find_part, mapped, written
from ckptc.spec.halves.records import Half, Holding
from ckptc.spec.halves.vocabulary import MODEL, vocabulary
from ckptc.spec.resources import shipped_file

CONVENTIONS = ("rotary", "norm", "times")
LEAVES = ("kernel", "scale", "bias", "w")  # of the arrays of one small module
_HOLE = re.compile(r"\{\{.*?\}\}")


@dataclass(frozen=True, eq=False)
class Array:
    """An array of a block, or one for each layer: where it is, and what is said of it."""

    path: str  # with `{{ … }}` for what differs among layers
    layout: str  # `scanned`, `unscanned` or `always`
    section: str
    holding: Holding
    says: dict[str, Any]  # conventions, by word

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile("/".join(map(_part, re.split(r"/(?![^{]*\}\})", self.path))))

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """The logical axes that each axis is made of. Where several tensors meet, the axis is `*`."""
        axes = self.holding.axes
        return axes.of(0) if axes.count == 1 else axes.joined("*")

    @property
    def optional(self) -> bool:
        return "when" in self.holding.given or "when" in self.says

    @property
    def module(self) -> str:
        """What is filled whole or not at all: the attention, the MLP. "" for what stands in the layer itself."""
        name: str = self.holding.name.value
        parts = name.split("/")
        inner = parts[: -2 if parts[-1] in LEAVES else -1]
        return "/".join([self.path.removesuffix("/" + name), *inner]) if inner else ""


def _part(part: str) -> str:
    """A part of a path as a regular expression. One that is a template whole may be several: `{{ dense }}/wi_0/kernel`."""
    return ".+?" if _HOLE.fullmatch(part) else "[^/]+".join(map(re.escape, _HOLE.split(part)))


@dataclass(frozen=True, eq=False)
class Contract:
    """A block whole: a tree that the target has."""

    target: str
    name: str
    title: str
    half: Half
    arrays: tuple[Array, ...]
    dims: dict[str, Any]  # of the block

    def find(self, path: str, layout: str) -> Array | None:
        """The array at a path of the tree, without its collection."""
        return next((a for a in self.of(layout) if a.pattern.fullmatch(path)), None)

    def of(self, layout: str) -> Iterator[Array]:
        return (a for a in self.arrays if a.layout in (layout, "always"))


@cache
def contract(target: str, name: str) -> Contract:
    """A block of a target. Raises InputError `unknown-part` where there is none, with the nearest."""
    document = find_part(name, "block", None, ("targets", target), None)
    files = chain(document, "block", None, ("targets", target))
    words = vocabulary()
    for d in files:
        words = words.extended(d, d.data.get("logical", {}), ("logical",))
    half = Half(f"{target}'s `{name}`", "at", words, document.span(()))
    write = written(files)
    dims: dict[str, Any] = {}
    for d in files:
        dims |= d.data.get("dims", {})
        if "tree" in d.data:
            half.add(d, mapped(d.data["tree"], write), ("tree",))
    half.finish()
    return Contract(target, name, document.data["title"], half, tuple(_arrays(half)), dims)


def _arrays(half: Half) -> Iterator[Array]:
    for section in half.sections.values():
        for holding in section.holdings:
            tensor = half.vocabulary.tensors[holding.names[0]]
            said = {word: half.convention(word, tensor) for word in (*CONVENTIONS, "when")}
            says = {word: s.value for word, s in said.items() if s is not None}
            name = holding.name.value
            if section.name == MODEL:
                yield Array(name, "always", MODEL, holding, says)
            for layout in LAYOUTS:
                for place in section.given[layout].value if layout in section.given else ():
                    yield Array(f"{place['at']}/{name}", layout, section.name, holding, says)


def titled(target: str) -> tuple[str, ...]:
    """The names of the blocks that are whole trees."""
    files = sorted(shipped_file("targets", target).glob("*.yaml"))
    return tuple(p.stem for p in files if re.search(r"^title:", p.read_text(encoding="utf-8"), re.MULTILINE))


@cache
def contracts(target: str) -> tuple[Contract, ...]:
    """Every whole tree that the target has."""
    return tuple(contract(target, name) for name in titled(target))


def stored(vocabulary_: Any, document: Document, data: dict[str, Any], label: str) -> Half:
    """What the source of explicit rules holds, by conventions, as `stored` says it."""
    half = Half(label, "in", vocabulary_, document.span(("stored",)))
    for word, value in data.items():
        half._state(word, document, value, ("stored", word))
    return half

"""A half as typed records: which stored tensors hold which logical ones, and the conventions by which they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ckptc.diagnostics import InputError, Span, fail
from ckptc.spec.document import Document, Path_
from ckptc.spec.halves.axes import Axes, AxesError, parse
from ckptc.spec.halves.vocabulary import MODEL, Logical, Vocabulary

CONVENTIONS = ("rotary", "norm", "times", "when", "dtype")
SIZES = ("pad", "resize")  # of axes, not of tensors: said as `pad: { vocab: padded_vocab }`
SECTION = ("in", "at", "scanned", "unscanned", "always", "when")


@dataclass(frozen=True, slots=True)
class Said:
    """A value that a file gives, and where."""

    value: Any
    document: Document
    where: Path_

    @property
    def span(self) -> Span:
        return self.document.span(self.where)

    @property
    def key(self) -> Span:
        return self.document.key_span(self.where)


@dataclass(eq=False)
class Holding:
    """A stored tensor, or one for each of a stack: the logical tensors it holds, in order, and what is said of it."""

    names: tuple[str, ...]
    given: dict[str, Said]
    key: Span
    section: str

    @property
    def name(self) -> Said:
        return self.given.get("in") or self.given["at"]

    @property
    def title(self) -> str:
        return " ".join(self.names)

    def get(self, word: str) -> Any:
        return self.given[word].value if word in self.given else None

    def span(self, word: str) -> Span:
        return self.given[word].span if word in self.given else self.key

    @property
    def axes(self) -> Axes:
        """Raises InputError `invalid-pattern` at the character that is wrong."""
        said = self.given["as"]
        try:
            return parse(said.value, len(self.names))
        except AxesError as error:
            span = said.document.within(said.where, error.at, error.length)
            raise fail("invalid-pattern", str(error), span=span) from None


@dataclass
class Section:
    """What a half holds once, or once for each layer."""

    name: str
    given: dict[str, Said] = field(default_factory=dict)
    holdings: list[Holding] = field(default_factory=list)


@dataclass
class Half:
    """One side: `label` is how messages call it, `word` what says the name of a stored tensor there (`in`, `at`)."""

    label: str
    word: str
    vocabulary: Vocabulary
    span: Span
    sections: dict[str, Section] = field(default_factory=dict)
    statements: list[tuple[str, tuple[str, ...] | None, Said]] = field(default_factory=list)  # None: of all it concerns
    sizes: dict[str, tuple[str, Said]] = field(default_factory=dict)  # by axis: `pad` or `resize`, and to what

    def holdings(self) -> Iterator[Holding]:
        for section in self.sections.values():
            yield from section.holdings

    def held(self, name: str) -> list[Holding]:
        return [h for h in self.holdings() if name in h.names]

    def convention(self, word: str, tensor: Logical) -> Said | None:
        """What is said of the tensor: the last statement that names it, or that names none."""
        found = None
        for about, names, said in self.statements:
            if about == word and (tensor.name in names if names is not None else word in tensor.says):
                found = said
        return found

    def add(self, document: Document, data: dict[str, Any], where: Path_) -> None:
        """Lays what one file says upon what is there: a holding of the same tensors gains and changes attributes, one of
        other tensors takes them over, a later statement of a convention wins.
        """
        for word, value in data.items():
            path = (*where, word)
            if word in SIZES:
                for axis, size in value.items():
                    self.sizes[axis] = (word, Said(size, document, (*path, axis)))
            elif word in CONVENTIONS:
                self._state(word, document, value, path)
        plain = {k: v for k, v in data.items() if k not in (*SIZES, *CONVENTIONS)}
        inner = {k: plain.pop(k) for k in list(plain) if k in self.vocabulary.sections and k != MODEL}
        self._section(MODEL, document, plain, where)
        for name, entries in inner.items():
            self._section(name, document, entries, (*where, name))

    def _state(self, word: str, document: Document, value: Any, where: Path_) -> None:
        if not isinstance(value, dict):
            self.statements.append((word, None, Said(value, document, where)))
            return
        for stated, names in value.items():
            path = (*where, stated)
            listed = [names] if isinstance(names, str) else names
            for name in listed:
                self.vocabulary.find(name, None, document.span(path))
            self.statements.append((word, tuple(listed), Said(stated, document, path)))

    def _section(self, name: str, document: Document, data: dict[str, Any], where: Path_) -> None:
        if not data and name == MODEL:
            return
        section = self.sections.setdefault(name, Section(name))
        added: list[Holding] = []
        for key, value in data.items():
            path = (*where, key)
            if key in SECTION and name != MODEL:
                section.given[key] = Said(value, document, path)
                continue
            names = tuple(key.split())
            for one in names:
                also = SECTION if name != MODEL else (*CONVENTIONS, *SIZES, *self.vocabulary.sections)
                self.vocabulary.find(one, name, document.key_span(path), also)
            several = value if isinstance(value, list) else None
            for at, entry in (
                [((*path, n), e) for n, e in enumerate(several)] if several is not None else [(path, value)]
            ):
                if not isinstance(entry, dict):
                    raise fail("invalid-value", f"`{key}` must be a map", span=document.span(at))
                given = {k: Said(v, document, (*at, k)) for k, v in entry.items()}
                added.append(Holding(names, given, document.key_span(path), name))
        before = section.holdings
        for names in dict.fromkeys(h.names for h in added):
            same, new = [h for h in before if h.names == names], [h for h in added if h.names == names]
            if len(same) == len(new) == 1:
                merged = Holding(names, {**same[0].given, **new[0].given}, new[0].key, name)
                before[before.index(same[0])] = merged
                continue
            before[:] = [h for h in before if not set(h.names) & set(names) or h in added]
            before += new

    def finish(self) -> None:
        """Raises InputError for holdings that lack their name or their axes, and for what is held twice."""
        for holding in self.holdings():
            for word in (self.word, "as"):
                if word not in holding.given:
                    raise fail("missing-key", f"`{holding.title}` needs the key `{word}`", span=holding.key)
            holding.axes  # noqa: B018  (it is parsed, and may be wrong)
        for name in dict.fromkeys(n for h in self.holdings() for n in h.names):
            held = self.held(name)
            plain = [h for h in held if "when" not in h.given]
            if len(held) > 1 and plain:
                raise InputError(
                    [
                        replace(
                            fail("duplicate-target", f"`{name}` is held twice", span=plain[-1].key).diagnostics[0],
                            help="give each of them a `when`",
                        )
                    ]
                )
        for word, names, said in self.statements:
            for name in names or ():
                if not self.held(name):
                    raise fail(
                        "unknown-logical",
                        f"`{word}` is said of `{name}`, which {self.label} does not hold",
                        span=said.span,
                    )

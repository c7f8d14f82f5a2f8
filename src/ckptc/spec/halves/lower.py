"""A family's file, its parts and a target's block become one mapping of explicit rules, whose spans lie in those files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ckptc.diagnostics import InputError, Span, did_you_mean, fail
from ckptc.spec.document import Document, Path_, load
from ckptc.spec.halves.derive import Derivation, Rule, both
from ckptc.spec.halves.records import Half, Holding
from ckptc.spec.halves.vocabulary import MODEL, Vocabulary, vocabulary
from ckptc.spec.resources import shipped_file
from ckptc.spec.schema import check

TIED = "tied to the embedding, which serves as the output head too; this is a copy of it"
LAYOUTS = ("scanned", "unscanned", "always")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def lower(document: Document, target: str, folder: Path | None = None) -> Document:
    """The mapping of explicit rules by which a family becomes `target`. `folder`: of the family's file, where its own
    parts and blocks may stand beside the shipped ones.

    Raises InputError: `unknown-part` (a part, a target or a block that is not there), `unknown-logical`, `halves-differ`,
    and what reading the files raises.
    """
    return _Lowering(document, target, folder).document()


def targets_of(document: Document) -> tuple[str, ...]:
    """The targets that a family runs as."""
    return tuple(document.data["runs_as"])


def chain(document: Document, kind: str, folder: Path | None, below: tuple[str, ...]) -> list[Document]:
    """The files a file is made of, in the order in which they are laid upon one another; itself last."""
    out: list[Document] = []
    for n, name in enumerate(document.data.get("parts", ())):
        span = document.span(("parts", n))
        part = find_part(name, kind, folder, below, span)
        if any(name == p for p in _users(document)):
            raise fail("unknown-part", f"part `{name}` leads back to itself", span=span)
        used = replace(part, used_by=(("used by", span),))
        out += [d for d in chain(used, kind, folder, below) if d.name not in {o.name for o in out}]
    return [*out, document]


def _users(document: Document) -> list[str]:
    spans = [document.span(()), *(s for _, s in document.used_by)]
    return [Path(s.file).stem for s in spans if "/parts/" in s.file or "/targets/" in s.file]


def find_part(name: str, kind: str, folder: Path | None, below: tuple[str, ...], span: Span | None) -> Document:
    """A part or block by name: beside the family's file, or shipped. `below`: its folders under `mappings`."""
    if folder is not None and (own := folder.joinpath(*below, f"{name}.yaml")).is_file():
        return _load(own, "/".join((*below, f"{name}.yaml")), kind)
    path = shipped_file(*below, f"{name}.yaml")
    if path.is_file():
        return _load(path, "/".join(("mappings", *below, f"{name}.yaml")), kind)
    known = sorted(p.stem for p in shipped_file(*below).glob("*.yaml"))
    help = did_you_mean(name, known) or (f"known here: {', '.join(known)}" if known else None)
    raise fail("unknown-part", f"there is no {kind} `{name}`", span=span, help=help)


@cache
def _load(path: Path, name: str, kind: str) -> Document:
    document = load(path, name)
    check(document, kind)
    return document


class _Lowering:
    def __init__(self, document: Document, target: str, folder: Path | None) -> None:
        self.family, self.target = document, target
        runs = document.data["runs_as"]
        if target not in runs:
            raise fail(
                "unknown-part",
                f"{document.data['family']} does not run as {target}",
                span=document.key_span(("runs_as",)),
                notes=(f"it runs as: {', '.join(runs)}",),
            )
        self.runs: dict[str, Any] = runs[target] if isinstance(runs[target], dict) else {"block": runs[target]}
        self.at: Path_ = ("runs_as", target)
        block = self.runs["block"]
        span = document.span((*self.at, "block"))
        self.parts = chain(document, "part", folder, ("parts",))
        first = replace(
            find_part(block, "block", folder, ("targets", target), span), used_by=((f"run as `{block}` by", span),)
        )
        self.blocks = chain(first, "block", folder, ("targets", target))
        words = vocabulary()
        for d in (*self.parts, *self.blocks):
            words = words.extended(d, d.data.get("logical", {}), ("logical",))
        self.written = self._written([*self.parts, *self.blocks])  # of what both sides share
        self.hub = self._half(
            "the checkpoint",
            "in",
            words,
            self.parts,
            "hub",
            document.key_span(("hub" if "hub" in document.data else "parts",)),
        )
        self.tree = self._half(f"{target}'s `{block}`", "at", words, self.blocks, "tree", first.span(()))
        self.out = Document(document.name, "", {}, derived=True)

    def _half(self, label: str, word: str, words: Vocabulary, files: list[Document], key: str, span: Span) -> Half:
        half = Half(label, word, words, span)
        written = self._written(files)
        for d in files:
            if key in d.data:
                half.add(d, mapped(d.data[key], written), (key,))
        half.finish()
        return half

    def _written(self, files: list[Document]) -> Callable[[str], str]:
        return written(files, {n for d in self.parts for values in d.data.get("sources", {}).values() for n in values})

    def document(self) -> Document:
        data = self.out.data
        derivation = Derivation(self.hub, self.tree, self._axes())
        rules = derivation.rules()
        for word in ("family", "title"):
            if word in self.family.data:
                self._copy(self.family, (word,), (word,))
        data["target"], data["block"] = self.target, self.runs["block"]
        if stored := self._stored():
            data["stored"] = stored
        self._dims(derivation.pieces.dims)
        for word in ("config", "models", "multimodal", "sources"):
            for d in self.parts:
                if word in d.data:
                    self._copy(d, (word,), (word,))
        self._models()
        self._lists("unsupported", [(d, ("unsupported",)) for d in self.blocks])
        self._rules(rules)
        self._escapes()
        self._lists("ignore", [*((d, ("ignore",)) for d in self.parts), (self.family, (*self.at, "ignore"))])
        self._tied()
        self._prune()
        self.out.text = json.dumps(data, ensure_ascii=False)
        return self.out

    def _stored(self) -> dict[str, Any]:
        """What the checkpoint holds, by conventions, as explicit rules say it."""
        out: dict[str, Any] = {}
        held = [self.hub.vocabulary.tensors[n] for h in self.tree.holdings() for n in h.names]
        for word in ("rotary", "norm", "times"):
            names: dict[str, list[str]] = {}
            for tensor in held:
                if (said := self.hub.convention(word, tensor)) is not None:
                    names.setdefault(str(said.value), []).append(tensor.name)
            names = {value: list(dict.fromkeys(of)) for value, of in names.items()}
            if len(names) == 1 and word != "times":
                out[word] = next(iter(names))
            elif names and list(names) != ["1"]:
                out[word] = names
        return out

    # Copies of what the files say

    def _copy(self, document: Document, where: Path_, to: Path_) -> None:
        value: Any = document.data
        for step in where:
            value = value[step]
        value = mapped(value, self.written)
        parent: Any = self.out.data
        for step in to[:-1]:
            parent = parent.setdefault(step, {}) if isinstance(parent, dict) else parent[step]
        if isinstance(parent, list):
            parent.append(value)
        else:
            parent[to[-1]] = value
        n = len(where)
        for spans, into, get in (
            (document.keys, self.out.keys, document.key_span),
            (document.values, self.out.values, document.span),
        ):
            for path in spans:
                if path[:n] == where:
                    into[(*to, *path[n:])] = get(path)

    def _lists(self, word: str, files: list[tuple[Document, Path_]]) -> None:
        for d, where in files:
            value: Any = d.data
            for step in where:
                value = value.get(step, {}) if isinstance(value, dict) else {}
            for n in range(len(value)):
                self.out.data.setdefault(word, [])
                self._copy(d, (*where, n), (word, len(self.out.data[word])))

    def _dims(self, derived: dict[str, str]) -> None:
        self.out.data["dims"] = {}
        for d, where in [*((d, ("dims",)) for d in (*self.blocks, *self.parts)), (self.family, (*self.at, "dims"))]:
            source: Any = d.data
            for step in where:
                source = source.get(step, {}) if isinstance(source, dict) else {}
            for name in source:
                self._copy(d, (*where, name), ("dims", name))
        for name, value in derived.items():
            self.out.data["dims"][name] = value
            self.out.values["dims", name] = self.family.key_span(("hub",))

    def _models(self) -> None:
        """Dims that a model fixes for this target."""
        for model, dims in self.runs.get("set", {}).items():
            if model not in self.out.data["models"]:
                known = self.out.data["models"]
                raise fail(
                    "unknown-model",
                    f"there is no model `{model}` in this family",
                    span=self.family.key_span((*self.at, "set", model)),
                    help=did_you_mean(model, known),
                )
            for name in dims:
                self.out.data["models"][model].setdefault("set", {})
                self._copy(self.family, (*self.at, "set", model, name), ("models", model, "set", name))

    def _axes(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(into.split()) for d in self.parts for name, into in d.data.get("axes", {}).items()}

    # Rules

    def _rules(self, rules: list[Rule]) -> None:
        for rule in rules:
            holding = rule.holding
            path = holding.name.value
            if holding.section == MODEL:
                self._put(("tensors",), path, rule)
            else:
                self._block(holding)
                self._put(("blocks", holding.section, "tensors"), path, rule)

    def _block(self, holding: Holding) -> None:
        name = holding.section
        blocks = self.out.data.setdefault("blocks", {})
        if name in blocks:
            return
        here, there = self.hub.sections.get(name), self.tree.sections[name]
        if here is None or "in" not in here.given:
            raise fail(
                "missing-key",
                f"`{name}` needs the key `in`: the names at the source before each of its tensors",
                span=here.holdings[0].key if here and here.holdings else self.hub.span,
            )
        block: dict[str, Any] = {"source": here.given["in"].value}
        self.out.keys["blocks", name] = here.given["in"].key
        self.out.values["blocks", name] = there.given.get("scanned", here.given["in"]).span
        self.out.values["blocks", name, "source"] = here.given["in"].span
        blocks[name] = block
        conditions = [s.given["when"] for s in (here, there) if "when" in s.given]
        for layout in LAYOUTS:
            if layout in there.given:
                said = there.given[layout]
                self._copy(said.document, said.where, ("blocks", name, layout))
                self._vary(block[layout], name, layout)
        if conditions:
            block["when"] = both(list(dict.fromkeys(str(c.value) for c in conditions)))
            self.out.values["blocks", name, "when"] = conditions[0].span
        block["tensors"] = {}

    def _vary(self, places: list[dict[str, Any]], section: str, layout: str) -> None:
        """Dims that differ among layers."""
        for d in self.parts:
            for name, value in d.data.get("by_layer", {}).get(section, {}).items():
                for n, place in enumerate(places):
                    place.setdefault("let", {})[name] = value
                    self.out.values["blocks", section, layout, n, "let", name] = d.span(("by_layer", section, name))

    def _put(self, where: Path_, path: str, rule: Rule) -> None:
        into: Any = self.out.data
        for step in where:
            into = into.setdefault(step, {})
        at: Path_ = (*where, path)
        if path not in into:
            into[path] = rule.data
        else:
            if not isinstance(into[path], list):
                self._shift(at)
                into[path] = [into[path]]
            at = (*at, len(into[path]))
            into[path].append(rule.data)
        key = rule.spans.get(("from",)) or rule.spans.get(("from", 0, "from")) or rule.holding.key
        self.out.keys[at] = self.out.values[at] = replace(
            key, also=(*key.also, (f"{self.tree.label} has it at", rule.holding.key))
        )
        self.out.values |= {(*at, *p): s for p, s in rule.spans.items()}
        self.out.reasons |= {(*at, *p): r for p, r in rule.reasons.items()}

    def _shift(self, at: Path_) -> None:
        """What is said at `at` is now said of the first item there."""
        n = len(at)
        tables: tuple[dict[Path_, Any], ...] = (self.out.keys, self.out.values, self.out.reasons)
        for table in tables:
            for path in [p for p in table if p[:n] == at]:
                table[(*at, 0, *path[n:])] = table.pop(path)

    def _escapes(self) -> None:
        """Explicit rules, for what is odd, of one target."""
        for d in self.parts:
            given = d.data.get("rules", {}).get(self.target, {})
            for path in given.get("tensors", {}):
                self._copy(d, ("rules", self.target, "tensors", path), ("tensors", self.written(path)))
            for name in given.get("blocks", {}):
                if name in self.out.data.get("blocks", {}):
                    for path in given["blocks"][name]["tensors"]:
                        where: Path_ = ("rules", self.target, "blocks", name, "tensors", path)
                        self._copy(d, where, ("blocks", name, "tensors", self.written(path)))
                else:
                    self._copy(d, ("rules", self.target, "blocks", name), ("blocks", name))

    def _tied(self) -> None:
        """What is a copy of another tensor is left out, with that reason."""
        for holding in self.hub.holdings():
            tied = holding.given.get("tied")
            if tied is None or tied.value is False:
                continue
            ignore = self.out.data.setdefault("ignore", [])
            at = ("ignore", len(ignore))
            ignore.append({"source": holding.name.value, "when": str(tied.value), "reason": TIED})
            self.out.values[at] = self.out.values[(*at, "source")] = holding.name.span
            self.out.values[(*at, "when")] = tied.span

    def _prune(self) -> None:
        """Dims that nothing uses are of a part whose tensors another file took over."""
        dims = self.out.data["dims"]
        rest = [v for k, v in self.out.data.items() if k not in ("dims", "models", "config", "title", "family")]
        sets = [m.get("set", {}) for m in self.out.data["models"].values()]
        needed, new = set[str](), {w for text in _texts([*rest, *sets]) for w in _WORD.findall(text)} & set(dims)
        while new:
            needed |= new
            new = ({w for n in new for w in _WORD.findall(str(dims[n]))} & set(dims)) - needed
        own = {n for d in (self.family,) for n in d.data.get("dims", {})}
        self.out.data["dims"] = {n: v for n, v in dims.items() if n in needed or n in own}


def written(files: list[Document], open_: Iterable[str] = ()) -> Callable[[str], str]:
    """Writes out the names that stand for text, but for those that a naming of the source gives (`open_`)."""
    names: dict[str, str] = {}
    for d in files:
        names |= d.data.get("names", {})
    names = {n: v for n, v in names.items() if n not in open_}
    if not names:
        return lambda text: text
    pattern = re.compile(r"\{\{\s*(" + "|".join(map(re.escape, names)) + r")\s*\}\}")
    return lambda text: pattern.sub(lambda m: names[m.group(1)], text)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {change(k): mapped(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [mapped(v, change) for v in value]
    return change(value) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for k, v in value.items():
            yield str(k)
            yield from _texts(v)
    elif isinstance(value, list):
        for v in value:
            yield from _texts(v)
    elif isinstance(value, str):
        yield value


__all__ = ["InputError", "chain", "find_part", "lower", "targets_of"]

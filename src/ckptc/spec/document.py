"""A YAML document as plain values that remember where they stand.

ruamel.yaml composes the node tree; this module turns it into dicts, lists and scalars and keeps, for every key and every value, its
`Span`. The YAML subset is the one a mapping needs: one document, no anchors or aliases (so no expansion bombs), no tags, no duplicate keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import ruamel.yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ckptc.diagnostics import InputError, Span, fail
from ckptc.regular import open_file

Path_ = tuple[str | int, ...]

MAX_DEPTH = 40
MAX_BYTES = 250_000  # reading takes up to 20 seconds per megabyte
MAX_INTEGER = 10**18

LIBYAML = bool(ruamel.yaml.__with_libyaml__)  # there are wheels of it for CPython alone
# What libyaml takes another way: directives, documents, tags, `? key`, a comment right behind `|`, tabs, what YAML 1.1
# takes for line breaks; and indicators that nest.
_UNUSUAL = re.compile(
    r"^(%|---|\.\.\.)|(?:^|\s)!|\?\s|[|>][-+0-9]*\s*#|[\t\x85\u2028\u2029\ufeff]|(?:[-?:]\s+){8}", re.MULTILINE
)
_BRACKET = re.compile(r"[\[\]{}]")
_LINE_BREAK = re.compile(r"\r\n|\r|\n")  # what YAML counts as one; str.splitlines knows more


def _integer(text: str) -> int:
    value = int(text.replace("_", ""), 0)
    if abs(value) > MAX_INTEGER:
        raise ValueError
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):  # `yes`, under a `%YAML 1.1` directive
        raise ValueError
    return text.lower() == "true"


def _null(text: str) -> None:
    return None


_SCALARS: dict[str, Callable[[str], Any]] = {"null": _null, "bool": _boolean, "int": _integer, "float": _number}


@dataclass
class Document:
    """A parsed file. `keys` and `values` map a path of keys and indices to the span of that key or value.

    `used_by`: where another file names this one, and that one in turn. Of a document that was derived from others
    (`derived`), the spans lie in those, `text` is its data as JSON, and `reasons` say why a value is as it is.
    """

    name: str
    text: str
    data: Any = None
    keys: dict[Path_, Span] = field(default_factory=dict)
    values: dict[Path_, Span] = field(default_factory=dict)
    used_by: tuple[tuple[str, Span], ...] = ()
    derived: bool = False
    reasons: dict[Path_, str] = field(default_factory=dict)

    def span(self, path: Path_) -> Span:
        """The span of the value at `path`, else of the nearest thing that encloses it."""
        while path and path not in self.values:
            path = path[:-1]
        return self._used(self.values.get(path, Span(self.name, 1, 1)))

    def key_span(self, path: Path_) -> Span:
        """The span of the key at `path`, else of its value."""
        return self._used(self.keys[path]) if path in self.keys else self.span(path)

    def _used(self, span: Span) -> Span:
        return replace(span, also=(*span.also, *self.used_by)) if self.used_by else span

    def within(self, path: Path_, start: int, length: int) -> Span:
        """The span of `length` characters from character `start` of the one-line scalar at `path`.

        Quoted scalars shift by their opening quote; a scalar with escapes or of several lines gives the whole value.
        """
        whole = self.span(path)
        if self.derived:
            return whole
        lines = _LINE_BREAK.split(self.text)
        line = lines[whole.line - 1] if whole.line <= len(lines) else ""
        shown = line[whole.column - 1 : whole.column - 1 + whole.length]
        quote = 1 if shown[:1] in ("'", '"') else 0
        if "\\" in shown or "''" in shown or start + length > len(shown) - 2 * quote:
            return whole
        return replace(whole, column=whole.column + quote + start, length=max(1, length))


def load(path: Path, name: str | None = None) -> Document:
    """Read and parse a mapping file. `name` is how diagnostics call it (default: the path as given)."""
    shown = name or str(path)
    try:
        with open_file(path) as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise fail("unreadable-mapping", f"cannot read {shown}: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise fail("invalid-yaml", f"{shown} is larger than a mapping can be (at most {MAX_BYTES} bytes)")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fail("invalid-yaml", f"{shown} is not UTF-8 text (byte {error.start})") from None
    return parse(text, shown)


def parse(text: str, name: str) -> Document:
    """Parse YAML text. Raises InputError with code `invalid-yaml` or `duplicate-key`."""
    text = text.removeprefix("\ufeff")
    document = Document(name, text)
    try:
        node = _compose(text)
        if node is not None:
            _refuse_aliases(node, name)
            document.data = _build(node, document, ())
    except InputError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        span = Span(name, mark.line + 1, mark.column + 1) if mark else None
        raise fail("invalid-yaml", f"not valid YAML: {error.problem or error.context}", span=span) from None
    except (YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise fail("invalid-yaml", f"{name} is not valid YAML: {reason}") from None
    return document


def _compose(text: str) -> Node | None:
    """The node tree: by libyaml, 8 times as fast as pure Python, where both make the same of the text.

    What libyaml refuses is given to the other, whose words are the ones that users see. So is what it may take another
    way (directives, documents, anchors), and what is nested so deeply that it would run out of stack.
    """
    if LIBYAML and "&" not in text and _UNUSUAL.search(text) is None and _depth(text) <= MAX_DEPTH:
        try:
            return cast("Node | None", YAML(typ="safe").compose(text))
        except (YAMLError, ValueError, RecursionError):
            pass
    return cast("Node | None", YAML(typ="safe", pure=True).compose(text))


def _depth(text: str) -> int:
    """How deeply brackets are nested, or more: those in strings count, too."""
    depth = most = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        most = max(most, depth)
    return most


def _refuse_aliases(node: Node, name: str) -> None:
    """Composed aliases are shared nodes: a node met twice, anchored or not, means an alias."""
    seen: set[int] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if id(current) in seen or getattr(current, "anchor", None):
            raise fail(
                "invalid-yaml",
                "anchors and aliases are not part of the mapping dialect",
                span=_span(current, name),
                help="write a rule once with `for` instead",
            )
        seen.add(id(current))
        if isinstance(current, MappingNode):
            stack += [n for pair in current.value for n in pair]
        elif isinstance(current, SequenceNode):
            stack += current.value


def _span(node: Node, name: str) -> Span:
    start, end = node.start_mark, node.end_mark
    one_line = isinstance(node, ScalarNode) and start.line == end.line
    return Span(name, start.line + 1, start.column + 1, max(1, end.column - start.column) if one_line else 1)


def _build(node: Node, document: Document, path: Path_) -> Any:
    span = _span(node, document.name)
    document.values[path] = span
    if len(path) > MAX_DEPTH:
        raise fail("invalid-yaml", "nested too deeply for a mapping", span=span)
    _refuse_tag(node, document)
    if isinstance(node, MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_span = _span(key_node, document.name)
            if not isinstance(key_node, ScalarNode):
                raise fail(
                    "invalid-yaml", "keys must be plain text", span=key_span, help="quote a key that starts with `{{`"
                )
            _refuse_tag(key_node, document)
            if str(key_node.tag).endswith(":merge"):
                raise fail("invalid-yaml", "merge keys are not part of the mapping dialect", span=key_span)
            key = _text(key_node, document)
            if key in out:
                raise fail("duplicate-key", f"key `{key}` is given twice", span=key_span)
            document.keys[(*path, key)] = key_span
            out[key] = _build(value_node, document, (*path, key))
            if (
                value_node.start_mark.index == value_node.end_mark.index
            ):  # nothing is there; YAML would point at what comes next
                document.values[(*path, key)] = key_span
        return out
    if isinstance(node, SequenceNode):
        return [_build(item, document, (*path, i)) for i, item in enumerate(node.value)]
    assert isinstance(node, ScalarNode)
    tag = str(node.tag).rsplit(":", 1)[-1]
    if tag == "str":
        return _text(node, document)
    convert = _SCALARS.get(tag)
    if convert is None:
        raise fail(
            "invalid-yaml",
            f"`{node.value}` is a {tag} to YAML, which a mapping cannot hold",
            span=span,
            help="quote it",
        )
    try:
        return convert(str(node.value))
    except ValueError:
        shown = str(node.value) if len(node.value) <= 40 else f"{node.value[:40]}…"
        raise fail(
            "invalid-yaml", f"`{shown}` is not a value a mapping can hold", span=span, help="quote it if it is text"
        ) from None


def _text(node: Node, document: Document) -> str:
    """A scalar's text. An escape can make half of a surrogate pair, which no file can be named or written with."""
    text = str(node.value)
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise fail(
            "invalid-yaml",
            "half of a surrogate pair is not text",
            span=_span(node, document.name),
            help="write the character itself",
        )
    return text


def _refuse_tag(node: Node, document: Document) -> None:
    # A tag written in the file; tags that YAML derives from the value leave no mark. Nodes start at their tag.
    if document.text.startswith("!", node.start_mark.index):
        raise fail("invalid-yaml", "tags (`!…`) are not part of the mapping dialect", span=_span(node, document.name))

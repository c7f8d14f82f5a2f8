"""A YAML document as plain values that remember where they stand.

ruamel.yaml composes the node tree; this module turns it into dicts, lists and scalars and keeps, for every key and every value, its
`Span`. The YAML subset is the one a mapping needs: one document, no anchors or aliases (so no expansion bombs), no tags, no duplicate keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ckptc.diagnostics import InputError, Span, fail

Path_ = tuple[str | int, ...]

MAX_DEPTH = 40
MAX_BYTES = 1_000_000

_SCALARS = {"null": lambda s: None, "bool": lambda s: s.lower() == "true", "int": lambda s: int(s.replace("_", ""), 0), "float": float}


@dataclass
class Document:
    """A parsed file. `keys` and `values` map a path of keys and indices to the span of that key or value."""

    name: str
    text: str
    data: Any = None
    keys: dict[Path_, Span] = field(default_factory=dict)
    values: dict[Path_, Span] = field(default_factory=dict)

    def span(self, path: Path_) -> Span:
        """The span of the value at `path`, else of the nearest thing that encloses it."""
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, Span(self.name, 1, 1))

    def key_span(self, path: Path_) -> Span:
        """The span of the key at `path`, else of its value."""
        return self.keys.get(path) or self.span(path)

    def within(self, path: Path_, start: int, length: int) -> Span:
        """The span of `length` characters from character `start` of the one-line scalar at `path`.

        Quoted scalars shift by their opening quote; a scalar with escapes or of several lines gives the whole value.
        """
        whole = self.span(path)
        line = self.text.splitlines()[whole.line - 1] if whole.line <= len(self.text.splitlines()) else ""
        shown = line[whole.column - 1 : whole.column - 1 + whole.length]
        quote = 1 if shown[:1] in ("'", '"') else 0
        if "\\" in shown or "''" in shown or start + length > len(shown) - 2 * quote:
            return whole
        return Span(self.name, whole.line, whole.column + quote + start, max(1, length))


def load(path: Path, name: str | None = None) -> Document:
    """Read and parse a mapping file. `name` is how diagnostics call it (default: the path as given)."""
    shown = name or str(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise fail("unreadable-mapping", f"cannot read {shown}: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise fail("invalid-yaml", f"{shown} is larger than a mapping can be ({len(raw)} bytes, at most {MAX_BYTES})")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fail("invalid-yaml", f"{shown} is not UTF-8 text (byte {error.start})") from None
    return parse(text, shown)


def parse(text: str, name: str) -> Document:
    """Parse YAML text. Raises InputError with code `invalid-yaml` or `duplicate-key`."""
    document = Document(name, text)
    try:
        node = YAML(typ="safe", pure=True).compose(text)
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
    if isinstance(node, MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_span = _span(key_node, document.name)
            if not isinstance(key_node, ScalarNode):
                raise fail("invalid-yaml", "keys must be plain text", span=key_span, help="quote a key that starts with `{{`")
            key = str(key_node.value)
            if key in out:
                raise fail("duplicate-key", f"key `{key}` is given twice", span=key_span)
            document.keys[(*path, key)] = key_span
            out[key] = _build(value_node, document, (*path, key))
        return out
    if isinstance(node, SequenceNode):
        return [_build(item, document, (*path, i)) for i, item in enumerate(node.value)]
    tag = str(node.tag).rsplit(":", 1)[-1]
    if tag == "str":
        return str(node.value)
    convert = _SCALARS.get(tag)
    if convert is None:
        raise fail("invalid-yaml", f"YAML tag `{node.tag}` is not part of the mapping dialect", span=span)
    return convert(node.value)

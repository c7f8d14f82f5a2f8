"""A mapping of explicit rules as text, with the reasons of ops that were derived: what two halves come to, nothing left to look up.

The text is a mapping itself: `ckptc compile --mapping` takes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ckptc.spec.document import Document, Path_

WIDTH = 140
_PLAIN = re.compile(r"[A-Za-z_(/.][A-Za-z0-9_ ()/.*+<>=!|%-]*(?<! )")
_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "~")


def expanded(document: Document) -> str:
    """The text. Lists and maps that fit a line stand on one."""
    lines = [f"# yaml-language-server: $schema={_schema()}"] if document.derived else []
    for key, value in document.data.items():
        spaced = key in ("dims", "models", "tensors", "blocks", "ignore", "config", "sources", "unsupported", "decode")
        lines += [""] if spaced else []
        lines += _lines(document, (key,), value, 0)
    return "\n".join(lines) + "\n"


def _schema() -> str:
    return "schema/mapping.schema.json"


def _lines(document: Document, path: Path_, value: Any, depth: int) -> Iterator[str]:
    """`key: value`, on one line if it is short and says no reasons, and after its reasons."""
    indent, key = "  " * depth, scalar(path[-1])
    reasons = [(p, r) for p, r in document.reasons.items() if p[: len(path)] == path]
    if _is_rule(value):
        yield from (f"{indent}# {p[-1]}: {reason}" for p, reason in reasons)
    line = f"{indent}{key}: {flow(value)}"
    if not isinstance(value, dict | list) or (len(line) <= WIDTH and depth and (not reasons or _is_rule(value))):
        yield line
    elif isinstance(value, dict):
        yield f"{indent}{key}:" if value else f"{indent}{key}: {{}}"
        for name, inner in value.items():
            yield from _lines(document, (*path, name), inner, depth + 1)
    else:
        yield f"{indent}{key}:"
        for n, item in enumerate(value):
            yield from _item(document, (*path, n), item, depth + 1)


def _item(document: Document, path: Path_, value: Any, depth: int) -> Iterator[str]:
    indent = "  " * depth
    if _is_rule(value):
        reasons = [(p, r) for p, r in document.reasons.items() if p[: len(path)] == path]
        yield from (f"{indent}# {p[-1]}: {reason}" for p, reason in reasons)
    line = f"{indent}- {flow(value)}"
    if len(line) <= WIDTH or not isinstance(value, dict):
        yield line
        return
    inner = [line for name, v in value.items() for line in _lines(Document("", ""), (name,), v, depth + 1)]
    yield f"{indent}- {inner[0].lstrip()}"
    yield from inner[1:]


def _is_rule(value: Any) -> bool:
    return isinstance(value, dict) and ("from" in value or "fill" in value)


def flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{scalar(k)}: {flow(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return scalar(value)


def scalar(value: Any) -> str:
    """A number, or text, quoted where YAML would read it as something else."""
    if not isinstance(value, str):
        return json.dumps(value)
    plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not value.startswith(("- ", "."))
    return value if plain else json.dumps(value, ensure_ascii=False)

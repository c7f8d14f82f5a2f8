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
    lines: list[str] = []
    for key, value in document.data.items():
        spaced = key in ("dims", "models", "tensors", "blocks", "ignore", "config", "sources", "unsupported", "decode")
        lines += [""] if spaced else []
        lines += _lines(document, (key,), value, 0)
    return "\n".join(lines) + "\n"


def _lines(document: Document, path: Path_, value: Any, depth: int) -> Iterator[str]:
    """`key: value`, on one line if it is short. The reasons of a rule's ops stand before it."""
    indent, key = "  " * depth, scalar(path[-1])
    yield from _reasons(document, path, value, indent)
    line = f"{indent}{key}: {flow(value)}"
    short = len(line) <= WIDTH and depth and path[-1] not in ("tensors", *_blocks(path))
    if not isinstance(value, dict | list) or short:
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
    yield from _reasons(document, path, value, indent)
    line = f"{indent}- {flow(value)}"
    if len(line) <= WIDTH or not isinstance(value, dict):
        yield line
        return
    inner = [line for name, v in value.items() for line in _lines(Document("", ""), (name,), v, depth + 1)]
    yield f"{indent}- {inner[0].lstrip()}"
    yield from inner[1:]


def _blocks(path: Path_) -> Path_:
    """The name of a block, where the path is of one: it is never on one line."""
    return path[-1:] if path[:1] == ("blocks",) and len(path) == 2 else ()


def _reasons(document: Document, path: Path_, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, dict) and ("from" in value or "fill" in value):
        n = len(path)
        found = (f"{p[-1]}: {r}" for p, r in document.reasons.items() if p[:n] == path)
        yield from (f"{indent}# {reason}" for reason in dict.fromkeys(found))


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

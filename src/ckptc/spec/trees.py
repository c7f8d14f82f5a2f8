"""What is known of a target's trees as the target itself makes them: every path, and a digest of each model's whole tree.

`mappings/targets/NAME.trees.json` holds them; `tools/trees.py` writes it from trees that were made by the target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from typing import Any

from ckptc.spec.resources import shipped_file


@cache
def _known(target: str) -> dict[str, Any]:
    path = shipped_file("targets", f"{target}.trees.json")
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def numbered(part: str, lists: Iterable[str]) -> str:
    """A part of a path, with `#` for its number where it is of a list: `layers_3` -> `layers_#`."""
    base, _, number = part.rpartition("_")
    return f"{base}_#" if number.isdigit() and base in lists else part


def plain(target: str, path: str) -> str:
    """A path with `#` for the numbers of layers."""
    lists = _known(target).get("lists", ())
    return "/".join(numbered(part, lists) for part in path.split("/"))


@cache
def known_paths(target: str) -> frozenset[str]:
    """Every path below the collection, `#` for the numbers of layers. Empty where no trees are shipped."""
    return frozenset(_known(target).get("paths", ()))


def tree_digest(target: str, model: str, layout: str) -> str | None:
    """Of a model's tree in a layout (`scan`, `unscan.mm`, …); None where the target has no settings for it."""
    found: str | None = _known(target).get("digests", {}).get(model, {}).get(layout)
    return found


def digest(arrays: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """Of paths and shapes, in the order of the paths."""
    text = json.dumps([[name, list(shape)] for name, shape in sorted(arrays)], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

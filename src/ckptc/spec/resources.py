"""Where the shipped mappings and schemas are: inside the wheel, or at the top of a checkout."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import ckptc


def _folder(name: str) -> Path:
    package = Path(ckptc.__file__).parent
    packed = package / "_data" / name
    return packed if packed.is_dir() else package.parents[1] / name


def mapping_files() -> list[Path]:
    """The shipped families' files, by name."""
    return sorted(p for p in _folder("mappings").glob("*.yaml") if p != logical_file())


def logical_file() -> Path:
    """The shipped vocabulary of logical tensors."""
    return _folder("mappings") / "logical.yaml"


def shipped_file(*parts: str) -> Path:
    """A shipped file by its path below `mappings`."""
    return _folder("mappings").joinpath(*parts)


def target_file(name: str) -> Path:
    """The shipped file of a target tree."""
    return _folder("mappings") / "targets" / f"{name}.yaml"


@cache
def schema(name: str) -> dict[str, Any]:
    """A shipped JSON Schema: `mapping`, `plan`, `target` or `rules`."""
    loaded: dict[str, Any] = json.loads((_folder("schema") / f"{name}.schema.json").read_text(encoding="utf-8"))
    return loaded

"""What a package's modules define: each op and each code is a module of its own, and is known by being there."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

T = TypeVar("T")


def members(package: str, path: Iterable[str], kind: type[T]) -> list[type[T]]:
    """The classes of `kind` that modules of a package define, without those that are abstract; by module and place."""
    out = []
    for module in sorted(m.name for m in iter_modules(path)):
        loaded = import_module(f"{package}.{module}")
        own = [c for c in vars(loaded).values() if isinstance(c, type) and c.__module__ == loaded.__name__]
        out += [c for c in own if issubclass(c, kind) and not inspect.isabstract(c)]
    return out

"""Codes: the ways in which quantised uploads store their weights. One module each; `CODES` is every code, by name."""

from __future__ import annotations

from dataclasses import fields

from ckptc.ops.codes.base import (
    Beside,
    Code,
    Factors,
    Found,
    RefusedError,
    RowLayout,
    Setting,
    Shape,
    Upload,
    check_beside,
)
from ckptc.ops.registry import members
from ckptc.ops.types import OpError

CODES: dict[str, type[Code]] = {code.name: code for code in members(__name__, __path__, Code)}  # type: ignore[type-abstract]


def code_of(name: str, settings: tuple[tuple[str, Setting], ...]) -> Code:
    """The code of a plan's record of it. Raises OpError for a name or settings that no code has."""
    if name not in CODES:
        raise OpError(f"there is no code `{name}`")
    types = {f.name: _TYPES[str(f.type)] for f in fields(CODES[name])}  # type: ignore[arg-type]
    given = dict(settings)
    if given.keys() != types.keys() or not all(_is(value, types[key]) for key, value in given.items()):
        raise OpError(f"the code `{name}` has the settings {', '.join(types) or 'none'}")
    return CODES[name](**given)


_TYPES: dict[str, type] = {"int": int, "bool": bool, "str": str, "Shape": tuple}


def _is(value: Setting, kind: type) -> bool:
    """Whether a value is of a type, and numbers are positive."""
    if isinstance(value, tuple):
        return kind is tuple and all(_is(n, int) for n in value)
    return type(value) is kind and (kind is not int or int(value) > 0)


__all__ = [
    "CODES", "Beside", "Code", "Factors", "Found", "OpError", "RefusedError", "RowLayout", "Setting", "Shape", "Upload",
    "check_beside", "code_of",
]  # fmt: skip

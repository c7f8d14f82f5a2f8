"""Plans as JSON, both ways: stable bytes, one line per file, kind, output and tensor, so that plans diff well.

`dumps` gives the same bytes for the same plan on any machine. `loads` refuses what is not a plan of this format, whole and unedited. The records
of `ckptc.plan.model` say what JSON they have; msgspec reads, checks and writes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import isfinite
from typing import Any

import msgspec

from ckptc.diagnostics import InputError, fail
from ckptc.plan.model import FORMAT, Plan

MAX_BYTES = 100 << 20  # the largest plans have 6 MB
MAX_PARTS = 5_000  # of a kind: stacks are loops, so that a few hundred are many

_FIELDS = {field.name: field for field in msgspec.structs.fields(Plan)}


def dumps(plan: Plan) -> str:
    """The plan's JSON text, with its digest. Raises ValueError for a number that JSON does not have."""
    _check_numbers([msgspec.to_builtins(x) for x in (plan.kinds, plan.layout, plan.choices, plan.padding)])
    body = _encoded(plan)
    lines = [f' "format": {FORMAT}', f' "digest": "{_digest(body)}"']
    for name, text in body.items():
        value = getattr(plan, name)
        if isinstance(value, tuple) and value:
            rows = ",\n  ".join(msgspec.json.encode(row).decode() for row in value)
            lines.append(f' "{name}": [\n  {rows}\n ]')
        else:
            lines.append(f' "{name}": {text.decode()}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def digest(plan: Plan) -> str:
    """sha256 of everything that the plan says."""
    return _digest(_encoded(plan))


def _encoded(plan: Plan) -> dict[str, bytes]:
    """The compact JSON of each field that has not its default."""
    values = ((name, getattr(plan, name)) for name in _FIELDS)
    return {name: msgspec.json.encode(value) for name, value in values if value != _FIELDS[name].default}


def _digest(body: Mapping[str, bytes]) -> str:
    found = hashlib.sha256()
    for name, text in body.items():
        found.update(f'"{name}":'.encode() + text + b"\n")
    return "sha256:" + found.hexdigest()


def loads(text: str | bytes, name: str = "plan") -> Plan:
    """The plan of a JSON text. Raises InputError: `invalid-plan`, `plan-format`, `edited-plan`."""
    if len(text) > MAX_BYTES:
        raise fail("invalid-plan", f"{name} is larger than a plan can be")
    try:
        body = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise _no_plan(name) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise fail(
            "invalid-plan",
            f"{name} is not valid JSON: {reason}",
            help="is the file whole? write it again with `ckptc compile -o`",
        ) from None
    if "format" not in body or "made" not in body:
        raise _no_plan(name)
    format_ = _value(body.pop("format"))
    if format_ != FORMAT or type(format_) is not int:
        raise fail(
            "plan-format",
            f"{name} is a plan of format {format_!r:.40}, this ckptc runs format {FORMAT}",
            help="compile it again",
        )
    if "digest" not in body:
        raise _invalid(name, "it has no `digest`")
    stated = _value(body.pop("digest"))
    plan = _decoded(body, name)
    if stated != (found := digest(plan)):
        raise fail(
            "edited-plan",
            f"{name} was changed after it was written: its digest does not fit",
            notes=(f"expected: {found}", f"found:    {stated!s:.80}"),
            help="compile it again with the options you want",
        )
    return plan


def _no_plan(name: str) -> InputError:
    return fail("invalid-plan", f"{name} is not a ckptc plan", help="write one with `ckptc compile -o`")


def _value(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _decoded(body: Mapping[str, msgspec.Raw], name: str) -> Plan:
    values = {}
    for key, raw in body.items():
        if key not in _FIELDS:
            raise _invalid(name, f"it has a field `{key:.60}`")
        try:
            values[key] = msgspec.json.decode(raw, type=_FIELDS[key].type)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise _invalid(name, f"{key}: {error!s:.200}") from None
    absent = [key for key, field in _FIELDS.items() if field.required and key not in values]
    if absent:
        raise _invalid(name, f"it has no `{absent[0]}`")
    plan = Plan(**values)
    if any(len(kind.parts) > MAX_PARTS for kind in plan.kinds):
        raise _invalid(name, f"a kind has more than {MAX_PARTS} parts")
    return plan


def _invalid(name: str, reason: str) -> InputError:
    return fail("invalid-plan", f"{name} is not a plan: {reason}")


def _check_numbers(value: Any) -> None:
    """Raises ValueError for a number that JSON does not have, and that msgspec would write as null."""
    rest = [value]
    while rest:
        x = rest.pop()
        if isinstance(x, float) and not isfinite(x):
            raise ValueError(f"{x} is no number of JSON")
        rest += x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()


__all__ = ["InputError", "digest", "dumps", "loads"]

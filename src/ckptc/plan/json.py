"""Plans as JSON, both ways: stable bytes, one line per file, tensor and array, so that plans diff well.

`dumps` gives the same bytes for the same plan on any machine. `loads` refuses what is not a plan of this format, whole and unedited.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from math import isfinite
from typing import Any, cast

from jsonschema import Draft7Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import extend

from ckptc.diagnostics import InputError, fail
from ckptc.ops.nest import AxisMap, Factor, Part
from ckptc.plan.export_json import decode_outputs, distinct, encode_outputs, invalid_row, without_rows
from ckptc.plan.model import (
    FORMAT,
    Array,
    Beside,
    Choices,
    Decode,
    File,
    LeftOut,
    Made,
    Plan,
    Source,
    Tensor,
    Totals,
)
from ckptc.spec.resources import schema

MAX_BYTES = 100 << 20  # the largest plans have 6 MB
MAX_PARTS = 5_000  # of an array: stacks are loops, so that a few hundred are many


def dumps(plan: Plan) -> str:
    """The plan's JSON text, with its digest."""
    body = encode(plan)
    body["digest"] = digest(body)
    outputs = body.pop("outputs", None)
    lines = _lines(body, " ")
    if outputs is not None:
        lines.append(' "outputs": {\n' + ",\n".join(_lines(outputs, "  ")) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _lines(body: dict[str, Any], indent: str) -> list[str]:
    """A line a value; of a list, a line an item."""
    lines = []
    for key, value in body.items():
        if isinstance(value, list) and value:
            rows = f",\n{indent} ".join(map(_compact, value))
            lines.append(f'{indent}"{key}": [\n{indent} {rows}\n{indent}]')
        else:
            lines.append(f'{indent}"{key}": {_compact(value)}')
    return lines


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest(body: dict[str, Any]) -> str:
    """sha256 of everything but the digest itself."""
    content = {k: v for k, v in body.items() if k != "digest"}
    return "sha256:" + hashlib.sha256(_compact(content).encode()).hexdigest()


def encode(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, in a fixed order of keys."""
    made = _record(plan.made)
    if plan.made.kind == "import":
        del made["kind"]
    return {
        "format": FORMAT,
        "digest": "",
        "made": made,
        "choices": _choices(plan.choices),
        "totals": _totals(plan.totals),
        "left_out": [_record(x) for x in plan.left_out],
        "files": [_record(x) for x in plan.files],
        "arrays": [_array(x) for x in plan.arrays],
        # A row a tensor: name, file, begin, end. There are tens of thousands.
        "tensors": [[t.name, t.file, t.begin, t.end] for t in plan.tensors],
        **({"outputs": encode_outputs(plan.outputs, _part)} if plan.outputs else {}),
    }


def _record(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__struct_fields__}


def _choices(choices: Choices) -> dict[str, Any]:
    record = {**_record(choices), "dims": dict(choices.dims), "mesh": [list(axis) for axis in choices.mesh]}
    if not choices.mesh:
        del record["mesh"]
    if choices.compression == "none":
        del record["compression"]
    if not choices.link:
        del record["link"]
    if choices.scan_axis == 1:
        del record["scan_axis"]
    if not choices.pipeline:
        del record["pipeline"]
    return record


def _totals(totals: Totals) -> dict[str, Any]:
    record = _record(totals)
    return {k: v for k, v in record.items() if v or k not in ("linked_bytes", "reread_bytes")}


def _array(array: Array) -> dict[str, Any]:
    record = _record(array)
    for key in ("spec", "indivisible", "stored"):
        if not record[key]:
            del record[key]
    record["path"] = array.name
    record["sources"] = [
        {k: _decode_record(v) if isinstance(v, Decode) else v for k, v in _record(s).items() if v is not None}
        for s in array.sources
    ]
    record["parts"] = [_part(p) for p in array.parts]
    if array.link is None:
        del record["link"]
    return record


def _decode_record(decode: Decode) -> dict[str, Any]:
    return {
        **_record(decode),
        "settings": [list(s) for s in decode.settings],
        "beside": [_record(b) for b in decode.beside],
    }


def _part(part: Part) -> dict[str, Any]:
    """An axis is [start, [[size, weight, step, tensor], …]]; `value` stands where there is no source."""
    axes = [[a.start, [[f.size, f.weight, f.step, f.tensor] for f in a.factors]] for a in part.axes]
    out: dict[str, Any] = (
        {"value": part.value}
        if part.source is None
        else {"source": part.source, "base": part.base, "first": part.first}
    )
    return {**out, "axes": axes, "math": [list(m) for m in part.math]}


def loads(text: str | bytes, name: str = "plan") -> Plan:
    """The plan of a JSON text. Raises InputError: `invalid-plan`, `plan-format`, `edited-plan`."""
    if len(text) > MAX_BYTES:
        raise fail("invalid-plan", f"{name} is larger than a plan can be")
    try:
        body = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
        _compact(body).encode()  # half of a surrogate pair, which JSON can escape, is no text
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise fail(
            "invalid-plan",
            f"{name} is not valid JSON: {reason}",
            help="is the file whole? write it again with `ckptc compile -o`",
        ) from None
    if not isinstance(body, dict) or "format" not in body or "arrays" not in body:
        raise fail("invalid-plan", f"{name} is not a ckptc plan", help="write one with `ckptc compile -o`")
    if body["format"] != FORMAT:
        raise fail(
            "plan-format",
            f"{name} is a plan of format {body['format']!r}, this ckptc runs format {FORMAT}",
            help="compile it again",
        )
    _validate(body, name)
    if body["digest"] != digest(body):
        raise fail(
            "edited-plan",
            f"{name} was changed after it was written: its digest does not fit",
            notes=(f"expected: {digest(body)}", f"found:    {body['digest']}"),
            help="compile it again with the options you want",
        )
    return decode(body)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise ValueError(f"{digits} is larger than a number can be")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return out


def _validate(body: dict[str, Any], name: str) -> None:
    # The long tables are checked here: jsonschema would take seconds for tens of thousands of rows. The schema says the same of them.
    rows = body.get("tensors")
    light = {**body, "tensors": rows[:1] if isinstance(rows, list) else rows}
    if isinstance(body.get("outputs"), dict):
        kinds = body["outputs"].get("kinds")
        if isinstance(kinds, list) and any(map(_crowded, kinds)):
            raise fail("invalid-plan", f"{name} is not a plan: a kind of tensors has more than {MAX_PARTS} parts")
        light["outputs"] = without_rows(body["outputs"])
    lists: list[list[Any]] = []
    if isinstance(body["arrays"], list):
        # Arrays of different layers differ in their paths and tensors alone: each kind is validated once.
        if any(map(_crowded, body["arrays"])):
            raise fail("invalid-plan", f"{name} is not a plan: an array has more than {MAX_PARTS} parts")
        kinds = {_compact(short): short for short in (_without_lists(a, lists) for a in body["arrays"])}
        light["arrays"] = list(kinds.values())
    error = best_match(_validator().iter_errors(light))
    if error is not None:
        where = "/".join(map(str, error.absolute_path))
        raise fail("invalid-plan", f"{name} is not a plan: {where or 'the plan'}: {error.message[:200]}")
    for row in rows or []:
        if not (
            type(row) is list
            and len(row) == 4
            and type(row[0]) is str
            and all(type(x) is int for x in row[1:])
            and row[1] >= -1
            and 0 <= row[2] <= row[3]
        ):
            raise fail(
                "invalid-plan",
                f"{name} is not a plan: a row of `tensors` is not [name, file, begin, end]: {str(row)[:120]}",
            )
    count = len(rows or [])
    if "outputs" in body and (wrong := invalid_row(body["outputs"], count)):
        raise fail("invalid-plan", f"{name} is not a plan: {wrong}")
    for numbers in lists:
        if not all(type(x) is int and 0 <= x < count for x in numbers):
            raise fail("invalid-plan", f"{name} is not a plan: a list of tensors names one that is not there")


def _crowded(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(parts := record.get("parts"), list) and len(parts) > MAX_PARTS


def _without_lists(array: Any, lists: list[list[Any]]) -> Any:
    if not isinstance(array, dict) or not isinstance(array.get("sources"), list):
        return array
    short = []
    for source in array["sources"]:
        if isinstance(source, dict) and isinstance(source.get("tensors"), list):
            source = _without_list(source, lists)
            decode = source.get("decode")
            if isinstance(decode, dict) and isinstance(decode.get("beside"), list):
                source["decode"] = {**decode, "beside": [_without_list(b, lists) for b in decode["beside"]]}
        short.append(source)
    parts = array.get("parts")
    if isinstance(parts, list):
        array = {**array, "parts": distinct(parts)}
    path = array.get("path")
    if isinstance(path, str) and all(path.split("/")):
        path = "checked"
    return {**array, "path": path, "sources": short}


def _without_list(record: Any, lists: list[list[Any]]) -> Any:
    if not isinstance(record, dict) or not isinstance(record.get("tensors"), list):
        return record
    lists.append(record["tensors"])
    return {**record, "tensors": [0] * min(1, len(record["tensors"]))}


@cache
def _validator() -> Draft7Validator:
    # To JSON Schema 2.0 is an integer too; as a position in a list it is none.
    integers = Draft7Validator.TYPE_CHECKER.redefine("integer", lambda _, x: type(x) is int)
    strict: type[Draft7Validator] = extend(Draft7Validator, type_checker=integers)  # type: ignore[no-untyped-call]
    return strict(schema("plan"))


def decode(body: dict[str, Any]) -> Plan:
    """The records of validated JSON values. Raises InputError where they contradict each other."""
    try:
        plan = Plan(
            made=Made(**body["made"]),
            choices=_decode_choices(body["choices"]),
            files=tuple(File(**f) for f in body["files"]),
            tensors=tuple(Tensor(*row) for row in body["tensors"]),
            arrays=tuple(_decode_array(a) for a in body["arrays"]),
            left_out=tuple(LeftOut(**x) for x in body["left_out"]),
            totals=Totals(**body["totals"]),
            outputs=decode_outputs(body["outputs"], _decode_part) if "outputs" in body else None,
        )
    except (TypeError, KeyError, ValueError) as error:
        raise fail("invalid-plan", f"not a plan: {error}") from None
    return plan


def _decode_choices(c: dict[str, Any]) -> Choices:
    mesh = tuple((name, size) for name, size in c.get("mesh", ()))
    return Choices(**{**c, "dims": tuple(c["dims"].items()), "mesh": mesh})


def _decode_array(a: dict[str, Any]) -> Array:
    return Array(
        path=tuple(a["path"].split("/")), shape=tuple(a["shape"]), dtype=a["dtype"], chunk=tuple(a["chunk"]), unit=tuple(a["unit"]),
        shards=tuple(a["shards"]), axes=tuple(a["axes"]), rule=a["rule"], ops=tuple(a["ops"]),
        sources=tuple(_decode_source(s) for s in a["sources"]), parts=tuple(_decode_part(p) for p in a["parts"]),
        spec=tuple(map(tuple, a.get("spec", ()))), indivisible=tuple(map(tuple, a.get("indivisible", ()))),
        link=tuple(a["link"]) if "link" in a else None, stored=tuple(a.get("stored", ())),
    )  # fmt: skip


def _decode_source(s: dict[str, Any]) -> Source:
    d = s.get("decode")
    decoded = None
    if d:
        settings = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in d["settings"])
        beside = tuple(Beside(b["dtype"], tuple(b["shape"]), tuple(b["tensors"])) for b in d["beside"])
        decoded = Decode(d["code"], settings, tuple(d["shape"]), beside)
    return Source(s["dtype"], tuple(s["shape"]), tuple(s["tensors"]), decoded)


def _decode_part(p: dict[str, Any]) -> Part:
    axes = tuple(AxisMap(start, tuple(Factor(*f) for f in factors)) for start, factors in p["axes"])
    math = tuple(cast("tuple[str, float | str]", tuple(m)) for m in p["math"])
    return Part(p.get("source"), p.get("base", 0), p.get("first", 0), axes, math, p.get("value", 0.0))


__all__ = ["InputError", "decode", "digest", "dumps", "encode", "loads"]

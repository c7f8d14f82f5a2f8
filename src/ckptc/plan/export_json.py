"""The part of a plan's JSON that only an export has: its outputs. A row a tensor, all else once for each kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ckptc.ops.nest import AxisMap, Factor, Part
from ckptc.plan.model import Exactness, File
from ckptc.plan.outputs import Exported, Kind, OutputFile, Outputs, Padding, Stored

PartToJson = Callable[[Part], dict[str, Any]]
PartFromJson = Callable[[dict[str, Any]], Part]
ROWS = ("tensors", "twins")  # lists of thousands of rows of tensors


def encode_outputs(outputs: Outputs, part: PartToJson) -> dict[str, Any]:
    """As JSON values. `part` encodes a part."""
    return {
        # A row a file: name, size, bytes of its header, how many tensors.
        "files": [[f.name, f.size, f.header, f.count] for f in outputs.files],
        "kinds": [_kind(k, part) for k in outputs.kinds],
        # A row a tensor: name, kind, and for each source of the kind the stored array and where the tensor begins.
        "tensors": [[t.name, t.kind, *t.places] for t in outputs.tensors],
        "twins": [[t.name, t.kind, *t.places] for t in outputs.twins],
        "batches": [list(b) for b in outputs.batches],
        "config": outputs.config,
        "companions": [{"name": f.name, "size": f.size, "header": f.header} for f in outputs.companions],
        "padding": [_padding(p) for p in outputs.padding],
        "notes": list(outputs.notes),
    }


def _kind(kind: Kind, part: PartToJson) -> dict[str, Any]:
    exactness = [kind.exactness.above, kind.exactness.relative, kind.exactness.absolute]
    return {
        "rule": kind.rule,
        "shape": list(kind.shape),
        "dtype": kind.dtype,
        "unit": list(kind.unit),
        "ops": list(kind.ops),
        "exactness": exactness,
        "sources": [_stored(s) for s in kind.sources],
        "parts": [part(p) for p in kind.parts],
    }


def _stored(stored: Stored) -> dict[str, Any]:
    return {"shape": list(stored.shape), "dtype": stored.dtype, "chunk": list(stored.chunk)}


def _padding(padding: Padding) -> dict[str, Any]:
    axes = [[a.start, [[f.size, f.weight] for f in a.factors]] for a in padding.axes]
    return {
        "tensor": padding.tensor,
        "array": _stored(padding.array),
        "axes": axes,
        "axis": padding.axis,
        "value": padding.value,
    }


def without_rows(body: dict[str, Any]) -> dict[str, Any]:
    """The values with one item in each list of thousands, for the schema; `invalid_row` and `decode_outputs` check the
    others.
    """
    short = {key: body[key][:1] for key in (*ROWS, "batches") if isinstance(body.get(key), list)}
    kinds = body.get("kinds")
    if isinstance(kinds, list):
        alike = [
            {**k, "parts": distinct(k["parts"])} if isinstance(k, dict) and isinstance(k.get("parts"), list) else k
            for k in kinds
        ]
        short["kinds"] = alike
    return {**body, **short}


def distinct(parts: list[Any]) -> list[Any]:
    """The parts, as JSON values, that differ in more than where they begin: a schema says the same of the others."""
    return list({json.dumps(p): p for p in map(_without_base, parts)}.values())


def _without_base(part: Any) -> Any:
    found = isinstance(part, dict) and type(part.get("base")) is int and part["base"] > 0
    return {**part, "base": 0} if found else part


def invalid_row(body: dict[str, Any], arrays: int) -> str | None:
    """What is wrong with the first row that is no tensor's, if one is, in a plan of `arrays` stored arrays."""
    lengths = [2 + 2 * len(kind["sources"]) for kind in body["kinds"]]
    for key in ROWS:
        for row in body[key]:
            if not (
                type(row) is list
                and len(row) >= 4
                and type(row[0]) is str
                and row[0]
                and all(type(x) is int and x >= 0 for x in row[1:])
                and row[1] < len(lengths)
                and len(row) == lengths[row[1]]
                and max(row[2::2]) < arrays
            ):
                return f"a row of `outputs/{key}` is not [name, kind, array, begin, …]: {str(row)[:120]}"
    for batch in body["batches"]:
        if type(batch) is not list or not batch or not all(type(x) is int and x >= 0 for x in batch):
            return f"a batch is not a list of tensors: {str(batch)[:120]}"
    return None


def decode_outputs(body: dict[str, Any], part: PartFromJson) -> Outputs:
    """The records of validated JSON values. Raises ValueError where the files do not hold every tensor."""
    outputs = Outputs(
        kinds=tuple(_decode_kind(k, part) for k in body["kinds"]),
        tensors=tuple(Exported(row[0], row[1], tuple(row[2:])) for row in body["tensors"]),
        files=tuple(OutputFile(*row) for row in body["files"]),
        batches=tuple(map(tuple, body["batches"])),
        config=body["config"],
        companions=tuple(File(**f) for f in body["companions"]),
        padding=tuple(_decode_padding(p) for p in body["padding"]),
        twins=tuple(Exported(row[0], row[1], tuple(row[2:])) for row in body["twins"]),
        notes=tuple(body["notes"]),
    )
    held = sum(f.count for f in outputs.files)
    if held != len(outputs.tensors):
        raise ValueError(f"the files hold {held} of {len(outputs.tensors)} tensors")
    return outputs


def _decode_kind(k: dict[str, Any], part: PartFromJson) -> Kind:
    return Kind(
        shape=tuple(k["shape"]),
        dtype=k["dtype"],
        unit=tuple(k["unit"]),
        rule=k["rule"],
        ops=tuple(k["ops"]),
        sources=tuple(_decode_stored(s) for s in k["sources"]),
        parts=tuple(part(p) for p in k["parts"]),
        exactness=Exactness(*k["exactness"]),
    )


def _decode_stored(s: dict[str, Any]) -> Stored:
    return Stored(tuple(s["shape"]), s["dtype"], tuple(s["chunk"]))


def _decode_padding(p: dict[str, Any]) -> Padding:
    axes = tuple(
        AxisMap(start, tuple(Factor(size, weight, 0) for size, weight in factors)) for start, factors in p["axes"]
    )
    return Padding(p["tensor"], _decode_stored(p["array"]), axes, p["axis"], p["value"])

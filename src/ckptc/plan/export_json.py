"""The part of a plan's JSON that only an export has: its outputs, and how near its tensors are to the original's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ckptc.plan.model import Array, Exactness, File
from ckptc.plan.outputs import OutputFile, Outputs, Padding

ArrayToJson = Callable[[Array], dict[str, Any]]
ArrayFromJson = Callable[[dict[str, Any]], Array]


def encode_outputs(outputs: Outputs, array: ArrayToJson) -> dict[str, Any]:
    """As JSON values. `array` encodes an array."""
    return {
        # A row a file: name, size, its first array, and where each of its arrays begins.
        "files": [[f.name, f.size, f.first, list(f.begins)] for f in outputs.files],
        "batches": [list(b) for b in outputs.batches],
        "config": outputs.config,
        "companions": [asdict(f) for f in outputs.companions],
        "padding": [asdict(p) for p in outputs.padding],
        "twins": [array(a) for a in outputs.twins],
        "chunks": [[n, list(c)] for n, c in outputs.chunks.items()],
        "notes": list(outputs.notes),
    }


def without_lists(body: dict[str, Any]) -> dict[str, Any]:
    """The values with one item in each list of thousands, for the schema; `decode_outputs` checks the lists
    themselves.
    """
    files, batches = body.get("files"), body.get("batches")
    if isinstance(files, list):
        files = [
            [*f[:3], f[3][:1]] if isinstance(f, list) and len(f) == 4 and isinstance(f[3], list) else f for f in files
        ]
    return {**body, "files": files, "batches": batches[:1] if isinstance(batches, list) else batches}


def decode_outputs(body: dict[str, Any], array: ArrayFromJson, arrays: int) -> Outputs:
    """The records of validated JSON values, for a plan of `arrays` arrays. Raises ValueError where they contradict
    it.
    """
    outputs = Outputs(
        files=tuple(OutputFile(name, size, first, tuple(begins)) for name, size, first, begins in body["files"]),
        batches=tuple(tuple(b) for b in body["batches"]),
        config=body["config"],
        companions=tuple(File(**f) for f in body["companions"]),
        padding=tuple(_padding(p) for p in body["padding"]),
        twins=tuple(array(a) for a in body["twins"]),
        chunks={n: tuple(c) for n, c in body["chunks"]},
        notes=tuple(body["notes"]),
    )
    made = sorted(n for batch in outputs.batches for n in batch)
    if not all(type(n) is int for n in made) or not all(outputs.batches):
        raise ValueError("a batch is not a list of arrays")
    if made != list(range(arrays)):
        raise ValueError("the batches do not make every array once")
    at = 0
    for file in outputs.files:
        if file.first != at:
            raise ValueError(f"{file.name} does not begin with array {at}")
        places = [*file.begins, file.size]
        if not all(type(n) is int for n in places) or places != sorted(places) or places[0] < 8:
            raise ValueError(f"the arrays of {file.name} do not lie one after the other")
        at += len(file.begins)
    if at != arrays:
        raise ValueError(f"the files hold {at} of {arrays} arrays")
    return outputs


def _padding(body: dict[str, Any]) -> Padding:
    padding = Padding(**body)
    return replace(padding, shape=tuple(padding.shape), box=tuple((low, high) for low, high in padding.box))


def encode_exactness(exactness: Exactness) -> list[float | None]:
    """[above, relative, absolute]."""
    return [exactness.above, exactness.relative, exactness.absolute]

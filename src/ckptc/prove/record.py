"""A proof that passed, as a file beside the mapping: `proofs/MODEL.json`.

It holds the digest of the family as its target runs it: rules in their explicit form, and dims. Where files move and
their rules stay, the proof stays; where a rule changes, the family is unproved again. Numbers and repositories of
models are no part of the digest: what they say is checked against headers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptc.prove.compare import Found
from ckptc.spec.mapping import Family, Model
from ckptc.spec.resources import shipped_file

MEANING = ("target", "dims", "tensors", "blocks", "sources", "unsupported")


@dataclass(frozen=True)
class Record:
    family: str
    model: str
    digest: str  # of the family as its target runs it
    versions: dict[str, str]  # of both sides
    results: list[dict[str, Any]]  # by layout and loader: relative difference and KL of logits
    points: int  # compared inside of the models
    export: float  # largest relative difference of the exported tensors to the original's
    note: str = ""
    deviation: str = ""

    @property
    def said(self) -> str:
        v = self.versions
        return f"meaning proved against transformers {v['transformers']} and MaxText {v['maxtext']}"


def digest(family: Family) -> str:
    """Of what the family means to its target."""
    data = family.document.data
    text = json.dumps({key: data.get(key) for key in MEANING}, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def made(family: Family, model: str, found: Iterable[Found], export: float, **others: Any) -> Record:
    rows = list(found)
    results = [
        {"layout": f.layout, "loader": f.loader, "relative": _short(f.relative), "kl": _short(f.kl)} for f in rows
    ]
    points = max((len(f.points) for f in rows), default=0)
    return Record(family.family, model, digest(family), results=results, points=points, export=_short(export), **others)


def _short(number: float) -> float:
    return float(f"{number:.2g}")


def folder(mapping: Path | None) -> Path:
    """Where the proofs of a mapping lie: beside its file, or beside the shipped ones."""
    return mapping.parent / "proofs" if mapping else shipped_file("proofs")


def save(record: Record, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{record.model}.json"
    temporary = path.with_suffix(".json.new")
    temporary.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def load_record(path: Path) -> Record | None:
    """The record; None for a file that is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Record(**data)
    except (OSError, ValueError, TypeError):
        return None


def records(directory: Path) -> list[Record]:
    found = (load_record(path) for path in sorted(directory.glob("*.json")))
    return [record for record in found if record is not None]


def proved(family: Family, model: str, mapping: Path | None) -> Record | None:
    """The proof that covers a model: its own, or that of another model of the family as it is now."""
    wanted = digest(family)
    fitting = [
        r for r in records(folder(mapping)) if r.family == family.family and r.digest == wanted and not r.deviation
    ]
    return next((r for r in fitting if r.model == model), fitting[0] if fitting else None)


def said(family: Family, model: Model, mapping: Path | None, headers: bool = True) -> str:
    """What is proved of a model, for people. `headers`: whether a checkpoint's have been checked."""
    record = proved(family, model.name, mapping)
    if record is None:
        return (
            "shapes and coverage are proved; meaning is not" if headers else "meaning is not proved"
        ) + ": `ckptc prove`"
    return record.said + (f" (on {record.model})" if record.model != model.name else "")

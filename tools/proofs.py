"""Writes docs/proofs.md from the records of proofs: `python tools/proofs.py`. A test compares the two."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "mappings" / "proofs"
PAGE = ROOT / "docs" / "proofs.md"
HEAD = """\
# What is proved of the shipped mappings

Made by `tools/proofs.py` from the records in `mappings/proofs/`, each of which `ckptc prove --model NAME` wrote. The checkpoint's class in transformers
and MaxText's model, with the same tiny random weights, compute the same logits; a number is the largest difference over layouts and loaders, in parts
of the largest logit. `points` are places inside of the models that are compared as well: what goes into and comes out of each attention and MLP, its
heads, their scores, the router. `export` is the largest difference of a tensor on the way back, in parts of the larger number.
Text models; towers and quantised sources are not proved by this.

A record holds the digest of the family's rules and dims. Where these change, a test fails until the proof has been made again, and `ckptc compile`
says that the meaning is not proved. Models of a family share its rules: a record stands for all of them.
"""
COLUMNS = ("family", "model", "layouts", "loaders", "logits", "KL", "points", "export", "against")


def row(record: dict[str, object]) -> list[str]:
    results = record["results"]
    assert isinstance(results, list)
    versions = record["versions"]
    assert isinstance(versions, dict)
    return [
        str(record["family"]),
        str(record["model"]),
        ", ".join(dict.fromkeys(r["layout"] for r in results)),
        ", ".join(dict.fromkeys(r["loader"] for r in results)),
        f"{max(r['relative'] for r in results):.1e}",
        f"{max(abs(r['kl']) for r in results):.1e}",
        str(record["points"]),
        f"{record['export']:.1e}",
        f"transformers {versions['transformers']}, MaxText {versions['maxtext']}",
    ]


def page() -> str:
    records = [json.loads(path.read_text("utf-8")) for path in sorted(RECORDS.glob("*.json"))]
    records.sort(key=lambda r: (r["family"], r["model"]))
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *(f"| {' | '.join(row(r))} |" for r in records)]
    notes = [f"- {r['model']}: {r['note']}." for r in records if r["note"]]
    known = [f"- {r['model']}: {r['deviation']}." for r in records if r["deviation"]]
    text = HEAD + "\n" + "\n".join(lines) + "\n"
    if notes:
        text += "\n## Where the configuration is not the published one\n\n" + "\n".join(notes) + "\n"
    if known:
        text += (
            "\n## Where MaxText's model is known to differ\n\nThese count as no proof.\n\n" + "\n".join(known) + "\n"
        )
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

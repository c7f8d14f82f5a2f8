"""Checks converted weights by what they compute: MaxText's model on them, next to transformers' on the originals.

    python tools/forward.py WORKDIR [CASE ...] --transformers-python PYTHON --maxtext-python PYTHON
                            [--layout scan] [--loader pretrained] [--json FILE]

`ckptc prove` does this for users, says where the models part, and records what passed. This remains for the cases that it
does not have yet: latent and compressed attention, hybrid stacks, and text models inside multimodal ones
(`forward_cases_latent.py`, `forward_cases_wrapped.py`), and those that state a deviation of MaxText's.

This trusts no mapping. For each case of `forward_cases*.py` it

 1. makes a tiny random checkpoint with the Hub's class and `save_pretrained`, and the logits of the class, in the
    first environment (`forward_transformers.py`);
 2. converts it with ckptc, in this Python;
 3. restores the result into MaxText's own model and computes the same logits, in the second environment
    (`forward_maxtext.py`), once by each of the three ways in which MaxText restores parameters;
 4. compares: the largest difference, also in parts of the largest logit, the mean KL divergence, and how often both
    choose the same token first.

Everything is float32, so that two right models differ by rounding alone, some 1e-6 of the largest logit. The first
environment needs torch and transformers. The second needs Python 3.12 and

    pip install --no-deps maxtext==0.2.5
    pip install jax flax orbax-checkpoint omegaconf pydantic optax aqtp qwix tokamax grain drjax pathwaysutils \\
        cloud-accelerator-diagnostics transformers jaxtyping ml_collections absl-py psutil sentencepiece tiktoken \\
        jinja2 pillow sympy

A case may state a known deviation of MaxText's model; its row then says so and does not fail. Exit code: 0 where all
others agree, 1 where some do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forward_cases import DENSE, SPARSE, Case
from forward_cases_latent import LATENTS
from forward_cases_wrapped import WRAPPED

CASES = [*DENSE, *SPARSE, *LATENTS, *WRAPPED]
HERE = Path(__file__).resolve().parent
LOADERS = ["train", "pretrained", "linen"]  # what they are: `forward_maxtext.py`
TOLERANCE = 1e-3  # of the largest logit: far above float32 noise, far below any wrong array


@dataclass(frozen=True)
class Row:
    """One case in one layout, restored by one of MaxText's loaders."""

    case: str
    family: str
    model: str
    layout: str
    loader: str
    verdict: str  # agrees, deviates (as known), DIFFERS, or FAILED
    largest: float | None = None  # |difference| of logits
    relative: float | None = None  # the same, in parts of the largest logit
    kl: float | None = None  # mean over positions, in nats
    top1: float | None = None  # share of positions where both choose the same token
    note: str = ""


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def compare(case: Case, layout: str, loader: str, directory: Path) -> Row:
    row = Row(case.name, case.family, case.model, layout, loader, "FAILED")
    for error in (directory.parent / "error", directory / "error", directory / f"error.{loader}"):
        if error.exists():
            return dataclasses.replace(row, note=error.read_text(encoding="utf-8").splitlines()[0])
    with np.load(directory.parent / "expected.npz") as file:
        expected = file["logits"].astype(np.float64)
    with np.load(directory / f"actual.{loader}.npz") as file:
        actual = file["logits"].astype(np.float64)[..., : expected.shape[-1]]  # MaxText's vocabulary may be padded
    largest = float(np.abs(actual - expected).max())
    relative = largest / float(np.abs(expected).max())
    first, second = log_softmax(expected), log_softmax(actual)
    if relative <= TOLERANCE:
        verdict = "agrees"
    else:
        verdict = "deviates" if case.deviation else "DIFFERS"
    return dataclasses.replace(
        row,
        verdict=verdict,
        largest=largest,
        relative=relative,
        kl=float((np.exp(first) * (first - second)).sum(-1).mean()),
        top1=float((expected.argmax(-1) == actual.argmax(-1)).mean()),
        note="; ".join(filter(None, [case.note, case.deviation])),
    )


def convert(case: Case, layout: str, directory: Path) -> None:
    """Converts in this Python; leaves the file `error` where ckptc refuses."""
    command = [sys.executable, "-m", "ckptc", "convert", "--model", case.model, "--quiet", "--jobs", "1"]
    command += ["--source", str(directory.parent / "hf"), "--output", str(directory / "maxtext"), "--dtype", "float32"]
    command += ["--scan" if layout == "scan" else "--no-scan"]
    for setting in case.set:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        message = done.stderr.strip() or done.stdout.strip()
        (directory / "ckptc.log").write_text(message, encoding="utf-8")
        (directory / "error").write_text(f"ckptc: {message.splitlines()[0]}", encoding="utf-8")


def work_through(
    work: Path, cases: list[Case], layouts: list[str], loaders: list[str], transformers: str, maxtext: str
) -> list[Row]:
    pairs = [(case, layout) for case in cases for layout in layouts if layout in case.layouts]
    for case in cases:
        shutil.rmtree(work / case.name, ignore_errors=True)
    listing = work / "checkpoints.json"
    listing.write_text(json.dumps([dataclasses.asdict(case) for case in cases]), encoding="utf-8")
    subprocess.run([transformers, str(HERE / "forward_transformers.py"), str(listing), str(work)], check=True)
    ready = []
    for case, layout in pairs:
        directory = work / case.name / layout
        if not (directory.parent / "error").exists():
            directory.mkdir()
            convert(case, layout, directory)
            ready.append(
                {
                    "model": case.model,
                    "maxtext": case.maxtext,
                    "layout": layout,
                    "directory": str(directory),
                    "loaders": loaders,
                }
            )
    listing = work / "forwards.json"
    listing.write_text(json.dumps(ready), encoding="utf-8")
    subprocess.run([maxtext, str(HERE / "forward_maxtext.py"), str(listing)], check=True)
    return [compare(case, layout, loader, work / case.name / layout) for case, layout in pairs for loader in loaders]


def table(rows: list[Row]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [["CASE", "MODEL", "LAYOUT", "LOADER", "MAX |D|", "RELATIVE", "KL", "TOP-1", "VERDICT"]]
    for row in rows:
        numbers = [
            number(row.largest, ".1e"),
            number(row.relative, ".1e"),
            number(row.kl, ".1e"),
            number(row.top1, ".1%"),
        ]
        lines.append([row.case, row.model, row.layout, row.loader, *numbers, row.verdict])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = (
        f"{row.case} ({row.layout}{', ' + row.loader if row.verdict == 'FAILED' else ''}): {row.note}"
        for row in rows
        if row.note
    )
    text += ["", *dict.fromkeys(notes)]
    return "\n".join(text).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="WORKDIR", help="where checkpoints and logits go; some MB")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only these cases (default: all)")
    parser.add_argument("--transformers-python", required=True, metavar="PYTHON", help="has torch and transformers")
    parser.add_argument("--maxtext-python", required=True, metavar="PYTHON", help="has MaxText 0.2.5")
    parser.add_argument("--layout", choices=["scan", "unscan", "both"], default="both")
    parser.add_argument(
        "--loader", choices=[*LOADERS, "all"], default="all", help="how MaxText restores the parameters (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_intermixed_args()
    known = {case.name: case for case in CASES}
    if unknown := [name for name in options.cases if name not in known]:
        parser.error(f"unknown cases: {', '.join(unknown)}; there are: {', '.join(known)}")
    cases = [known[name] for name in options.cases] or list(CASES)
    layouts = ["scan", "unscan"] if options.layout == "both" else [options.layout]
    loaders = LOADERS if options.loader == "all" else [options.loader]
    options.work.mkdir(parents=True, exist_ok=True)
    rows = work_through(
        options.work.resolve(), cases, layouts, loaders, options.transformers_python, options.maxtext_python
    )
    print(table(rows))
    if options.json:
        options.json.write_text(
            json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8"
        )
    return int(any(row.verdict in ("DIFFERS", "FAILED") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

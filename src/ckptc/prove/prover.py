"""A proof's steps: make the checkpoint, convert it, run both models, compare, export, compare tensors.

Both models run as programs in Pythons of their own; conversions and exports run as a user runs them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from ckptc.diagnostics import fail
from ckptc.prove.case import Case
from ckptc.prove.compare import Found, compare

LOADERS = ("train", "pretrained", "linen")  # what they are: `sides/maxtext_side.py`
EXPORT_TOLERANCE = 1e-6  # of the larger number: factors are rounded once in float32, each way


@dataclass(frozen=True)
class Outcome:
    """What a case gave."""

    found: tuple[Found, ...]  # by layout and loader
    failed: tuple[tuple[str, str, str], ...]  # layout, loader, why the target's model did not run
    export: float  # largest relative difference of the exported tensors
    export_problem: str  # empty where the exported tensors are the original's
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        return bool(self.found) and not self.failed and not self.export_problem and all(f.agrees for f in self.found)


@dataclass(frozen=True)
class Work:
    """Where and with what a proof runs."""

    directory: Path
    transformers: str  # Pythons
    target: str
    layouts: tuple[str, ...]
    loaders: tuple[str, ...] = LOADERS
    mapping: Path | None = None
    source: Path | None = None  # real weights
    layers: int = 0  # of them
    say: Callable[[str], None] = lambda text: None


def prove(case: Case, work: Work) -> Outcome:
    """Runs a case. Raises InputError where a side cannot be run, or ckptc refuses the conversion (with its own text)."""
    directory = work.directory
    directory.mkdir(parents=True, exist_ok=True)
    work.say("transformers makes the checkpoint and computes on it")
    job = {
        "class": case.class_,
        "config": dict(case.config),
        "seed": case.seed,
        "tokens": case.tokens,
        "batch": case.batch,
        "length": case.length,
        "rename": case.rename,
        "transpose": case.transpose,
        "source": str(work.source) if work.source else "",
        "layers": work.layers,
    }
    side(work.transformers, "transformers", job, directory)
    for layout in work.layouts:
        work.say(f"ckptc converts it, {layout}")
        convert(case, layout, work)
    job = {
        "maxtext_model": case.maxtext_model,
        "maxtext": dict(case.maxtext),
        "layouts": work.layouts,
        "loaders": work.loaders,
    }
    work.say("MaxText restores and computes: " + ", ".join(f"{a} by {b}" for a in work.layouts for b in work.loaders))
    side(work.target, "maxtext", job, directory)
    found, failed = [], []
    for layout in work.layouts:
        for loader in work.loaders:
            error = directory / f"error.{layout}.{loader}"
            if error.exists():
                failed.append((layout, loader, " ".join(error.read_text(encoding="utf-8").split())[:400]))
            else:
                found.append(compare(directory, layout, loader))
    work.say("ckptc exports it, and tensors are compared")
    export, problem = exported(case, work)
    versions: dict[str, str] = {}
    for name in ("transformers", "maxtext"):
        versions |= json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
    return Outcome(tuple(found), tuple(failed), export, problem, versions)


def side(python: str, name: str, job: dict[str, Any], directory: Path) -> None:
    """Runs one of the programs in `sides/`. Raises `proof-side-failed` with the last of what it said."""
    path = directory / f"job.{name}.json"
    path.write_text(json.dumps(job, default=str), encoding="utf-8")
    # `python -P` and a clean path: what the program imports is of its own environment.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    log = directory / f"{name}.log"
    with as_file(files("ckptc.prove") / "sides" / f"{name}_side.py") as program, log.open("wb") as out:
        try:
            done = subprocess.run([python, "-P", str(program), str(path)], stdout=out, stderr=out, env=environment)
        except OSError as error:
            raise fail(
                "proof-side-failed",
                f"cannot run {python}: {error.strerror}",
                help="`ckptc prove --setup DIR` makes both environments",
            ) from None
    if done.returncode == 0:
        return
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    missing = next((line for line in reversed(lines) if line.startswith("ModuleNotFoundError")), None)
    raise fail(
        "proof-side-failed",
        f"{name}'s side of the proof failed: {missing or lines[-1]}",
        notes=(f"python: {python}", f"log: {log}"),
        help="`ckptc prove --setup DIR` makes an environment that has it"
        if missing
        else "the class and its config are in `proofs/FAMILY.yaml` beside the mapping; the log has the whole text",
    )


def ckptc(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ckptc", *arguments], capture_output=True, text=True)


def named(case: Case, work: Work) -> list[str]:
    out = ["--model", case.model]
    if work.mapping:
        out += ["--mapping", str(work.mapping)]
    for name, value in case.set.items():
        out += ["--set", f"{name}={value}"]
    return out


def convert(case: Case, layout: str, work: Work) -> None:
    """Converts as a user does, in float32. Raises `proof-not-converted` with what ckptc said."""
    output = work.directory / layout
    shutil.rmtree(output, ignore_errors=True)
    words = ["convert", *named(case, work), "--quiet", "--jobs", "1", "--dtype", "float32"]
    words += ["--source", str(work.directory / "hf"), "--output", str(output)]
    done = ckptc([*words, "--scan" if layout == "scan" else "--no-scan"])
    if done.returncode:
        message = done.stderr.strip() or done.stdout.strip()
        raise fail(
            "proof-not-converted",
            f"the tiny checkpoint of `{case.class_}` does not convert with this mapping ({layout})",
            notes=tuple(message.splitlines()[:12]),
            help=f"the checkpoint is in {work.directory / 'hf'}",
        )


def exported(case: Case, work: Work) -> tuple[float, str]:
    """Exports the first layout: the largest relative difference to the original, and what is wrong, if anything."""
    output, original = work.directory / "exported", work.directory / "hf"
    shutil.rmtree(output, ignore_errors=True)
    words = ["export", *named(case, work), "--quiet", "--jobs", "1", "--config-from", str(original)]
    words += ["--source", str(work.directory / work.layouts[0]), "--output", str(output)]
    done = ckptc(words)
    if done.returncode:
        return float("inf"), (done.stderr.strip() or done.stdout.strip()).splitlines()[0]
    compared = ckptc(["diff", str(original), str(output), "--json"])
    if compared.returncode > 1:
        return float("inf"), compared.stderr.strip().splitlines()[0]
    worst = 0.0
    for row in json.loads(compared.stdout)["differences"]:
        if row["kind"] not in ("values", "dtype"):
            return float("inf"), f"{row['kind']}: {row['name']}"
        relative = row.get("relative")
        worst = max(worst, float("inf") if relative is None else float(relative))
    return worst, "" if worst <= EXPORT_TOLERANCE else f"tensors differ by {worst:.2g} of the larger"

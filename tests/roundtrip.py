"""Exports for tests: compiled and run in this process, and judged by what their plans promise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ckptc.compile.export import compile_export
from ckptc.compile.reading import ExportOptions
from ckptc.plan.json import dumps, loads
from ckptc.plan.model import Exactness, Kind, Plan
from ckptc.run.export import ExportReport, export
from ckptc.run.runner import run
from ckptc.spec import mapping as spec
from ckptc.storage.checkpoint.companions import open_original
from ckptc.storage.checkpoint.orbax_reader import open_saved
from golden import Arrays, compile_case, difference, source_tensors
from reference import GoldenCase

EXACT = Exactness()


def converted(case: GoldenCase, output: Path, **changes: Any) -> Path:
    """The case's checkpoint, converted by a run: the directory of steps."""
    text = dumps(compile_case(case, **changes))
    run(loads(text), json.loads(text)["digest"], output, case.hf)
    return output


def export_plan(case: GoldenCase, saved: Path, original: bool = True, **options: Any) -> Plan:
    """The plan of exporting what is saved, through its JSON."""
    mapping, model = spec.find_model(case.model)
    options = {"multimodal": case.multimodal, **options}
    found, _ = open_saved(saved)
    plan = compile_export(mapping, model, ExportOptions(**options), found, open_original(case.hf) if original else None)
    read_back = loads(dumps(plan))
    assert read_back == plan
    return read_back


def exported(
    plan: Plan, saved: Path, output: Path, case: GoldenCase, whole: bool = True
) -> tuple[Arrays, ExportReport]:
    """The tensors that an export writes, as another reader finds them. `whole`: nothing of it has been done before."""
    report = export(plan, output, saved, case.hf)
    assert not whole or report.read_bytes == plan.totals.read_bytes
    return source_tensors(output), report


def kinds(plan: Plan) -> dict[str, Kind]:
    """What the plan says of each tensor, by name."""
    return {o.name: plan.kinds[o.kind] for o in plan.outputs}


def broken_promises(plan: Plan, found: Arrays, original: Mapping[str, Any]) -> list[str]:
    """What is not as the plan says: names, shapes and dtypes of the original's tensors, values exact or within
    bounds.
    """
    planned = kinds(plan)
    out = [f"{name} is missing" for name in sorted(planned.keys() - found.keys())]
    out += [f"{name} is not the original's" for name in sorted(found.keys() - original.keys())]
    for name, kind in planned.items():
        if name in found and name in original:
            out += _broken(name, kind.exactness or EXACT, found[name], original[name])
    return out


def _broken(name: str, promise: Exactness, found: Any, original: Any) -> list[str]:
    if promise == EXACT or (found.dtype, found.shape) != (original.dtype, original.shape):
        return [d] if (d := difference(name, found, original)) else []
    w, y = original.astype(np.float64), found.astype(np.float64)
    apart = np.abs(w - y)
    within = apart <= promise.relative * np.abs(w) + promise.absolute
    equal = np.zeros_like(within) if promise.above is None else np.abs(w) > promise.above
    if not within.all():
        return [f"{name} is off by {apart.max()}, promised: {promise}"]
    return [f"{name} differs where it should be exact"] if (apart[equal] != 0).any() else []

"""Checkpoints in the shapes in which training leaves them: exports find the model in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ckptc.compile.export import compile_export
from ckptc.compile.reading import ExportOptions
from ckptc.diagnostics import InputError
from ckptc.plan.json import dumps, loads
from ckptc.run.export import export
from ckptc.spec.mapping import find_model
from ckptc.storage.checkpoint.companions import open_original
from ckptc.storage.checkpoint.orbax_reader import open_saved
from golden import compile_case, differences, evaluate, known_cases, source_tensors
from reference import DATA, GoldenCase
from roundtrip import broken_promises, export_plan, exported

CASES = {case.name: case for case in known_cases()}
COLLECTIONS = {"gate/bias": "params/MoEBiasVar", "tid2eid": "params/Tid2EidVar"}  # of MaxText's own converter
AUX = dict.fromkeys(COLLECTIONS, "nnx_aux/model")  # of train.py
ROUTED = [("deepseek3", "scanned"), ("deepseek3", "unscanned"), ("deepseek4", "scanned"), ("deepseek4", "unscanned")]

pytestmark = [
    pytest.mark.usefixtures("jax_with_64_bits"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:.*donated"),
]


def arrays_of(case: GoldenCase, **changes: Any) -> dict[str, np.ndarray[Any, Any]]:
    return evaluate(compile_case(case, **changes), case.hf)


def save(directory: Path, arrays: dict[str, Any]) -> Path:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, last = path.split("/")
        at = tree
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = array
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory.resolve(), tree)
    return directory


def routing(arrays: dict[str, Any], places: dict[str, str]) -> dict[str, str]:
    """Arrays of the routing, and where else they may be saved."""
    return {
        path: path.replace("params/params", place)
        for path in arrays
        for end, place in places.items()
        if path.endswith(end)
    }


@pytest.mark.parametrize("places", [COLLECTIONS, AUX], ids=["collections", "nnx_aux"])
@pytest.mark.parametrize(("name", "layout"), ROUTED)
def test_routing_in_another_place(name: str, layout: str, places: dict[str, str], tmp_path: Path) -> None:
    case = CASES[name]
    arrays = arrays_of(case, layout=layout)
    moved = routing(arrays, places)
    assert len(moved) == sum(path.endswith((*places,)) for path in arrays) > 0
    saved = save(tmp_path / "items", {moved.get(path, path): array for path, array in arrays.items()})
    plan = export_plan(case, saved)
    found, report = exported(plan, saved, tmp_path / "hf", case)
    assert broken_promises(plan, found, source_tensors(case.hf)) == []
    assert report.warnings == ()


@pytest.mark.parametrize("places", [COLLECTIONS, AUX], ids=["collections", "nnx_aux"])
@pytest.mark.parametrize(("name", "layout"), ROUTED)
def test_routing_in_two_places(name: str, layout: str, places: dict[str, str], tmp_path: Path) -> None:
    """It is the same in both, or MaxText's own is taken, which is not that among the parameters, and the export says so."""
    case = CASES[name]
    arrays = arrays_of(case, layout=layout)
    moved = routing(arrays, places)
    twice = arrays | {there: arrays[path] for path, there in moved.items()}
    saved = save(tmp_path / "same", twice)
    plan = export_plan(case, saved)
    found, report = exported(plan, saved, tmp_path / "hf", case)
    assert broken_promises(plan, found, source_tensors(case.hf)) == []
    assert report.warnings == ()

    stale = next(path for path in moved if path.endswith("gate/bias"))
    saved = save(tmp_path / "other", twice | {stale: twice[stale] + 1})
    plan = export_plan(case, saved)
    found, report = exported(plan, saved, tmp_path / "again", case)
    assert broken_promises(plan, found, source_tensors(case.hf)) == []
    (warning,) = report.warnings
    assert warning.startswith(f"`{stale}` holds ") and warning.endswith("the other array's are taken")


# -- what MaxText 0.2.5 itself has saved: `tools/make_trained.py` ------------------------------------------------------

TRAINED = DATA / "trained"
ORIGINAL = TRAINED / "hf"
SHAPES = {  # of each: the layout, the axis of stacked layers, the pipeline
    "diloco": ("scanned", 1, ""),
    "scan_axis_0": ("scanned", 0, ""),
    "scan_axis_2": ("scanned", 2, ""),
    "pipeline": ("scanned", 1, "stages=2,layers=4"),
    "pipeline_stages": ("unscanned", 1, "stages=2,layers_per_stage=2,layers=4"),
    "pipeline_scanned_stages": ("scanned", 1, "stages=2,layers_per_stage=2,scan_layers_per_stage=1,layers=4"),
    "rl": ("scanned", 1, ""),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_trained_checkpoint_is_recognised_and_comes_back_bit_for_bit(shape: str, tmp_path: Path) -> None:
    saved, _ = open_saved(TRAINED / shape)
    plan = compile_export(*find_model("llama2-7b"), ExportOptions(), saved, open_original(ORIGINAL))
    assert (plan.choices.layout, plan.choices.scan_axis, plan.choices.pipeline) == SHAPES[shape]
    assert loads(dumps(plan)) == plan
    export(plan, tmp_path / "hf", TRAINED / shape, ORIGINAL)
    assert differences(source_tensors(tmp_path / "hf"), source_tensors(ORIGINAL)) == []
    left = {x.pattern for x in plan.left_out if x.tensors and "/rngs/" not in x.pattern}
    assert left == ({"inner_state/*", "outer_opt_state/*"} if shape == "diloco" else {"opt_state/*"} & left)


@pytest.mark.parametrize(("shape", "axis"), [("scan_axis_0", 1), ("scan_axis_2", 0)])
def test_an_axis_that_was_asked_for_is_the_only_one_tried(shape: str, axis: int) -> None:
    saved, _ = open_saved(TRAINED / shape)
    with pytest.raises(InputError) as caught:
        compile_export(*find_model("llama2-7b"), ExportOptions(scan_axis=axis), saved, open_original(ORIGINAL))
    assert {d.code for d in caught.value.diagnostics} == {"array-mismatch"}

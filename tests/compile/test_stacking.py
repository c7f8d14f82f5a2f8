"""Where stacked layers lie, by MaxText's `param_scan_axis` and its settings of pipeline parallelism."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.compile.stacking import Pipeline, guesses, read_pipeline, scan_positions, shares
from ckptc.ops.types import Axis
from ckptc.plan.model import Array as PlanArray
from ckptc.plan.model import Plan
from ckptc.spec.mapping import find_model
from ckptc.spec.target import Pipelined, target_tree
from golden import Array, compile_case, differences, evaluate, known_cases

CASES = {case.name: case for case in known_cases()}


def arrays(name: str, **options: object) -> dict[str, PlanArray]:
    plan = compile_plan(*find_model(name), Options(**options))  # type: ignore[arg-type]
    return {a.name: a for a in plan.arrays}


def stacked_at(axis: int, array: Array) -> Array:
    """An array with layers at axis 1 as MaxText's param_scan_axis has it: in front where it has too few axes."""
    return np.moveaxis(array, 1, axis if array.ndim > axis else 0)


@pytest.mark.parametrize("axis", [0, 2, 3])
@pytest.mark.parametrize("name", ["llama3_1", "qwen3_moe", "deepseek3"])
def test_layers_at_another_axis(name: str, axis: int) -> None:
    case = CASES[name]
    usual = evaluate(compile_case(case, layout="scanned"), case.hf)
    found = evaluate(compile_case(case, layout="scanned", scan_axis=axis), case.hf)
    assert usual.keys() == found.keys()
    for path, array in usual.items():
        # The routing bias is no trained parameter to MaxText: its layers lead in any case.
        layers = "layers/" in path and not path.endswith("gate/bias")
        expected = stacked_at(axis, array) if layers else array
        assert found[path].tobytes() == expected.tobytes() and found[path].shape == expected.shape, path


def test_stacks_within_stacks_move_together() -> None:
    """A scan of blocks and of their local layers within."""
    found = arrays("qwen3-next-80b-a3b", scan_axis=0)[
        "params/params/decoder/layers/local_layers/mlp/routed_experts/wi_0"
    ]
    assert found.axes == ("layers", "local_layers", "exp", "embed_moe", "mlp_moe")
    assert found.shape[:2] == (12, 3)


@pytest.mark.parametrize(
    ("axis", "own", "stacked", "positions"),
    [(1, 2, 1, [1]), (0, 2, 2, [0, 0]), (1, 0, 1, [0]), (2, 1, 1, [0]), (2, 1, 2, [0, 2]), (2, 2, 1, [2])],
)
def test_an_array_without_so_many_axes_has_layers_in_front(
    axis: int, own: int, stacked: int, positions: list[int]
) -> None:
    assert scan_positions(axis, own, stacked) == positions


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_layers_of_a_pipeline(layout: str) -> None:
    """Of three layers two are pipelined, one in each stage, and the last lies outside."""
    case = CASES["llama3_1"]
    whole = evaluate(compile_case(case, layout="scanned"), case.hf)
    found = evaluate(compile_case(case, layout=layout, pipeline=Pipeline(2, layers=2)), case.hf)
    outside = "layers_outside_pipeline" + ("_0" if layout == "unscanned" else "")
    expected = {}
    for path, array in whole.items():
        if "/layers/" not in path:
            expected[path] = array
            continue
        layers = np.moveaxis(array, 1, 0)
        expected[path.replace("/layers/", "/pipeline_module/layers/")] = layers[:2]
        expected[path.replace("/layers/", f"/{outside}/")] = array[:, 2:] if layout == "scanned" else layers[2]
    assert differences(found, expected) == []


LIST, MOE = target_tree("maxtext").pipelines


@pytest.mark.parametrize(
    ("pipeline", "where", "count", "scanned", "places"),
    [
        (Pipeline(2), LIST, 4, True, {"pipeline_module/layers": [0, 1, 2, 3]}),
        (Pipeline(2, 2), LIST, 8, True, {"pipeline_module/layers/layers_0": [0, 2, 4, 6], "pipeline_module/layers/layers_1": [1, 3, 5, 7]}),
        (Pipeline(2, 2, 1), LIST, 4, True, {"pipeline_module/layers/scanned_layers": [0, 1, 2, 3]}),
        (Pipeline(2, layers=2), LIST, 4, True, {"pipeline_module/layers": [0, 1], "layers_outside_pipeline": [2, 3]}),
        (Pipeline(2, layers=2), LIST, 3, False, {"pipeline_module/layers": [0, 1], "layers_outside_pipeline_0": [2]}),
        (Pipeline(2, layers=2), MOE, 3, True, {"pipeline_module/layers": [1, 2], "moe_layers_outside_pipeline": [0]}),
    ],
    ids=str,
)  # fmt: skip
def test_shares_of_a_pipeline(
    pipeline: Pipeline, where: Pipelined, count: int, scanned: bool, places: dict[str, list[int]]
) -> None:
    """Layer (repeat * stages + stage) * layers_per_stage + i is at [repeat, stage] of the i-th of its stage."""
    found = shares(pipeline, where, "/".join([*where.at, "mlp"]), Axis("layer", count), scanned)
    assert {share.at: list(share.layers) for share in found} == {f"decoder/{at}/mlp": n for at, n in places.items()}
    assert all(prod(axis.size for axis in share.grid) == len(share.layers) for share in found)


def plan_of(text: str, layout: str = "scanned") -> Plan:
    return compile_plan(*find_model("deepseek3-671b"), Options(layout=layout, pipeline=read_pipeline(text)))


def test_deepseek_pipelines_its_last_moe_layers() -> None:
    found = {a.name: a for a in plan_of("stages=2,layers=56").arrays}
    decoder, mlp = "params/params/decoder", "DeepSeekMoeBlock_0/MoeBlock_0"
    assert found[f"{decoder}/dense_layers/mlp/wo/kernel"].shape[1] == 3
    assert found[f"{decoder}/moe_layers_outside_pipeline/{mlp}/wo"].shape[:2] == (256, 2)
    inside = found[f"{decoder}/pipeline_module/layers/{mlp}/wo"]
    assert inside.shape[:3] == (28, 2, 256)
    assert inside.axes == ("circular_repeats", "layers", "exp", "mlp_moe", "embed_moe")
    assert found[f"{decoder}/pipeline_module/layers/{mlp}/gate/bias"].shape == (28, 2, 256)
    unscanned = {a.name for a in plan_of("stages=2,layers=56", "unscanned").arrays}
    assert f"{decoder}/moe_layers_outside_pipeline_1/{mlp}/wo" in unscanned
    assert not any(name.startswith((f"{decoder}/moe_layers_0/", f"{decoder}/layers")) for name in unscanned)


def test_stacked_stages_keep_the_scan_axis() -> None:
    text = "stages=4,layers_per_stage=4,scan_layers_per_stage"
    found = arrays("llama2-7b", pipeline=read_pipeline(text))
    array = found["params/params/decoder/pipeline_module/layers/scanned_layers/mlp/wo/kernel"]
    assert array.shape == (2, 4, 11008, 4, 4096) and array.axes == ("circular_repeats", "layers", "mlp", None, "embed")
    lead = arrays("llama2-7b", pipeline=read_pipeline(text), scan_axis=0)
    assert lead["params/params/decoder/pipeline_module/layers/scanned_layers/mlp/wo/kernel"].shape == (
        2,
        4,
        4,
        11008,
        4096,
    )


@pytest.mark.parametrize("text", ["stages=2", "stages=4,layers_per_stage=2,scan_layers_per_stage=1,layers=8"])
def test_settings_are_written_as_they_are_read(text: str) -> None:
    assert str(read_pipeline(text)) == text
    assert read_pipeline(str(read_pipeline(text))) == read_pipeline(text)


def test_guesses_hold_the_settings_that_made_the_shapes() -> None:
    own = (24,)
    assert Pipeline(2, 1, 0, 4) in guesses([("norm", "scale")], [(2, 2, *own)])
    assert Pipeline(4, 1, 0, 4) in guesses([("norm", "scale")], [(4, *own)])
    assert Pipeline(2, 3, 0, 6) in guesses([(f"layers_{i}", "scale") for i in range(3)], [(2, *own)] * 3)
    assert Pipeline(2, 3, 1, 12) in guesses([("scanned_layers", "scale")], [(2, 2, *own, 3)])


def test_the_target_says_where_pipelines_lie() -> None:
    assert {p.at for p in target_tree("maxtext").pipelines} == {("decoder", "layers"), ("decoder", "moe_layers")}


def test_a_plan_says_its_settings() -> None:
    plan = compile_case(CASES["llama3_1"], layout="scanned", scan_axis=0, pipeline=Pipeline(2, layers=2))
    assert (plan.choices.scan_axis, plan.choices.pipeline) == (0, "stages=2,layers=2")

"""Golden: what a run writes, restored by plain Orbax, is what MaxText's own converter makes, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ckptc.plan.json import dumps, loads
from ckptc.plan.model import Plan
from ckptc.run.runner import run
from golden import KEPT, Arrays, Kept, compile_case, difference, differences, evaluate, expected_of, known_cases
from reference import MOVED, GoldenCase, expected_arrays, golden_cases, placed, read_safetensors
from restoring import by_path

CASES = {case.id: case for case in known_cases()}
# One scanned and one unscanned case: with experts, where both kinds of stacking meet; with arithmetic and interleaving.
VARIED = ["qwen3_moe.scan", "llama3_1.unscan"]

pytestmark = [
    pytest.mark.usefixtures("jax_with_64_bits"),
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]


def convert(plan: Plan, source: Path, output: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Through the plan's JSON, a run and Orbax's own restore: the arrays by path."""
    text = dumps(plan)
    run(loads(text), json.loads(text)["digest"], output, source)
    tree = ocp.StandardCheckpointer().restore(output / "0" / "items")
    assert set(tree) == {"step", "params", "opt_state"}
    return by_path(tree["params"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_restored_arrays_are_maxtexts_bit_for_bit(case: GoldenCase, tmp_path: Path) -> None:
    restored = convert(compile_case(case), case.hf, tmp_path)
    assert differences(restored, expected_of(case)) == []


@pytest.mark.parametrize("id_", VARIED)
@pytest.mark.parametrize("changes", [{"memory": 2048}, {"shards": 1}, {"shards": 4}], ids=str)
def test_units_and_shards_do_not_change_values(id_: str, changes: dict[str, int], tmp_path: Path) -> None:
    case = CASES[id_]
    plan, usual = compile_case(case, **changes), compile_case(case)
    assert [a.chunk for a in plan.arrays] != [a.chunk for a in usual.arrays]
    if "memory" in changes:
        assert sum(len(list(a.units())) for a in plan.arrays) > 10 * len(plan.arrays)
    assert differences(convert(plan, case.hf, tmp_path), expected_of(case)) == []


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: f"{kept.case}:{kept.target}")
def test_every_exception_is_of_arrays_that_maxtext_rounds(kept: Kept) -> None:
    """An entry of the table that excuses nothing would hide a failure later."""
    for case in (case for case in golden_cases() if case.name == kept.case):
        excused = {name: array for name, array in expected_of(case).items() if re.fullmatch(kept.target, name)}
        maxtext = expected_arrays(case)
        assert excused and all(difference(name, array, maxtext[name]) for name, array in excused.items())


def test_goldens_differ_from_the_output_in_the_place_of_the_routing_alone() -> None:
    """Where a model routes, and nowhere else, an array lies elsewhere than MaxText's own converter puts it."""
    for case in CASES.values():
        own = {f"params/{name.replace('-', '/')}" for name in read_safetensors(case.expected)}
        ours = set(expected_arrays(case))
        assert {path.split("/")[1] for path in own - ours} <= MOVED.keys(), case.id
        assert {placed(path) for path in own - ours} == ours - own, case.id
        assert all(path.endswith((*MOVED.values(),)) for path in ours - own), case.id
        assert bool(own - ours) == (case.name in ("deepseek3", "deepseek4")), case.id


class Stack(NamedTuple):
    """Scanned layers, and where they are in the unscanned tree."""

    scanned: str  # regular expression of the part of the path that changes
    unscanned: Callable[..., str]  # of the layer's index along its axis, the number of layers, and the regex's group
    stacked: bool = True  # otherwise the arrays are of one layer, with no axis for it


PLAIN = (Stack(r"decoder/layers", lambda i, n: f"decoder/layers_{i}"),)
DENSE_AND_MOE = (Stack(r"decoder/(dense|moe)_layers", lambda i, n, kind: f"decoder/{kind}_layers_{i}"),)
STACKS = {
    "gemma2": PLAIN,
    "llama3_1": PLAIN,
    "mixtral": PLAIN,
    "qwen2_5": PLAIN,
    "qwen3": PLAIN,
    "qwen3_moe": PLAIN,
    "olmo3": (Stack(r"decoder/layers/layers_(\d+)", lambda i, n, k: f"decoder/layers_{4 * i + int(k)}"),),
    "gemma3": (
        Stack(r"decoder/layers/layers_(\d+)", lambda i, n, k: f"decoder/layers_{6 * i + int(k)}"),
        Stack(r"decoder/layers_remainder/layers_(\d+)", lambda i, n, k: f"decoder/layers_{n - n % 6 + int(k)}", False),
    ),
    "deepseek2": DENSE_AND_MOE,
    "deepseek3": DENSE_AND_MOE,
}
# Stacked layers are the second axis of an array, but of these the first.
LAYERS_LEAD = "/MoeBlock_0/gate/bias"


@pytest.mark.parametrize("name", STACKS)
def test_scanned_arrays_are_the_unscanned_ones_stacked(name: str) -> None:
    """So a layout without a golden is as right as the one that has one."""
    case = next(case for case in CASES.values() if case.name == name)
    plan = compile_case(case, layout="scanned")
    scanned = evaluate(plan, case.hf)
    unscanned = evaluate(compile_case(case, layout="unscanned"), case.hf)
    assert len(scanned) < len(unscanned)
    assert differences(unstacked(scanned, STACKS[name], dict(plan.choices.dims)["layers"]), unscanned) == []


def unstacked(arrays: Arrays, stacks: tuple[Stack, ...], layers: int) -> Arrays:
    """The unscanned tree that a scanned one says."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    for path, array in arrays.items():
        for stack in stacks:
            if match := re.fullmatch(rf"(params/\w+)/{stack.scanned}/(.+)", path):
                collection, *group, rest = match.groups()
                axis = 0 if path.endswith(LAYERS_LEAD) else 1
                layer = np.moveaxis(array, axis, 0) if stack.stacked else [array]
                out |= {f"{collection}/{stack.unscanned(i, layers, *group)}/{rest}": x for i, x in enumerate(layer)}
                break
        else:
            out[path] = array
    return out

"""Plans of exports as JSON: a row a tensor, and rows that are none are refused wherever they stand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from ckptc.diagnostics import InputError
from ckptc.plan.json import digest, dumps, loads
from ckptc.spec.resources import schema
from golden import known_cases
from reference import DATA
from roundtrip import export_plan

CASE = next(case for case in known_cases() if case.name == "qwen3_moe")
SAVED = DATA / "golden/qwen3_moe/orbax/scan.dev16"
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def body() -> dict[str, Any]:
    out: dict[str, Any] = json.loads(dumps(export_plan(CASE, SAVED)))
    return out


def refused(body: dict[str, Any], change: Edit) -> str:
    """What is said of the changed plan, whose digest fits."""
    body = copy.deepcopy(body)
    change(body["outputs"])
    with pytest.raises(InputError) as caught:
        loads(json.dumps({**body, "digest": digest(body)}))
    (found,) = caught.value.diagnostics
    assert found.code == "invalid-plan"
    return found.message


def test_the_schema_says_what_is_written(body: dict[str, Any]) -> None:
    assert list(Draft7Validator(schema("plan")).iter_errors(body)) == []
    assert body["arrays"] == [] and len(body["outputs"]["tensors"]) == 66


def test_a_line_a_tensor(body: dict[str, Any]) -> None:
    text = dumps(loads(json.dumps(body)))
    for name, *_ in body["outputs"]["tensors"]:
        assert sum(f'["{name}",' in line for line in text.splitlines()) == 1


ROWS: dict[str, Any] = {
    "not a list": {"name": "a"},
    "too short": ["a", 0, 1],
    "too long": ["a", 0, 1, 0, 1],
    "a number as the name": [7, 0, 1, 0],
    "no name": ["", 0, 1, 0],
    "text as a place": ["a", 0, "1", 0],
    "true as a place": ["a", 0, True, 0],
    "a negative place": ["a", 0, 1, -1],
    "a kind that is not there": ["a", 999, 1, 0],
    "a stored array that is not there": ["a", 0, 999, 0],
}


@pytest.mark.parametrize("position", [0, 40])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_malformed_row_of_tensors_is_refused(row: Any, position: int, body: dict[str, Any]) -> None:
    assert "outputs/tensors" in refused(body, lambda o: o["tensors"].__setitem__(position, row))


def test_a_malformed_twin_is_refused(body: dict[str, Any]) -> None:
    assert "outputs/twins" in refused(body, lambda o: o["twins"].extend([["a", 0, 1, 0], ["a", 0, 1]]))


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("batch", [7, [], ["0"], [-1], [True]], ids=str)
def test_a_malformed_batch_is_refused(batch: Any, position: int, body: dict[str, Any]) -> None:
    assert "batch" in refused(body, lambda o: o["batches"].__setitem__(position, batch))


@pytest.mark.parametrize("key", ["rule", "shape", "dtype", "unit", "exactness", "sources", "parts"])
def test_every_kind_is_whole(key: str, body: dict[str, Any]) -> None:
    """The last too, though kinds are checked once for those that are alike."""
    assert "outputs/kinds" in refused(body, lambda o: o["kinds"][-1].pop(key))


def test_files_hold_every_tensor(body: dict[str, Any]) -> None:
    assert "65 of 66" in refused(body, lambda o: o["files"][0].__setitem__(3, 65))


def test_it_is_the_same_from_a_file(body: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(body), "utf-8")
    assert json.loads(dumps(loads((tmp_path / "plan.json").read_bytes()))) == body

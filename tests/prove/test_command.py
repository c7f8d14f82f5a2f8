"""`ckptc prove` as a command: what it says of an outcome, and of the rules that lead to where the models part."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptc.cli.prove import _directory, as_record, text
from ckptc.diagnostics import InputError
from ckptc.prove.compare import Found, Point
from ckptc.prove.prover import Outcome
from ckptc.spec.mapping import find_model

FAMILY = find_model("llama3.1-8b")[0]
VERSIONS = {"transformers": "5.24.0", "maxtext": "0.2.5"}
RIGHT = Found("scan", "train", 1e-7, 0.0, 1.0, (Point(0, "value", 1e-7),))
WRONG = Found(
    "scan", "train", 0.5, 0.1, 0.2, (Point(0, "key length", 0.4), Point(0, "value", 0.4), Point(0, "heads", 1))
)


def outcome(found: Found, problem: str = "") -> Outcome:
    return Outcome((found,), (), 0.0, problem, VERSIONS)


def test_where_models_part_is_said_with_the_rules_that_lead_there() -> None:
    said = text(outcome(WRONG), FAMILY, "", None)
    assert "not proved: the models part at layer 0, attention, after the key and value projections" in said
    rules = said[said.index("rules of what is computed there:") :]
    assert "self_attention/key/kernel" in rules and "self_attention/value/kernel" in rules
    assert "mlp/" not in rules
    record = as_record(outcome(WRONG), None)
    assert not record["passed"]
    assert record["results"][0]["parts"] == "layer 0, attention, after the key and value projections"


def test_a_proof_says_what_it_is_against() -> None:
    said = text(outcome(RIGHT), FAMILY, "", Path("x.json"))
    assert "proved: both compute the same (transformers 5.24.0, MaxText 0.2.5)" in said and "recorded in x.json" in said


def test_an_export_that_is_not_the_original_is_no_proof() -> None:
    assert not outcome(RIGHT, "missing: lm_head.weight").passed
    said = text(outcome(RIGHT, "missing: lm_head.weight"), FAMILY, "", None)
    assert "export: missing: lm_head.weight" in said and "not proved" in said


def test_files_that_are_no_proofs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text("mine")
    with pytest.raises(InputError, match="output-exists"), _directory(str(tmp_path)):
        pass
    assert (tmp_path / "error.txt").read_text() == "mine"


def test_what_an_error_names_stays_and_what_passed_is_cleared() -> None:
    with _directory(None) as directory:
        (directory / "hf").mkdir()
    assert not directory.exists()
    with pytest.raises(ValueError), _directory(None) as directory:
        raise ValueError
    assert directory.is_dir()
    directory.rmdir()

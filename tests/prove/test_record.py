"""Records of proofs: what makes a family unproved again, what is said of it, and that the shipped ones are of the shipped rules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from ckptc.prove.record import Record, digest, folder, load_record, proved, records, said, save
from ckptc.spec.halves.expanded import expanded
from ckptc.spec.mapping import Family, find_model, load_mapping

SHIPPED = sorted(folder(None).glob("*.json"))
VERSIONS = {"transformers": "5.24.0", "maxtext": "0.2.5"}


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    path = tmp_path / "l.yaml"
    path.write_text(expanded(find_model("llama3.1-8b")[0].document), encoding="utf-8")
    return path


def record_of(family: Family, model: str = "llama3.1-8b", deviation: str = "") -> Record:
    return Record(family.family, model, digest(family), VERSIONS, [], 0, 0.0, deviation=deviation)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_proof_is_of_the_rules_as_they_are_now(path: Path) -> None:
    record = load_record(path)
    assert record is not None and record.model == path.stem
    family, model = find_model(record.model)
    assert record.family == family.family
    assert record.digest == digest(family), f"{family.family} has changed: run `ckptc prove --model {model.name}` again"
    assert record.deviation or all(row["relative"] <= 1e-3 for row in record.results)
    assert {row["loader"] for row in record.results} == {"train", "pretrained", "linen"}


def test_some_proofs_are_shipped() -> None:
    assert len(SHIPPED) >= 2


def test_a_family_written_out_has_the_digest_of_its_halves(mapping: Path) -> None:
    halves = find_model("llama3.1-8b")[0]
    assert digest(load_mapping(mapping)) == digest(halves)


def test_a_changed_rule_makes_a_family_unproved_and_a_changed_title_does_not(mapping: Path) -> None:
    family = load_mapping(mapping)
    save(record_of(family), folder(mapping))
    model = family.models["llama3.1-8b"]
    assert said(family, model, mapping) == "meaning proved against transformers 5.24.0 and MaxText 0.2.5"
    data = yaml.safe_load(mapping.read_text("utf-8"))
    data["title"] = "another"
    mapping.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    assert proved(load_mapping(mapping), model.name, mapping) is not None
    rules = data["blocks"]["layers"]["tensors"]
    rules["mlp/wi_0/kernel"], rules["mlp/wi_1/kernel"] = rules["mlp/wi_1/kernel"], rules["mlp/wi_0/kernel"]
    mapping.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    changed = load_mapping(mapping)
    assert proved(changed, model.name, mapping) is None
    assert said(changed, model, mapping) == "shapes and coverage are proved; meaning is not: `ckptc prove`"
    assert said(changed, model, mapping, headers=False) == "meaning is not proved: `ckptc prove`"


def test_another_model_of_the_family_is_covered_and_named(mapping: Path) -> None:
    family = load_mapping(mapping)
    save(record_of(family), folder(mapping))
    assert said(family, family.models["llama3.1-70b"], mapping).endswith("(on llama3.1-8b)")


def test_what_deviates_proves_nothing(mapping: Path) -> None:
    family = load_mapping(mapping)
    save(record_of(family, deviation="MaxText has no YaRN there"), folder(mapping))
    assert proved(family, "llama3.1-8b", mapping) is None


def test_a_record_is_read_as_written_and_a_broken_one_is_none(mapping: Path) -> None:
    record = dataclasses.replace(record_of(load_mapping(mapping)), note="n", results=[{"layout": "scan"}])
    path = save(record, folder(mapping))
    assert load_record(path) == record
    path.write_text(path.read_text("utf-8")[:-20], encoding="utf-8")
    assert load_record(path) is None and records(folder(mapping)) == []

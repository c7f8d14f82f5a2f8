"""Cases: one small configuration, said to both sides; sizes differ, so that no two axes can be confused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptc.diagnostics import InputError
from ckptc.prove.case import make_case, tiny
from ckptc.spec.halves.expanded import expanded
from ckptc.spec.mapping import find_model, load_mapping, shipped
from ckptc.spec.resources import shipped_file

DATA = sorted(shipped_file("proofs").glob("*.yaml"))


def test_sizes_are_said_to_both_sides_from_one_place() -> None:
    case = make_case(*find_model("llama3.1-8b"), None)
    assert case.class_ == "LlamaForCausalLM" and case.layouts == ("scan", "unscan")
    for key, setting in {
        "hidden_size": "base_emb_dim",
        "intermediate_size": "base_mlp_dim",
        "num_hidden_layers": "base_num_decoder_layers",
        "num_attention_heads": "base_num_query_heads",
        "num_key_value_heads": "base_num_kv_heads",
        "head_dim": "head_dim",
        "vocab_size": "vocab_size",
    }.items():
        assert case.config[key] == case.maxtext[setting], key
    sizes = [case.maxtext[n] for n in ("base_emb_dim", "base_mlp_dim", "head_dim", "vocab_size", "base_num_kv_heads")]
    assert len(set(sizes)) == len(sizes)
    assert case.config["num_attention_heads"] * case.config["head_dim"] != case.config["hidden_size"]
    assert "num_experts" not in case.maxtext


@pytest.mark.parametrize("path", DATA, ids=lambda p: p.stem)
def test_what_is_shipped_of_a_family_makes_cases_of_its_models(path: Path) -> None:
    family = next(f for f in shipped() if f.family == path.stem)
    for model in family.models.values():
        case = make_case(family, model, None)
        assert case.maxtext["base_num_decoder_layers"] <= 16 and case.class_ and case.layouts


def test_a_text_model_within_another_gets_the_sizes_there() -> None:
    sizes = {"always": {"hidden_size": 48}, "present": {"num_experts": 4, "sliding_window": 8}}
    config = tiny({"text_config": {"hidden_size": 2560, "num_experts": 128}}, {"vision_config": {"depth": 2}}, sizes)
    assert config == {"text_config": {"hidden_size": 48, "num_experts": 4}, "vision_config": {"depth": 2}}


def test_a_mapping_of_ones_own_says_its_class_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = expanded(find_model("llama3.1-8b")[0].document).replace("family: llama3.1", "family: mine", 1)
    file.write_text(text, encoding="utf-8")
    family = load_mapping(file)
    model = family.models["llama3.1-8b"]
    with pytest.raises(InputError, match=r"no-proof-data: nothing says which class") as caught:
        make_case(family, model, file)
    assert str(tmp_path / "proofs" / "mine.yaml") in str(caught.value.diagnostics[0].help)
    (tmp_path / "proofs").mkdir()
    (tmp_path / "proofs" / "mine.yaml").write_text("class: LlamaForCausalLM\nruns_as: llama2-7b\n", encoding="utf-8")
    case = make_case(family, model, file)
    assert (case.class_, case.maxtext_model) == ("LlamaForCausalLM", "llama2-7b")
    (tmp_path / "proofs" / "mine.yaml").write_text("clas: LlamaForCausalLM\n", encoding="utf-8")
    with pytest.raises(InputError, match="unknown-key"):
        make_case(family, model, file)

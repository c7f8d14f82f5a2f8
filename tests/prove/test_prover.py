"""A proof's steps that ckptc takes itself, and what is said where a side cannot be run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptc.diagnostics import InputError
from ckptc.prove import prover
from ckptc.prove.case import make_case
from ckptc.spec.halves.expanded import expanded
from ckptc.spec.mapping import find_model

# Pythons with torch and transformers, and with MaxText: a whole proof runs only where both are named.
PYTHONS = [os.environ.get(name, "") for name in ("CKPTC_TRANSFORMERS_PYTHON", "CKPTC_TARGET_PYTHON")]
CASE = make_case(*find_model("llama3.1-8b"), None)


def work(directory: Path, python: str = sys.executable) -> prover.Work:
    return prover.Work(directory, python, python, ("scan",), ("train",))


def test_a_checkpoint_that_the_mapping_refuses_is_shown_with_ckptcs_own_text(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(dict(CASE.config)), encoding="utf-8")
    with pytest.raises(InputError, match="proof-not-converted") as caught:
        prover.convert(CASE, "scan", work(tmp_path))
    assert any("error[" in note for note in caught.value.diagnostics[0].notes)


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")], check=True)
    with pytest.raises(InputError, match="ModuleNotFoundError: No module named") as caught:
        prover.side(str(tmp_path / "empty" / "bin" / "python"), "transformers", {}, tmp_path)
    assert "ckptc prove --setup DIR" in str(caught.value.diagnostics[0].help)


@pytest.mark.skipif(not all(PYTHONS), reason="CKPTC_TRANSFORMERS_PYTHON and CKPTC_TARGET_PYTHON are not named")
@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("", "", ""),  # right
        ("self_attn.k_proj", "self_attn.v_proj", "layer 0, attention, after the key projection"),
        ("mlp.gate_proj", "mlp.up_proj", "layer 0, MLP, after the gate and up projections"),
        ("embed (heads head_dim) ->", "embed (head_dim heads) ->", "layer 0, attention, after the output projection"),
    ],
)
def test_a_mistake_that_compiles_is_named_by_both_models(old: str, new: str, where: str, tmp_path: Path) -> None:
    text = expanded(find_model("llama3.1-8b")[0].document)
    assert old in text
    # The tensor that is no longer read is ignored, so that nothing but the meaning is wrong.
    text = text.replace(old, new, 1) if old else text
    if "proj" in old:
        text = text.replace("ignore:\n", f'ignore:\n  - {{ source: "*.{old}.weight", reason: unread }}\n')
    (tmp_path / "l.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "proof").mkdir()
    given = prover.Work(tmp_path / "proof", *PYTHONS, ("scan",), ("train",), tmp_path / "l.yaml")
    outcome = prover.prove(CASE, given)
    assert [f.words for f in outcome.found] == [where]
    assert outcome.passed == (not where)

"""Exports load in `transformers`, with no missing and no unexpected keys, for every family that has a class there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptc.compile.compiler import layouts
from ckptc.spec import mapping as spec
from golden import known_cases
from reference import GoldenCase
from roundtrip import converted, export_plan, exported

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

CASES = {case.name: case for case in known_cases()}


def class_of(case: GoldenCase) -> Any:
    """The class that the original's config names, or None where transformers has none."""
    config = json.loads((case.hf / "config.json").read_text("utf-8"))
    return getattr(transformers, (config.get("architectures") or [""])[0], None)


@pytest.mark.parametrize("name", CASES)
def test_an_export_loads_as_the_original_does(name: str, tmp_path: Path) -> None:
    """By transformers' own count."""
    case = CASES[name]
    cls = class_of(case)
    if cls is None:
        pytest.skip("transformers has no class for it")
    layout = layouts(*spec.find_model(case.model))[0]
    saved = converted(case, tmp_path / "orbax", layout=layout, dtype="bfloat16")
    exported(export_plan(case, saved), saved, tmp_path / "hf", case)
    only_one_size(tmp_path / "hf" / "config.json")
    model, found = cls.from_pretrained(tmp_path / "hf", output_loading_info=True)
    missing = {k for k in found["missing_keys"] if not left_out(case, k)}
    assert (missing, set(found["unexpected_keys"]), list(found["mismatched_keys"])) == (set(), set(), [])
    assert next(model.parameters()).dtype == torch.bfloat16


def only_one_size(file: Path) -> None:
    """The golden DeepSeek V4 states a size of dense MLPs, which the model has not; transformers takes it for that of
    the experts.
    """
    config = json.loads(file.read_text("utf-8"))
    if config["model_type"] == "deepseek_v4":
        del config["intermediate_size"]
        file.write_text(json.dumps(config), "utf-8")


def left_out(case: GoldenCase, key: str) -> bool:
    """Whether it belongs to a tower, and towers were not asked for."""
    return not case.multimodal and any(part in key for part in ("vision", "visual", "audio", "multi_modal_projector"))

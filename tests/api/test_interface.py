"""`import ckptc`: what programs use, and that it is light."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptc
from ckptc.cli.main import run as command

MAPPING = """\
family: tiny
title: Two matrices
target: maxtext
extra: true
dims:
  layers: config.num_hidden_layers
  embed: config.hidden_size
  mlp: config.intermediate_size
  vocab: config.vocab_size
models:
  tiny: { repo: example/tiny, config: { num_hidden_layers: 2, hidden_size: 4, intermediate_size: 6, vocab_size: 8 } }
tensors:
  token_embedder/embedding: { from: model.embed.weight, as: vocab embed }
blocks:
  decoder:
    source: model.layers.{{ layer }}
    scanned: [{ at: decoder/layers, stack: { layer: layers } }]
    unscanned: [{ at: "decoder/layers_{{ layer }}", for: { layer: layers } }]
    tensors:
      mlp/wo/kernel: { from: down.weight, as: embed mlp -> mlp embed }
"""


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(MAPPING, "utf-8")
    return tmp_path / "tiny.yaml"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    numbers = np.random.default_rng(0)
    tensors = {"model.embed.weight": numbers.standard_normal((8, 4), np.float32)}
    tensors |= {f"model.layers.{n}.down.weight": numbers.standard_normal((4, 6), np.float32) for n in range(2)}
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    config = {"num_hidden_layers": 2, "hidden_size": 4, "intermediate_size": 6, "vocab_size": 8}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config), "utf-8")
    return tmp_path / "source"


def test_import_loads_no_library() -> None:
    code = (
        "import sys, ckptc; dir(ckptc); print([m for m in ('jax', 'numpy', 'msgspec', 'ruamel') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_compiling_loads_no_jax(source: Path, mapping: Path) -> None:
    code = f"""
import sys, ckptc
plan = ckptc.compile("tiny", {str(source)!r}, mapping={str(mapping)!r})
print(plan.totals.arrays, "jax" in sys.modules)
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "2 False\n"
    )


def test_stages_with_names_of_functions_are_both() -> None:
    from ckptc.compile import compiler

    assert callable(ckptc.compile) and callable(ckptc.run) and compiler.compile_plan
    assert "scan_axis" in inspect.signature(ckptc.compile).parameters


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ckptc.nonsense  # type: ignore[attr-defined]


def test_a_plan_is_what_the_command_writes(source: Path, mapping: Path, tmp_path: Path) -> None:
    plan = ckptc.compile("tiny", source, mapping=mapping, dtype="float32", scan=False)
    plan.save(tmp_path / "mine.json")
    given = ["compile", "--model", "tiny", "--source", str(source), "--mapping", str(mapping), "--dtype", "float32"]
    assert command([*given, "--no-scan", "-o", str(tmp_path / "its.json")]) == 0
    assert (tmp_path / "mine.json").read_bytes() == (tmp_path / "its.json").read_bytes()
    loaded = ckptc.Plan.load(tmp_path / "mine.json")
    assert loaded == plan and loaded.digest == plan.digest and loaded.totals.arrays == len(loaded.arrays) == 3


def test_there_and_back(source: Path, mapping: Path, tmp_path: Path) -> None:
    report = ckptc.convert(
        "tiny", tmp_path / "out", source=source, mapping=mapping, dtype="float32", run_with={"jobs": 1}
    )
    assert report.write_bytes == 4 * (8 * 4 + 2 * 4 * 6)
    plan = ckptc.compile("tiny", source, mapping=mapping, dtype="float32")
    assert ckptc.verify(tmp_path / "out", plan, mapping=mapping).arrays == 2
    assert ckptc.verify(tmp_path / "out").arrays == 2
    options = {"mapping": mapping, "run_with": {"jobs": 1}}
    exported = ckptc.export(tmp_path / "out", tmp_path / "back", model="tiny", **options)
    assert exported.write_bytes == report.write_bytes
    assert ckptc.diff(source, tmp_path / "back").differences == ()


def test_errors_are_the_diagnostics_of_the_command(source: Path, mapping: Path) -> None:
    with pytest.raises(ckptc.InputError) as error:
        ckptc.compile("tiny", source, mapping=mapping, set={"mlp": 5})
    assert {d.code for d in error.value.diagnostics} == {"shape-mismatch"}
    assert error.value.diagnostics[0].span is not None


def test_rules_may_be_given_as_they_are(source: Path, mapping: Path) -> None:
    plan = ckptc.compile("tiny", source, mapping=mapping, mesh={"x": 2}, rules=[("mlp", ["x"])])
    assert {a.name: a.spec for a in plan.arrays}["params/params/decoder/layers/mlp/wo/kernel"] == (("x",), (), ())

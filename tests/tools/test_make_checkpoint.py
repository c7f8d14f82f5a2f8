"""The generated checkpoint is one that other programs read, of the size asked for."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

PROGRAM = Path(__file__).parents[2] / "tools" / "make_checkpoint.py"


def load_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_checkpoint = load_program()


def make(out: Path, *options: str, family: str = "llama", gigabytes: float = 0.01) -> dict[str, Any]:
    """Runs the program; the config it wrote."""
    assert make_checkpoint.main([str(out), "--family", family, "--gigabytes", str(gigabytes), *options]) == 0
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


def read_shapes(out: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, as the safetensors library sees them."""
    shapes = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert name not in shapes
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    return shapes


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, vocabulary, head = config["hidden_size"], config["vocab_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
        }
        if config["model_type"] == "qwen3_moe":
            block |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
            block["mlp.gate.weight"] = (config["num_experts"], hidden)
            mlps = [f"mlp.experts.{expert}" for expert in range(config["num_experts"])]
            inner = config["moe_intermediate_size"]
        else:
            mlps, inner = ["mlp"], config["intermediate_size"]
        for mlp in mlps:
            block |= {
                f"{mlp}.gate_proj.weight": (inner, hidden),
                f"{mlp}.up_proj.weight": (inner, hidden),
                f"{mlp}.down_proj.weight": (hidden, inner),
            }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_tensors_are_those_the_config_describes(tmp_path: Path, family: str) -> None:
    config = make(tmp_path / "out", "--shard-gigabytes", "0.004", family=family)
    assert read_shapes(tmp_path / "out") == expected_shapes(config)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("gigabytes", [0.005, 0.02, 0.07])
def test_the_size_is_met_within_five_percent(tmp_path: Path, family: str, gigabytes: float) -> None:
    make(tmp_path / "out", family=family, gigabytes=gigabytes)
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size == pytest.approx(gigabytes * 1e9, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("gigabytes", [1, 3, 12, 140])
def test_a_large_model_has_matrices_of_usual_sizes(family: str, gigabytes: int) -> None:
    elements = gigabytes * 10**9 // 2
    config = make_checkpoint.choose_config(make_checkpoint.FAMILIES[family], elements)
    total = sum(np.prod(shape) for shape in expected_shapes(config).values())
    assert total == pytest.approx(elements, rel=0.05)
    if gigabytes >= 3:
        assert 2048 <= config["hidden_size"] <= 4096
        assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert 1_000 <= config["vocab_size"] <= 300_000


def test_the_index_names_the_file_of_every_tensor(tmp_path: Path) -> None:
    make(tmp_path, "--shard-gigabytes", "0.003")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) > 2
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            assert set(opened.keys()) == {name for name, at in index["weight_map"].items() if at == file.name}
    elements = sum(int(np.prod(shape)) for shape in read_shapes(tmp_path).values())
    assert index["metadata"]["total_size"] == 2 * elements


def test_a_shard_stays_below_its_limit_and_its_data_is_aligned(tmp_path: Path) -> None:
    make(tmp_path, "--shard-gigabytes", "0.003")
    for file in tmp_path.glob("*.safetensors"):
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert start % 8 == 0
        assert file.stat().st_size - start <= 3_000_000


def test_a_single_shard_has_no_index(tmp_path: Path) -> None:
    make(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_values_look_like_weights(tmp_path: Path) -> None:
    make(tmp_path, "--dtype", "float32")
    with safe_open(tmp_path / "model.safetensors", framework="np") as opened:
        matrix = opened.get_tensor("model.layers.0.mlp.up_proj.weight")
        norm = opened.get_tensor("model.norm.weight")
    assert matrix.std() == pytest.approx(0.02, rel=0.05)
    assert abs(matrix.mean()) < 0.001
    assert norm.mean() == pytest.approx(1, abs=0.01)


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        make(tmp_path / name, "--seed", seed, gigabytes=0.003)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again", "other"))
    assert first == again
    assert first != other


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").touch()
    assert make_checkpoint.main([str(tmp_path), "--gigabytes", "0.01"]) == 1
    assert "not an empty directory" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_a_size_too_small_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_checkpoint.main([str(tmp_path / "out"), "--gigabytes", "1e-5"]) == 1
    assert "too small" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

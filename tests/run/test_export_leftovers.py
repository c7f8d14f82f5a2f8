"""What stored arrays hold that no tensor has a place for: tensors held twice, padding between other rows, and what
config.json says of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from ckptc.compile.export import compile_export
from ckptc.compile.reading import ExportOptions
from ckptc.plan.check import check_plan
from ckptc.plan.json import dumps, loads
from ckptc.plan.model import Plan, Safetensors
from ckptc.run.export import ExportReport, export
from ckptc.spec.mapping import find_model, load_mapping
from ckptc.storage.checkpoint.companions import open_original
from ckptc.storage.checkpoint.orbax_reader import open_saved

HEADS, HEAD, WIDE, EMBED, VOCAB = 3, 2, 4, 5, 7
MAPPING = """
family: leftover
target: maxtext
extra: true
dims:
  heads: config.num_attention_heads
  head_dim: config.head_dim
  wide: 4
  embed: config.text_config.hidden_size
  vocab: config.vocab_size
models: { leftover: { repo: example/leftover } }
tensors:
  token_embedder/embedding: { from: embed.weight, as: vocab embed }
  decoder/logits_dense/kernel: { from: embed.weight, as: vocab embed -> embed vocab }
  # Each head is padded, then the heads are joined: rows of padding lie between those of the heads.
  decoder/out/kernel:
    from: out.weight
    as: (heads head_dim) embed -> heads head_dim embed
    ops: [{ pad: { head_dim: wide } }, { rearrange: heads wide embed -> (heads wide) embed }]
"""
CONFIG = {
    "num_attention_heads": HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCAB,
    "torch_dtype": "bfloat16",
    "text_config": {"hidden_size": EMBED, "dtype": "bfloat16"},
    "vision_config": {"torch_dtype": "float32"},
}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    directory = tmp_path / "original"
    directory.mkdir()
    rng = np.random.default_rng(3)
    tensors = {
        "embed.weight": rng.standard_normal((VOCAB, EMBED)).astype(ml_dtypes.bfloat16),
        "out.weight": rng.standard_normal((HEADS * HEAD, EMBED)).astype(ml_dtypes.bfloat16),
    }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    (tmp_path / "mapping.yaml").write_text(MAPPING, "utf-8")
    return directory


def saved(directory: Path, original: Path, changed: Any = None) -> Path:
    """The arrays of the original as training would save them, after it has changed some."""
    tensors = load_file(original / "model.safetensors")
    padded = np.zeros((HEADS, WIDE, EMBED), ml_dtypes.bfloat16)
    padded[:, :HEAD] = tensors["out.weight"].reshape(HEADS, HEAD, EMBED)
    arrays = {
        "embedding": tensors["embed.weight"].copy(),
        "logits": tensors["embed.weight"].T.copy(),
        "out": padded.reshape(HEADS * WIDE, EMBED),
    }
    if changed:
        changed(arrays)
    decoder = {"logits_dense": {"kernel": arrays["logits"]}, "out": {"kernel": arrays["out"]}}
    tree = {"params": {"params": {"token_embedder": {"embedding": arrays["embedding"]}, "decoder": decoder}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save((directory / "items").resolve(), tree)
    return directory / "items"


def exported(tmp_path: Path, original: Path, changed: Any = None, **options: Any) -> tuple[Plan, ExportReport]:
    items = saved(tmp_path, original, changed)
    mapping, model = find_model("leftover", (load_mapping(tmp_path / "mapping.yaml"),))
    made = compile_export(mapping, model, ExportOptions(**options), open_saved(items)[0], open_original(original))
    plan = loads(dumps(made))
    assert plan == made
    check_plan(plan, "plan.json")
    return plan, export(plan, tmp_path / "hf", items)


def test_what_was_not_trained_comes_back_without_a_word(tmp_path: Path, original: Path) -> None:
    _, report = exported(tmp_path, original)
    assert report.warnings == ()
    found, before = load_file(tmp_path / "hf" / "model.safetensors"), load_file(original / "model.safetensors")
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in before.items()}


def test_a_tensor_whose_two_arrays_differ_is_said_to_be(tmp_path: Path, original: Path) -> None:
    """Tied weights of which training has changed one."""

    def changed(arrays: dict[str, Any]) -> None:
        arrays["embedding"][2, 3] = 100

    plan, report = exported(tmp_path, original, changed)
    assert [t.name for t in plan.twins] == ["embed.weight"]
    (warning,) = report.warnings
    assert "other values: embed.weight" in warning and "token_embedder/embedding" in warning
    taken = load_file(tmp_path / "hf" / "model.safetensors")["embed.weight"]
    assert taken[2, 3] != 100, "the first array by path is taken, and said to be"


def test_padding_between_other_rows_is_counted(tmp_path: Path, original: Path) -> None:
    def changed(arrays: dict[str, Any]) -> None:
        arrays["out"][[2, 7]] = 1  # the first head's first row of padding, the second head's last

    plan, report = exported(tmp_path, original, changed)
    assert sum(p.rows for p in plan.padding) == HEADS * (WIDE - HEAD)
    (warning,) = report.warnings
    assert warning.startswith(f"2 of the {HEADS * (WIDE - HEAD)} rows of padding of `params/params/decoder/out/kernel`")
    found, before = load_file(tmp_path / "hf" / "model.safetensors"), load_file(original / "model.safetensors")
    assert found["out.weight"].tobytes() == before["out.weight"].tobytes()


def test_sections_of_the_config_follow_the_dtype(tmp_path: Path, original: Path) -> None:
    plan, _ = exported(tmp_path, original, dtype="float16")
    config = json.loads((tmp_path / "hf" / "config.json").read_text("utf-8"))
    assert isinstance(plan.layout, Safetensors) and config == plan.layout.config
    assert (
        config["torch_dtype"] == config["text_config"]["dtype"] == config["vision_config"]["torch_dtype"] == "float16"
    )
    assert any("text_config.dtype=float16" in note for note in plan.notes)


def test_sections_that_say_what_their_tensors_are_stay(tmp_path: Path, original: Path) -> None:
    exported(tmp_path, original)
    assert json.loads((tmp_path / "hf" / "config.json").read_text("utf-8")) == CONFIG

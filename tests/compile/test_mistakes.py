"""Mistakes of a newcomer, each a change to a right mapping: none that headers or the target can show compiles in silence.

`tests/data/mistakes` holds the mappings, tiny checkpoints, and the changes. What only a running model can show is listed by
`--unproved`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckptc.compile.compiler import compile_plan, compile_unproved
from ckptc.compile.options import Options
from ckptc.diagnostics import InputError
from ckptc.spec.halves.expanded import expanded
from ckptc.spec.mapping import find_model, load_mapping
from ckptc.storage.checkpoint.safetensors import open_checkpoint

HERE = Path(__file__).parents[1] / "data" / "mistakes"
MISTAKES: list[dict[str, Any]] = json.loads((HERE / "mistakes.json").read_text(encoding="utf-8"))
CHECKPOINTS = {"phi3": "phi3", "internlm2": "internlm2", "gpt2": "gpt2", "fused_moe": "moe"}
# Neither a header nor the target shows these; the word that `--unproved` says of them.
TRUSTED = {
    "axis_order_inner": "the order within",
    "qkv_swapped": "which part",
    "gate_up_swapped": "which part",
    "i_group_order": "the order within",
}
RIGHT = {"ignore_unused", "crlf", "bom"}  # no mistakes
# What one may want to say: right, whatever it looks like.
ALSO_RIGHT = {"x_tied", "x_perlayer_dims", "x_noneed_as_transpose"}


def base(name: str) -> str:
    if name == "l31":
        return expanded(find_model("llama3.1-8b")[0].document)
    return (HERE / f"{name}.yaml").read_text(encoding="utf-8")


def compiled(text: str, folder: Path, checkpoint: str | None, unproved: bool = False) -> Any:
    file = folder / "mapping.yaml"
    file.write_bytes(text.encode())
    family = load_mapping(file)
    opened = open_checkpoint(HERE / "checkpoints" / checkpoint) if checkpoint else None
    out = []
    for layout in ("scanned", "unscanned"):
        made = compile_unproved if unproved else compile_plan
        out.append(made(family, next(iter(family.models.values())), Options(layout=layout), opened))
    return out


def changed(mistake: dict[str, Any]) -> str:
    text = base(mistake["base"])
    for old, new in mistake["replace"]:
        assert old in text, old
        text = text.replace(old, new)
    return text


def checkpoint_of(mistake: dict[str, Any]) -> str | None:
    square = "phi3_odd" if mistake["tag"] == "axis_order_src_sq" else None
    return square or mistake.get("checkpoint") or CHECKPOINTS.get(mistake["base"])


@pytest.mark.parametrize("name", [*CHECKPOINTS, "l31"])
def test_without_a_mistake_it_compiles(name: str, tmp_path: Path) -> None:
    assert compiled(base(name), tmp_path, CHECKPOINTS.get(name))


SHOWN = [
    m for m in MISTAKES if m["today"] == "refused" or (m["today"] == "silent" and m["tag"] not in {*TRUSTED, *RIGHT})
]


@pytest.mark.parametrize("mistake", SHOWN, ids=lambda m: m["tag"])
def test_a_mistake_is_refused(mistake: dict[str, Any], tmp_path: Path) -> None:
    if mistake["tag"] == "model_wrong":
        with pytest.raises(InputError, match="unknown-model"):
            find_model("phi3", (load_mapping(HERE / "phi3.yaml"),))
        return
    with pytest.raises(InputError):
        compiled(changed(mistake), tmp_path, checkpoint_of(mistake))


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m["tag"] in TRUSTED], ids=lambda m: m["tag"])
def test_what_cannot_be_shown_is_listed(mistake: dict[str, Any], tmp_path: Path) -> None:
    for found in compiled(changed(mistake), tmp_path, checkpoint_of(mistake), unproved=True):
        assert any(TRUSTED[mistake["tag"]] in u.reason for u in found)


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m["tag"] in RIGHT | ALSO_RIGHT], ids=lambda m: m["tag"])
def test_what_is_right_compiles(mistake: dict[str, Any], tmp_path: Path) -> None:
    assert compiled(changed(mistake), tmp_path, checkpoint_of(mistake))


# More of the same kinds: base, old, new, the code.
MORE = [
    ("phi3", "mlp/wo/kernel:", "mpl/wo/kernel:", "not-in-target"),
    ("phi3", "mlp/wo/kernel:", "mlp/wo/kernal:", "not-in-target"),
    ("phi3", "decoder/decoder_norm/scale", "decoder/decoder_nrom/scale", "not-in-target"),
    ("phi3", "token_embedder/embedding", "token_embeder/embedding", "not-in-target"),
    ("phi3", "decoder/logits_dense/kernel", "logits_dense/kernel", "not-in-target"),
    ("phi3", "post_self_attention_layer_norm: post", "post_self_attention_norm: post", "not-in-target"),  # another block's
    ("phi3", "at: decoder/layers,", "at: decoder/layer,", "not-in-target"),
    ("phi3", "{ key: 0, value: 1 }", "{ keys: 0, value: 1 }", "not-in-target"),
    ("phi3", "{ wi_0: 0, wi_1: 1 }", "{ wi_0: 0, wi_2: 1 }", "not-in-target"),
    ("phi3", "-> embed gate_up mlp", "-> mlp gate_up embed", "breaks-contract"),
    ("phi3", "lm_head.weight, as: vocab embed -> embed vocab", "lm_head.weight, as: vocab embed", "breaks-contract"),
    ("phi3", "model.embed_tokens.weight, as: vocab embed", "model.embed_tokens.weight, as: vocab embed -> embed vocab", "breaks-contract"),
    ("phi3", "scale: 1 / sqrt(head_dim)", "scale: 1 / sqrt(embed)", "breaks-contract"),
    ("phi3", "scale: 1 / sqrt(head_dim)", "scale: sqrt(head_dim)", "breaks-contract"),
    ("phi3", "from: model.norm.weight, as: embed", "from: model.norm.weight, as: embed, ops: [{ add: 1 }]", "breaks-contract"),
    ("phi3", "ops: [{ slice: { gate_up: wi.value } }]", "ops: [{ slice: { gate_up: wi.value } }, { scale: 2 }]", "breaks-contract"),
    ("l31", "{ permute_rope: head_dim }, ", "", "breaks-contract"),
    ("l31", "{ permute_rope: head_dim }, ", "{ permute_rope: heads }, ", "breaks-contract"),
    ("l31", "        ops: [{ permute_rope: head_dim }]", "        ops: [{ permute_rope: kv_heads }]", "breaks-contract"),
    ("l31", ', { scale: "1 / sqrt(query_scalar)" }', "", "breaks-contract"),
    ("l31", "block: llama3.1", "block: llama3.2", "unknown-part"),
    ("internlm2", "-> embed (kv_heads group) head_dim", "-> (kv_heads group) embed head_dim", "breaks-contract"),
    ("fused_moe", "MoeBlock_0/gate/kernel", "MoeBlock_0/router/kernel", "not-in-target"),
    ("fused_moe", "-> experts embed gate_up mlp", "-> experts mlp gate_up embed", "breaks-contract"),
    ("fused_moe", "as: experts embed mlp -> experts mlp embed", "as: experts embed mlp", "breaks-contract"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "code"), MORE)
def test_more_mistakes_are_refused(name: str, old: str, new: str, code: str, tmp_path: Path) -> None:
    text = base(name)
    assert old in text
    with pytest.raises(InputError) as error:
        compiled(text.replace(old, new), tmp_path, CHECKPOINTS.get(name))
    assert code in {d.code for d in error.value.diagnostics}


def test_a_module_half_filled_is_refused_whatever_the_source_holds(tmp_path: Path) -> None:
    text = base("l31")
    at = text.index(
        "      # permute_rope: the checkpoint rotates halves, maxtext's `llama3.1` pairs\n      self_attention/key"
    )
    text = text[:at] + text[text.index("      self_attention/value/kernel", at) :]
    with pytest.raises(InputError, match="half-filled") as error:
        compiled(text, tmp_path, None)
    assert "key/kernel" in str(error.value)


def test_extra_arrays_are_written_all_the_same(tmp_path: Path) -> None:
    text = base("phi3").replace(
        "blocks:\n", "  adapter/w: { from: model.norm.weight, as: embed, extra: true }\nblocks:\n"
    )
    plan = compiled(text, tmp_path, "phi3")[0]
    assert "params/params/adapter/w" in {a.name for a in plan.arrays}
    with pytest.raises(InputError, match="not-in-target"):
        compiled(text.replace(", extra: true", ""), tmp_path, "phi3")


def test_a_shipped_models_tree_is_the_targets_own() -> None:
    from dataclasses import replace

    family, model = find_model("qwen3-0.6b")
    lacking = replace(family, rules=family.rules[:1])
    with pytest.raises(InputError, match="own tree"):
        compile_plan(lacking, model, Options())

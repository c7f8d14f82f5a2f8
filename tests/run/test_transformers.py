"""Real input: checkpoints that `transformers` itself writes, converted and restored through Orbax.

What each kind of array must hold is computed here from `model.state_dict()`, with torch and by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.diagnostics import InputError
from ckptc.plan.json import dumps
from ckptc.plan.model import Plan
from ckptc.run.runner import run
from ckptc.spec.mapping import find_model
from ckptc.storage.checkpoint.safetensors import open_checkpoint
from reference import tree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

LAYERS, EMBED, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, PADDED = 4, 48, 6, 2, 10, 72, 150, 160
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": EMBED,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": MLP,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
State = dict[str, Any]  # the model's tensors by name


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, tie_word_embeddings=False))


def gemma2() -> Any:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, query_pre_attn_scalar=24))


MODELS: dict[str, Callable[[], Any]] = {"qwen3-8b": qwen3, "gemma2-2b": gemma2}


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, State, Path]:
    """The name ckptc has for the model, its tensors, and where `save_pretrained` put it, in several shards."""
    torch.manual_seed(7)
    model = MODELS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():  # norms begin as constants, in which a mistake would not show
            parameter.normal_()
    model = model.to(torch.bfloat16)
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory, max_shard_size="60KB")
    return request.param, model.state_dict(), directory


def compiled(name: str, source: Path, layout: str) -> Plan:
    mapping, model = find_model(name)
    return compile_plan(mapping, model, Options(layout=layout, set={"padded_vocab": PADDED}), open_checkpoint(source))


def converted(name: str, source: Path, layout: str, output: Path) -> dict[str, Any]:
    """Arrays by path below `params/params`, restored by Orbax."""
    plan = compiled(name, source, layout)
    run(plan, json.loads(dumps(plan))["digest"], output, source)
    restored = ocp.StandardCheckpointer().restore(output / "0" / "items")["params"]["params"]
    return {a.name.removeprefix("params/params/"): leaf(restored, a.path[2:]) for a in plan.arrays}


def leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return np.asarray(tree)


def test_save_pretrained_wrote_several_shards(saved: tuple[str, State, Path]) -> None:
    name, state, source = saved
    checkpoint = open_checkpoint(source)
    assert len(checkpoint.files) > 2
    assert set(state) - set(checkpoint.tensors) == ({"lm_head.weight"} if name == "gemma2-2b" else set())  # tied


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_restored_arrays_are_the_models_own(saved: tuple[str, State, Path], layout: str, tmp_path: Path) -> None:
    name, state, source = saved
    arrays = converted(name, source, layout, tmp_path)
    expected = {"qwen3-8b": expected_qwen3, "gemma2-2b": expected_gemma2}[name](state, layout == "scanned")
    assert set(arrays) == set(expected)
    for path, values in expected.items():
        found = torch.from_numpy(arrays[path].astype(np.float32)).to(values.dtype)
        assert arrays[path].dtype.name == str(values.dtype).removeprefix("torch."), path
        assert found.shape == values.shape, path
        assert torch.equal(found, values), path


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_paths_are_the_full_size_models(saved: tuple[str, State, Path], layout: str) -> None:
    name, _, source = saved
    found = {a.name: len(a.shape) for a in compiled(name, source, layout).arrays}
    short = {"scanned": "scan", "unscanned": "unscan"}[layout]
    full = {path: len(shape) for path, (shape, _) in tree(name, short).items()}
    small = LAYERS if name == "qwen3-8b" else LAYERS // 2
    deep = {f"layers_{i}" for i in range(small, 100)}  # layers that the small model does not have
    assert found == {path: rank for path, rank in full.items() if not deep & set(path.split("/"))}


def test_a_checkpoint_of_another_family_is_refused(saved: tuple[str, State, Path]) -> None:
    name, _, source = saved
    other = next(model for model in MODELS if model != name)
    with pytest.raises(InputError) as refused:
        compiled(other, source, "scanned")
    assert {"missing-tensor", "unconsumed-tensor"} & {d.code for d in refused.value.diagnostics}


# -- by hand -------------------------------------------------------------------------------------------------


def heads(weight: Any, count: int) -> Any:
    """[heads * head_dim, embed] -> [embed, heads, head_dim]."""
    return weight.reshape(count, HEAD_DIM, EMBED).permute(2, 0, 1)


def padded(weight: Any) -> Any:
    return torch.cat([weight, torch.zeros(PADDED - VOCAB, EMBED, dtype=weight.dtype)])


def placed(of_layer: Callable[[int], Any], path: str, layers: range, scanned: bool) -> dict[str, Any]:
    """The arrays of one kind: all layers along axis 1, or each on its own. `path` begins after the layer."""
    if scanned:
        return {f"decoder/layers/{path}": torch.stack([of_layer(i) for i in layers], dim=1)}
    return {f"decoder/layers_{n}/{path}": of_layer(i) for n, i in enumerate(layers)}


def expected_qwen3(state: State, scanned: bool) -> dict[str, Any]:
    def source(name: str) -> Callable[[int], Any]:
        return lambda i: state[f"model.layers.{i}.{name}.weight"]

    kinds: dict[str, Callable[[int], Any]] = {
        "self_attention/query/kernel": lambda i: heads(source("self_attn.q_proj")(i), HEADS),
        "self_attention/key/kernel": lambda i: heads(source("self_attn.k_proj")(i), KV_HEADS),
        "self_attention/value/kernel": lambda i: heads(source("self_attn.v_proj")(i), KV_HEADS),
        "self_attention/out/kernel": lambda i: source("self_attn.o_proj")(i).T.reshape(HEADS, HEAD_DIM, EMBED),
        "self_attention/query_norm/scale": source("self_attn.q_norm"),
        "self_attention/key_norm/scale": source("self_attn.k_norm"),
        "mlp/wi_0/kernel": lambda i: source("mlp.gate_proj")(i).T,
        "mlp/wi_1/kernel": lambda i: source("mlp.up_proj")(i).T,
        "mlp/wo/kernel": lambda i: source("mlp.down_proj")(i).T,
        "pre_self_attention_layer_norm/scale": source("input_layernorm"),
        "post_self_attention_layer_norm/scale": source("post_attention_layernorm"),
    }
    out = {
        "token_embedder/embedding": padded(state["model.embed_tokens.weight"]),
        "decoder/logits_dense/kernel": padded(state["lm_head.weight"]).T,
        "decoder/decoder_norm/scale": state["model.norm.weight"],
    }
    for path, of_layer in kinds.items():
        out |= placed(of_layer, path, range(LAYERS), scanned)
    return out


def expected_gemma2(state: State, scanned: bool) -> dict[str, Any]:
    def source(name: str) -> Callable[[int], Any]:
        return lambda i: state[f"model.layers.{i}.{name}.weight"]

    def scaled(weight: Any, factor: float) -> Any:
        return (weight.float() * torch.tensor(factor, dtype=torch.float32)).to(torch.bfloat16)

    def plus_one(name: str) -> Callable[[int], Any]:
        return lambda i: source(name)(i).float() + 1

    kinds: dict[str, Callable[[int], Any]] = {
        "self_attention_{}/query/kernel": lambda i: heads(scaled(source("self_attn.q_proj")(i), 24**-0.5), HEADS),
        "self_attention_{}/key/kernel": lambda i: heads(source("self_attn.k_proj")(i), KV_HEADS),
        "self_attention_{}/value/kernel": lambda i: heads(source("self_attn.v_proj")(i), KV_HEADS),
        "self_attention_{}/out/kernel": lambda i: source("self_attn.o_proj")(i).T.reshape(HEADS, HEAD_DIM, EMBED),
        "mlp_{}/wi_0/kernel": lambda i: source("mlp.gate_proj")(i).T,
        "mlp_{}/wi_1/kernel": lambda i: source("mlp.up_proj")(i).T,
        "mlp_{}/wo/kernel": lambda i: source("mlp.down_proj")(i).T,
        "pre_self_attention_norm_{}/scale": plus_one("input_layernorm"),
        "post_self_attention_norm_{}/scale": plus_one("post_attention_layernorm"),
        "pre_ffw_norm_{}/scale": plus_one("pre_feedforward_layernorm"),
        "post_ffw_norm_{}/scale": plus_one("post_feedforward_layernorm"),
    }
    out = {
        "token_embedder/embedding": padded(scaled(state["model.embed_tokens.weight"], math.sqrt(EMBED))),
        "decoder/decoder_norm/scale": state["model.norm.weight"].float() + 1,
    }
    for path, of_layer in kinds.items():
        for first, half in enumerate(("local", "global")):
            out |= placed(of_layer, path.format(half), range(first, LAYERS, 2), scanned)
    return out

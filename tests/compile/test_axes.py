"""Logical axes of the compiled arrays are MaxText's own, for every model in every layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.plan.model import Array
from ckptc.spec.mapping import load_mapping, shipped
from ckptc.spec.target import target_tree
from reference import placed, tree, trees

TREE = target_tree("maxtext")
STACKING = {name for stack in TREE.stacks for name in stack.axes}
CASES = [(model, layout) for model, layouts in trees().items() for layout in layouts]
Axes = tuple[str | None, ...]


def agrees(found: Axes, shape: tuple[int, ...], maxtext: Axes) -> bool:
    """Equal; or, where MaxText names fewer axes than there are, without any name but those of stacking axes.

    Of some arrays (norms of Qwen3-Next, most of the towers) MaxText names none or only the stacking axes. The names
    it has then stand at the wrong axes: `('layers',)` for [embed=2048, layer=12].
    """
    if len(maxtext) == len(shape):
        return found == maxtext
    return len(found) == len(shape) and {n for n in maxtext if n} <= {n for n in found if n} <= STACKING


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_axes_are_maxtexts(model: str, layout: str) -> None:
    wrong = {
        path: (found, axes)
        for path, (shape, axes) in tree(model, layout).items()
        if not agrees(found := TREE.axes(tuple(path.split("/"))[1:], len(shape)), shape, axes)
    }
    assert wrong == {}


def test_the_exceptions_are_these() -> None:
    """A new release of MaxText that names more is to be noticed."""
    short = {
        "/".join(path.split("/")[-2:])
        for model, layouts in trees().items()
        for layout in layouts
        for path, (shape, axes) in tree(model, layout).items()
        if len(axes) < len(shape) and "_encoder/" not in path
    }
    assert short == {
        "attention/A_log", "attention/dt_bias", "conv1d/kernel", "csa_compressor/position_bias", "hca_compressor/position_bias",
        "indexer/position_bias", "input_layernorm/scale", "k_norm/bias", "k_norm/scale", "key_norm/scale", "query_norm/scale",
        "MoeBlock_0/tid2eid", "post_attention_layernorm/scale", "rms_norm/scale",
    }  # fmt: skip


def arrays(name: str, **options: object) -> dict[str, Array]:
    mapping, model = next((m, m.models[name]) for m in shipped() if name in m.models)
    return {a.name: a for a in compile_plan(mapping, model, Options(**options)).arrays}  # type: ignore[arg-type]


def test_a_plan_has_them() -> None:
    found = arrays("qwen3-next-80b-a3b")
    expert = found["params/params/decoder/layers/local_layers/mlp/routed_experts/wi_0"]
    assert expert.axes == ("exp", "layers", "local_layers", "embed_moe", "mlp_moe")
    assert all(len(a.axes) == len(a.shape) for a in found.values())


def test_a_rule_of_the_mapping_that_names_axes_wins(tmp_path: Path) -> None:
    text = (
        "family: f\ntarget: maxtext\nextra: true\ndims: { vocab: 8, embed: 4 }\nmodels: { m: { repo: r } }\ntensors:\n"
        "  token_embedder/embedding: { from: a, as: vocab embed, axes: _ mine }\n"
        "  decoder/logits_dense/kernel: { from: b, as: embed vocab }\n"
    )
    (tmp_path / "m.yaml").write_text(text, "utf-8")
    mapping = load_mapping(tmp_path / "m.yaml")
    plan = compile_plan(mapping, mapping.models["m"], Options())
    assert [a.axes for a in plan.arrays] == [("embed_vocab", "vocab"), (None, "mine")]


def test_of_two_patterns_the_more_specific_wins() -> None:
    router = ("params", "decoder", "layers_0", "mlp", "MoeBlock_0", "gate", "kernel")
    assert TREE.axes(router, 2) == ("embed_router", None)
    assert TREE.axes(router[:4] + router[5:], 2) == ("embed", None)
    # A name within a tower wins over what is said of the tower.
    tower = ("params", "vision_encoder", "Encoder_0", "layer_0")
    assert TREE.axes((*tower, "pre_attention_norm", "scale"), 1) == ("norm",)
    assert TREE.axes((*tower, "anything", "scale"), 1) == (None,)


PATHS = {
    tuple(re.sub(r"_\d+", "_0", placed(path)).split("/"))[1:]
    for layouts in trees().values()
    for tree_ in layouts.values()
    for path in tree_
}


def test_no_two_patterns_are_equally_specific_for_a_path() -> None:
    for path in PATHS:
        found = [pattern.rank for pattern, _ in TREE.arrays if pattern.ends(path)]
        assert len(set(found)) == len(found), path


def test_every_pattern_is_of_an_array() -> None:
    left = [pattern.parts for pattern, _ in TREE.arrays if not any(pattern.ends(p) for p in PATHS)]
    left += [stack.under.parts for stack in TREE.stacks if not any(stack.under.begins(p) for p in PATHS)]
    assert left == []


def test_an_array_of_another_rank_has_no_known_axes() -> None:
    kernel = ("params", "decoder", "layers", "self_attention", "out", "kernel")
    assert TREE.axes(kernel, 3) == ("mlp", "layers", "embed_attn")
    assert TREE.axes(kernel, 4) == ("heads", "layers", "kv", "embed_attn")
    assert TREE.axes(kernel, 5) == ()
    assert TREE.axes(("params", "something", "else"), 2) == ()

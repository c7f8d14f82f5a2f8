"""Two halves become rules: what is derived is computed on real numbers and compared with what numpy says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from ruamel.yaml import YAML

from ckptc.compile.compiler import all_namings
from ckptc.compile.dims import evaluate_dims
from ckptc.compile.options import Options
from ckptc.diagnostics import InputError
from ckptc.run.reference import Tensors, make
from ckptc.spec.halves.axes import AxesError, Join, parse
from ckptc.spec.halves.expanded import expanded
from ckptc.spec.mapping import Family, load_mapping, shipped

Arrays = dict[str, Any]
HEADS, KV_HEADS, HEAD_DIM, EMBED, MLP = 4, 2, 6, 10, 7
DIMS = f"{{ layers: 1, heads: {HEADS}, kv_heads: {KV_HEADS}, head_dim: {HEAD_DIM}, embed: {EMBED}, mlp: {MLP}, q_per_kv: {HEADS // KV_HEADS} }}"
LAYERS = 'layers: { in: "layers.{{ layer }}", '
PLACES = 'layers: { always: [{ at: "layers_{{ layer }}", for: { layer: layers } }], '


def family(directory: Path, hub: str, tree: str, more: str = "") -> Family:
    """A family and a block of these halves. Sections are given without their first keys and their closing brace."""
    block = directory / "targets" / "maxtext"
    block.mkdir(parents=True)
    (block / "odd.yaml").write_text(f"title: odd\ntree: {{ {tree} }}\n".replace("layers: {", PLACES, 1))
    text = f"family: odd\nruns_as: {{ maxtext: odd }}\nmodels: {{ tiny: {{ repo: a/b }} }}\ndims: {DIMS}\n{more}"
    file = directory / "odd.yaml"
    file.write_text(text + f"hub: {{ {hub} }}\n".replace("layers: {", LAYERS, 1))
    return load_mapping(file)


def arrays(mapping: Family, tensors: Arrays) -> Arrays:
    """Every array that the family makes of these tensors of one layer, in float32."""

    class Given:
        def get(self, name: str) -> Any:
            return tensors[name.removeprefix("layers.0.")]

    options = Options(layout="unscanned", dtype="float32")
    dims = evaluate_dims(mapping, mapping.models["tiny"], {}, {})
    names = {**dims, "config": {"dtype": "float32"}, "multimodal": False, "dtype": "float32"}
    ((_, graph),) = all_namings(mapping, options, dims, names, None)
    given = cast(Tensors, Given())
    return {"/".join(t.path[3:]): make(t.node, given).reshape(t.type.shape) for t in graph.targets}


def numbers(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def halves_to_pairs(heads: Any) -> Any:
    """The last axis of one array: x0 x1 x2 y0 y1 y2 -> x0 y0 x1 y1 x2 y2."""
    *lead, size = heads.shape
    return heads.reshape(*lead, 2, size // 2).swapaxes(-1, -2).reshape(heads.shape)


def test_tensors_that_lie_one_after_the_other_are_cut_apart(tmp_path: Path) -> None:
    mapping = family(
        tmp_path,
        "rotary: halves, times: { 1: query }, layers: { query key value: { in: qkv, "
        "as: (heads head_dim | kv_heads head_dim | kv_heads head_dim) embed }, gate up: { in: gate_up, as: (2 mlp) embed } }",
        "rotary: { pairs: [query, key] }, times: { 1 / sqrt(head_dim): query }, layers: { "
        "query: { at: q, as: embed heads head_dim }, key: { at: k, as: embed kv_heads head_dim }, "
        "value: { at: v, as: embed kv_heads head_dim }, gate: { at: g, as: embed mlp }, up: { at: u, as: embed mlp } }",
    )
    qkv, gate_up = numbers((HEADS + 2 * KV_HEADS) * HEAD_DIM, EMBED), numbers(2 * MLP, EMBED)
    made = arrays(mapping, {"qkv": qkv, "gate_up": gate_up})
    q, k, v = np.split(qkv.reshape(-1, HEAD_DIM, EMBED).transpose(2, 0, 1), (HEADS, HEADS + KV_HEADS), axis=1)
    np.testing.assert_array_equal(made["q"], halves_to_pairs(q) * np.float32(1 / np.sqrt(HEAD_DIM)))
    np.testing.assert_array_equal(made["k"], halves_to_pairs(k))
    np.testing.assert_array_equal(made["v"], v)
    np.testing.assert_array_equal(made["g"], gate_up[:MLP].T)
    np.testing.assert_array_equal(made["u"], gate_up[MLP:].T)


def test_groups_of_heads_are_cut_in_the_grain_of_the_finer_side(tmp_path: Path) -> None:
    mapping = family(
        tmp_path,
        "rotary: halves, times: { 1: query }, layers: { query key value: { in: wqkv, "
        "as: (kv_heads (q_per_kv head_dim | head_dim | head_dim)) embed } }",
        "rotary: halves, times: { 1: query }, layers: { query: { at: q, as: embed heads head_dim }, "
        "key: { at: k, as: embed kv_heads head_dim }, value: { at: v, as: embed kv_heads head_dim } }",
        more="axes: { heads: kv_heads q_per_kv }\n",
    )
    group = HEADS // KV_HEADS
    wqkv = numbers(KV_HEADS * (group + 2) * HEAD_DIM, EMBED)
    made = arrays(mapping, {"wqkv": wqkv})
    by_group = wqkv.reshape(KV_HEADS, group + 2, HEAD_DIM, EMBED)
    q = by_group[:, :group].reshape(HEADS, HEAD_DIM, EMBED).transpose(2, 0, 1)
    np.testing.assert_array_equal(made["q"], q)
    np.testing.assert_array_equal(made["k"], by_group[:, group].transpose(2, 0, 1))
    np.testing.assert_array_equal(made["v"], by_group[:, group + 1].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("held", "cut"), [("(mlp 2) embed", "a[0::2]"), ("(2 mlp) embed", "a[:7]"), ("2 mlp embed", "a[0]")]
)
def test_the_number_of_tensors_says_how_they_lie(tmp_path: Path, held: str, cut: str) -> None:
    mapping = family(
        tmp_path,
        f"layers: {{ gate up: {{ in: both, as: {held} }} }}",
        "layers: { gate: { at: g, as: embed mlp }, up: { at: u, as: mlp embed } }",
    )
    a = numbers(2, MLP, EMBED) if held.startswith("2") else numbers(2 * MLP, EMBED)
    made = arrays(mapping, {"both": a})
    np.testing.assert_array_equal(made["g"], eval(cut).T)
    np.testing.assert_array_equal(made["u"], {"a[0::2]": a[1::2], "a[:7]": a[MLP:], "a[0]": a[1]}[cut])


def test_what_the_target_holds_as_one_is_joined(tmp_path: Path) -> None:
    mapping = family(
        tmp_path,
        "rotary: halves, times: { 1: query }, layers: { query: { in: q, as: (heads head_dim) embed }, "
        "key: { in: k, as: (kv_heads head_dim) embed }, value: { in: v, as: (kv_heads head_dim) embed }, "
        "gate: { in: g, as: mlp embed }, up: { in: u, as: mlp embed } }",
        "rotary: halves, times: { 3: query }, layers: { gate up: { at: gu, as: embed 2 mlp }, "
        "query key value: { at: qkv, as: embed (heads | kv_heads | kv_heads) head_dim } }",
    )
    q, k, v = (numbers(n * HEAD_DIM, EMBED) for n in (HEADS, KV_HEADS, KV_HEADS))
    g, u = numbers(MLP, EMBED), numbers(MLP, EMBED) + 1
    made = arrays(mapping, {"q": q, "k": k, "v": v, "g": g, "u": u})
    np.testing.assert_array_equal(made["gu"], np.stack([g.T, u.T], axis=1))
    heads = [w.reshape(-1, HEAD_DIM, EMBED).transpose(2, 0, 1) for w in (q * np.float32(3), k, v)]
    np.testing.assert_array_equal(made["qkv"], np.concatenate(heads, axis=1))


def test_what_lies_alike_on_both_sides_is_not_taken_apart(tmp_path: Path) -> None:
    mapping = family(
        tmp_path,
        "layers: { gate up: { in: both, as: (2 mlp) embed } }",
        "layers: { gate up: { at: both, as: embed (2 mlp) } }",
    )
    assert mapping.blocks[0].rules[0].ops == ()
    a = numbers(2 * MLP, EMBED)
    np.testing.assert_array_equal(arrays(mapping, {"both": a})["both"], a.T)


def test_pairs_become_halves_as_halves_become_pairs(tmp_path: Path) -> None:
    mapping = family(
        tmp_path,
        "rotary: pairs, layers: { key: { in: k, as: (kv_heads head_dim) embed } }",
        "rotary: halves, layers: { key: { at: k, as: embed (kv_heads head_dim) } }",
    )
    k = numbers(KV_HEADS * HEAD_DIM, EMBED)
    made = arrays(mapping, {"k": k})["k"].reshape(EMBED, KV_HEADS, HEAD_DIM)
    np.testing.assert_array_equal(halves_to_pairs(made), k.T.reshape(EMBED, KV_HEADS, HEAD_DIM))


@pytest.mark.parametrize(
    ("hub", "tree", "message"),
    [
        ("key: { in: k, as: kv_heads head_dim embed }", "key: { at: k, as: embed kv_heads head_dim }", "neither side says"),
        ("down: { in: d, as: embed mlp }", "down: { at: d, as: mlp heads }", "maxtext's `odd` has `down` with axes"),
        ("down: { in: d, as: heads mlp }", "down: { at: d, as: mlp embed }", "the checkpoint has `down` with axes"),
        ("up: { in: d, as: mlp embed }", "down: { at: d, as: mlp embed }", "says nowhere where it is"),
        ("up: { in: d, as: mlp embed }", "gate: { at: d, as: mlp embed }", "which maxtext's `odd` does not have"),
    ],
)  # fmt: skip
def test_halves_that_do_not_agree_are_refused(tmp_path: Path, hub: str, tree: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        family(tmp_path, f"layers: {{ {hub} }}", f"layers: {{ {tree} }}")


def test_a_forgotten_convention_is_said_of_the_half_that_forgot_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        family(
            tmp_path,
            "norm: 1 + w, final_norm: { in: norm, as: embed }",
            "final_norm: { at: norm, as: embed }",
        )
    (found,) = caught.value.diagnostics
    assert found.message == "maxtext's `odd` does not say `norm` of `final_norm`, and the other side does"
    assert found.span and found.span.file == "targets/maxtext/odd.yaml"
    assert ("it is said here", str(tmp_path / "odd.yaml")) in [(what, s.file) for what, s in found.span.also]


@pytest.mark.parametrize("name", [m.family for m in shipped() if m.document.derived])
def test_an_expanded_family_is_a_mapping_of_the_same_rules(name: str, tmp_path: Path) -> None:
    mapping = next(m for m in shipped() if m.family == name)
    file = tmp_path / "expanded.yaml"
    file.write_text(expanded(mapping.document), "utf-8")
    assert YAML(typ="safe").load(file) == mapping.document.data
    again = load_mapping(file)
    assert again.rules == mapping.rules and again.blocks == mapping.blocks and again.dims == mapping.dims


def test_every_derived_op_of_llama_says_why() -> None:
    mapping = next(m for m in shipped() if m.family == "llama3.1")
    rules = [r for b in mapping.blocks for r in b.rules]
    reasons = {r.target: [mapping.document.reasons.get(op.where) for op in r.ops] for r in rules if r.ops}
    assert set(reasons) == {"self_attention/query/kernel", "self_attention/key/kernel"}
    assert all("halves" in str(why[0]) and "pairs" in str(why[0]) for why in reasons.values())


@pytest.mark.parametrize(
    ("text", "count", "own"),
    [
        ("(heads head_dim) embed", 1, [(("heads", "head_dim"), ("embed",))]),
        ("a 1 (b c)", 1, [(("a",), (), ("b", "c"))]),
        ("(a | b) c", 2, [(("a",), ("c",)), (("b",), ("c",))]),
        ("(k (q d | d)) e", 2, [(("k", "q", "d"), ("e",)), (("k", "d"), ("e",))]),
        ("(2 a) b", 2, [(("a",), ("b",))] * 2),
        ("2 a", 2, [(("a",),)] * 2),
        ("(a 2)", 1, [(("a", "2"),)]),
    ],
)
def test_axes_of_each_tensor(text: str, count: int, own: list[Any]) -> None:
    axes = parse(text, count)
    assert [axes.of(n) for n in range(count)] == own
    assert isinstance(axes.join, Join) == ("|" in text)


@pytest.mark.parametrize(
    ("text", "count", "at", "message"),
    [
        ("(a | b) c", 3, 3, "2 parts for 3 logical tensors"),
        ("(a | b) c", 1, 3, "2 parts for 1 logical tensor"),
        ("a b", 2, 0, "says nowhere how they lie"),
        ("2 (a | b)", 2, 0, "says twice"),
        ("(a b", 1, 0, "never closed"),
        ("a | b", 2, 2, "outside parentheses"),
        ("a a", 1, 2, "stands twice"),
        ("a, b", 1, 1, "axes are names"),
        ("((a | b) | c)", 2, 0, "within"),
    ],
)
def test_wrong_axes_say_where(text: str, count: int, at: int, message: str) -> None:
    with pytest.raises(AxesError, match=message) as caught:
        parse(text, count)
    assert caught.value.at == at


BY_LAYER = "by_layer: { layers: { head_dim: head_dim * 2 if layer == 1 else head_dim } }\n"
VALUE = "rotary: halves, layers: { value: { %s, as: %s } }"


def test_sizes_by_layer_are_those_of_each_layer(tmp_path: Path) -> None:
    mapping = family(
        tmp_path,
        VALUE % ("in: v.weight", "(kv_heads head_dim) embed"),
        VALUE % ("at: value/kernel", "embed kv_heads head_dim"),
        BY_LAYER,
    )
    dims = evaluate_dims(mapping, mapping.models["tiny"], {}, {"layers": 2})
    ((_, graph),) = all_namings(
        mapping, Options(layout="unscanned"), dims, {**dims, "config": {}, "multimodal": False}, None
    )
    shapes = {t.path[-3]: t.type.shape for t in graph.targets}
    assert shapes == {"layers_0": (EMBED, KV_HEADS, HEAD_DIM), "layers_1": (EMBED, KV_HEADS, 2 * HEAD_DIM)}


def test_sizes_that_differ_within_a_stack_are_refused(tmp_path: Path) -> None:
    tree = VALUE % ("at: value/kernel", "embed kv_heads head_dim")
    tree = tree.replace("layers: {", "layers: { scanned: [{ at: all, stack: { layer: layers } }], ")
    mapping = family(tmp_path, VALUE % ("in: v.weight", "(kv_heads head_dim) embed"), tree, BY_LAYER)
    dims = evaluate_dims(mapping, mapping.models["tiny"], {}, {"layers": 2})
    with pytest.raises(InputError, match="dim `head_dim` differs among the stacked layers"):
        list(all_namings(mapping, Options(layout="scanned"), dims, {**dims, "config": {}, "multimodal": False}, None))

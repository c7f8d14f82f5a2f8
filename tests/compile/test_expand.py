"""Rules, layouts and loops as target arrays: paths, names in their order, types, values, and the place of every error.

Values: every source tensor is random, by its name. A graph is evaluated with the ops' plain meaning (`Op.forward`), and
compared with what numpy makes of the same tensors by hand.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import zlib
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.compile.dims import evaluate_dims
from ckptc.compile.expand import expand
from ckptc.compile.options import Options
from ckptc.compile.quantised import Quantised, Weight
from ckptc.diagnostics import Diagnostic, InputError, Span
from ckptc.ir.graph import Apply, Fill, Graph, Leaf, Node, Target, leaves
from ckptc.ir.source import Checkpoint, SourceTensor
from ckptc.ir.verify import verify
from ckptc.ops.codes.fp8 import Fp8
from ckptc.ops.codes.nvfp4 import Nvfp4
from ckptc.ops.types import itemsize, numpy_dtype
from ckptc.plan.model import Plan
from ckptc.spec.expressions import MAX_STEPS
from ckptc.spec.mapping import Family, load_mapping

Array = npt.NDArray[Any]
Headers = Mapping[str, tuple[str, tuple[int, ...]]]  # tensors by name: dtype and shape

HEAD = """\
family: f
target: maxtext
extra: true
dims: { layers: 4, experts: 3, embed: 2, mlp: 5, heads: 2, head_dim: 3, factor: 0.5 }
models: { m: { repo: r/m } }
"""


def read(text: str) -> Family:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "m.yaml").write_text(text, "utf-8")
        return load_mapping(Path(directory) / "m.yaml", "m.yaml")


def marked(text: str) -> tuple[str, Span]:
    """The text without its marks, and what they enclose: `as: «vocab»`."""
    before, rest = text.split("«")
    inside, after = rest.split("»")
    line, start = before.count("\n") + 1, len(before) - before.rfind("\n")
    return before + inside + after, Span("m.yaml", line, start, len(inside))


def expanded(
    text: str,
    layout: str = "scanned",
    stored: Mapping[str, str] | str = "float32",
    config: Mapping[str, Any] | None = None,
    quantised: Quantised | None = None,
    **options: Any,
) -> Graph:
    """The graph of a mapping that says `tensors` and `blocks` after HEAD. `stored`: the source's dtypes."""
    mapping, config = read(HEAD + text), config or {}
    chosen = Options(layout=layout, **{"dtype": "float32", **options})
    dims = evaluate_dims(mapping, None, config, {})
    names = {**dims, "config": config, "multimodal": chosen.multimodal, "dtype": chosen.dtype}
    (values,) = mapping.sources.values()

    def dtype(name: str) -> str:
        return stored if isinstance(stored, str) else stored.get(name, "float32")

    return verify(expand(mapping, chosen, dims, {**names, **values}, dtype, quantised), "expand")


def shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {"/".join(t.path[2:]): t.type.shape for t in graph.targets}


def only(graph: Graph) -> Target:
    (target,) = graph.targets
    return target


def names(target: Target) -> list[str]:
    return [name for leaf in leaves(target.node) for name in leaf.tensors]


def tensor(name: str, shape: tuple[int, ...], dtype: str = "float32") -> Array:
    return np.random.default_rng(zlib.crc32(name.encode())).integers(-9, 9, shape).astype(numpy_dtype(dtype))


def value(node: Node) -> Array:
    if isinstance(node, Fill):
        return np.full(node.type.shape, node.value, np.float32)
    if isinstance(node, Leaf):
        stored = node.decoded.stored if node.decoded else node.each
        each = [tensor(name, stored.shape, stored.dtype) for name in node.tensors]
        if node.decoded:
            beside = [[tensor(n, b.type.shape, b.type.dtype) for n in b.tensors] for b in node.decoded.beside]
            each = [node.decoded.code.forward(all_, node.each.shape) for all_ in zip(each, *beside, strict=True)]
        return np.stack(each).reshape(node.type.shape)
    assert isinstance(node, Apply)
    return node.op.forward([value(n) for n in node.inputs], [n.type for n in node.inputs])


def checkpoint(headers: Headers, config: Mapping[str, Any] | None = None) -> Checkpoint:
    tensors, end = {}, 0
    for name, (dtype, shape) in headers.items():
        begin, end = end, end + int(np.prod(shape)) * itemsize(dtype)
        tensors[name] = SourceTensor(name, dtype, shape, 0, begin, end)
    return Checkpoint((), tensors, config or {})


def compiled(
    text: str, headers: Headers | None = None, config: Mapping[str, Any] | None = None, **options: Any
) -> Plan:
    """The plan of a mapping after HEAD, against a checkpoint's headers where they are given."""
    mapping = read(HEAD + text)
    found = checkpoint(headers, config) if headers is not None else None
    return compile_plan(mapping, mapping.models["m"], Options(**options), found)


def problems(
    text: str, headers: Headers | None = None, config: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Diagnostic, ...]:
    with pytest.raises(InputError) as caught:
        compiled(text, headers, config, **options)
    # That there is no config.json is said first where sizes are wrong: these headers have none.
    return tuple(d for d in caught.value.diagnostics if d.code != "missing-config" or d.span is not None)


def refused(
    text: str, code: str, headers: Headers | None = None, config: Mapping[str, Any] | None = None, **options: Any
) -> Diagnostic:
    """The only problem of a text in which «…» is what the diagnostic must underline."""
    plain, span = marked(HEAD + text)
    (found,) = problems(plain.removeprefix(HEAD), headers, config, **options)
    assert (found.code, found.span) == (code, span), found
    return found


# -- rules ---------------------------------------------------------------------------------------------------


def test_a_rule_is_one_array_of_one_tensor() -> None:
    target = only(expanded("tensors: { a/kernel: { from: x.weight, as: mlp embed -> embed mlp } }"))
    assert target.path == ("params", "params", "a", "kernel")
    assert (target.rule, names(target), target.type.shape) == ("a/kernel", ["x.weight"], (2, 5))
    assert [a.name for a in target.type.axes] == ["embed", "mlp"]
    assert np.array_equal(value(target.node), tensor("x.weight", (5, 2)).T)
    assert target.steps == ("mlp embed -> embed mlp",)


def test_the_targets_are_in_the_order_of_their_paths() -> None:
    rules = "b: { from: b, as: mlp }, a/z: { from: z, as: mlp }, a/B: { from: B, as: mlp }, a: { from: a, as: mlp }"
    assert list(shapes(expanded(f"tensors: {{ {rules} }}"))) == ["a", "a/B", "a/z", "b"]


def test_ops_are_applied_in_their_order() -> None:
    target = only(expanded("tensors: { a: { from: x, as: mlp, ops: [{ add: 1 }, { scale: factor }] } }"))
    assert np.array_equal(value(target.node), (tensor("x", (5,)) + 1) * 0.5)


def test_a_pattern_fuses_and_splits_by_the_dims() -> None:
    target = only(expanded("tensors: { a: { from: x, as: (heads head_dim) embed -> embed heads head_dim } }"))
    assert np.array_equal(value(target.node), tensor("x", (6, 2)).reshape(2, 3, 2).transpose(2, 0, 1))


def test_collection_axes_and_partial_are_kept() -> None:
    rule = "{ from: x, as: mlp embed, collection: Bias, axes: rows _, partial: because }"
    target = only(expanded(f"tensors: {{ a: {rule} }}"))
    assert (target.path, target.axes, target.partial) == (("params", "Bias", "a"), ("rows", None), "because")


@pytest.mark.parametrize(
    ("rule", "stored", "option", "expected"),
    [
        ("", "bfloat16", "float32", "float32"),  # the option's
        ("", "float32", "bfloat16", "bfloat16"),
        (", dtype: float32", "bfloat16", "bfloat16", "float32"),  # the rule's is stronger
        (", dtype: source", "float16", "bfloat16", "float16"),
        ("", "int64", "bfloat16", "int64"),  # integers are not rounded
        (", dtype: int64", "int64", "bfloat16", "int64"),
    ],
)
def test_the_stored_dtype(rule: str, stored: str, option: str, expected: str) -> None:
    target = only(expanded(f"tensors: {{ a: {{ from: x, as: mlp{rule} }} }}", stored=stored, dtype=option))
    assert target.type.dtype == expected
    assert target.steps == ((f"cast {expected}",) if stored != expected else ())


def test_fill_makes_an_array_of_no_tensor() -> None:
    target = only(expanded("tensors: { a: { fill: 0.5, as: mlp embed } }"))
    assert (names(target), value(target.node).tolist()) == ([], [[0.5, 0.5]] * 5)


def test_fill_without_a_pattern_is_one_number() -> None:
    assert only(expanded("tensors: { a: { fill: 2 } }")).type.shape == ()


def test_parts_are_concatenated_in_their_order() -> None:
    parts = "[{ from: x, as: mlp embed -> embed mlp }, { from: y, as: embed mlp, ops: [{ add: 1 }] }]"
    target = only(expanded(f"tensors: {{ a: {{ from: {parts}, ops: [{{ concat: mlp }}] }} }}"))
    assert names(target) == ["x", "y"]
    expected = np.concatenate([tensor("x", (5, 2)).T, tensor("y", (2, 5)) + 1], axis=1)
    assert np.array_equal(value(target.node), expected)


def test_parts_are_stacked_after_the_layers() -> None:
    text = """\
blocks:
  b:
    source: l.{{ layer }}
    scanned: [{ at: b, stack: { layer: layers }, axis: 0 }]
    tensors:
      a: { from: [{ from: x, as: mlp }, { from: y, as: mlp }], ops: [{ stack: pair }] }
"""
    target = only(expanded(text))
    expected = np.stack([np.stack([tensor(f"l.{n}.{part}", (5,)) for part in "xy"]) for n in range(4)])
    assert np.array_equal(value(target.node), expected)


# -- for and when --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        ("{ n: 2 }", {"a0": "x0", "a1": "x1"}),
        ("{ n: embed }", {"a0": "x0", "a1": "x1"}),
        ('{ n: "range(1, 4, 2)" }', {"a1": "x1", "a3": "x3"}),
        ("{ n: [q, k] }", {"aq": "xq", "ak": "xk"}),
        ('{ n: "[embed, mlp]" }', {"a2": "x2", "a5": "x5"}),
        ("{ n: 0 }", {}),
        ('{ n: "range(0)" }', {}),
    ],
)
def test_for_makes_an_array_for_each_value(loop: str, expected: dict[str, str]) -> None:
    graph = expanded(f'tensors: {{ "a{{{{ n }}}}": {{ for: {loop}, from: "x{{{{ n }}}}", as: mlp }} }}')
    assert {"/".join(t.path[2:]): names(t)[0] for t in graph.targets} == expected


def test_for_over_a_map_has_keys_values_and_indices() -> None:
    rule = '{ for: { n: { wi: gate, wo: down } }, from: "{{ n.value }}.{{ n.index }}", as: mlp }'
    graph = expanded(f'tensors: {{ "{{{{ n }}}}": {rule} }}')
    assert {t.path[-1]: names(t) for t in graph.targets} == {"wi": ["gate.0"], "wo": ["down.1"]}


def test_loops_nest_and_later_variables_use_earlier_ones() -> None:
    rule = '{ for: { i: 3, j: "range(i)" }, from: "{{ i }}.{{ j }}", as: mlp }'
    graph = expanded(f'tensors: {{ "{{{{ i }}}}/{{{{ j }}}}": {rule} }}')
    assert [names(t)[0] for t in graph.targets] == ["1.0", "2.0", "2.1"]


def test_when_is_asked_for_each_value_of_the_loop() -> None:
    rule = '{ for: { n: 4 }, when: n % 2 == 1, from: "{{ n }}", as: mlp }'
    assert list(shapes(expanded(f'tensors: {{ "{{{{ n }}}}": {rule} }}'))) == ["1", "3"]


@pytest.mark.parametrize(
    ("condition", "config", "there"),
    [
        ("true", {}, True),
        ("false", {}, False),
        ("config.tied | default(false)", {}, False),
        ("config.tied | default(false)", {"tied": None}, False),
        ("config.tied | default(false)", {"tied": True}, True),
        ("not multimodal", {}, True),
        ("dtype == 'float32'", {}, True),
        ("layers > 4", {}, False),
    ],
)
def test_when_decides_whether_an_array_exists(condition: str, config: dict[str, Any], there: bool) -> None:
    text = f"tensors: {{ a: {{ from: x, as: mlp, when: {condition} }} }}"
    assert len(expanded(text, config=config).targets) == there


# -- blocks, places and stacks -------------------------------------------------------------------------------

BLOCK = """\
blocks:
  b:
    source: l.{{ layer }}
    scanned: [{ at: b/layers, stack: { layer: layers } }]
    unscanned: [{ at: "b/layers_{{ layer }}", for: { layer: layers } }]
    tensors:
      a: { from: x, as: mlp embed }
"""


def test_scanned_layers_are_stacked_at_axis_1_in_their_order() -> None:
    target = only(expanded(BLOCK))
    assert (target.path[2:], target.rule) == (("b", "layers", "a"), "b: a")
    assert names(target) == [f"l.{n}.x" for n in range(4)]
    assert np.array_equal(value(target.node), np.stack([tensor(n, (5, 2)) for n in names(target)], axis=1))
    assert target.steps == ("stack 4 layers at axis 1",)


def test_unscanned_layers_are_arrays_of_their_own() -> None:
    graph = expanded(BLOCK, "unscanned")
    assert shapes(graph) == {f"b/layers_{n}/a": (5, 2) for n in range(4)}
    assert [names(t) for t in graph.targets] == [[f"l.{n}.x"] for n in range(4)]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_place_says_at_which_axis_layers_are_stacked(axis: int) -> None:
    target = only(expanded(BLOCK.replace("layers }", f"layers }}, axis: {axis}", 1)))
    assert np.array_equal(value(target.node), np.stack([tensor(n, (5, 2)) for n in names(target)], axis=axis))


def test_a_rule_may_say_another_axis() -> None:
    assert only(expanded(BLOCK.replace("as: mlp embed", "as: mlp embed, axis: 0"))).type.shape == (4, 5, 2)


def test_a_layers_axis_does_not_matter_where_nothing_is_stacked() -> None:
    graph = expanded(BLOCK.replace("as: mlp embed", "as: mlp embed, axis: 0"), "unscanned")
    assert set(shapes(graph).values()) == {(5, 2)}


TWO = """\
blocks:
  b:
    source: l.{{ layer }}
    scanned: [{ at: b, stack: { block: 2, local: 3 }, AXIS let: { layer: 4 * block + local } }]
    tensors:
      a: { from: x, as: mlp embed }
"""


@pytest.mark.parametrize(
    ("axis", "positions"), [("", (1, 2)), ("axis: 0,", (0, 1)), ("axis: [1, 2],", (1, 2)), ("axis: [2, 0],", (2, 0))]
)
def test_two_stacking_variables_are_two_axes(axis: str, positions: tuple[int, int]) -> None:
    target = only(expanded(TWO.replace("AXIS", axis)))
    assert names(target) == [f"l.{n}.x" for n in (0, 1, 2, 4, 5, 6)], "the first varies slowest"
    grid = np.stack([tensor(n, (5, 2)) for n in names(target)]).reshape(2, 3, 5, 2)
    assert np.array_equal(value(target.node), np.moveaxis(grid, (0, 1), positions))


def test_a_cycle_of_layers_with_a_remainder() -> None:
    text = """\
blocks:
  b:
    source: l.{{ layer }}
    scanned:
      - { at: "b/{{ k }}", for: { k: 3 }, stack: { step: layers // 3 }, let: { layer: 3 * step + k } }
      - { at: "rest/{{ r }}", for: { r: layers % 3 }, let: { layer: layers - layers % 3 + r } }
    tensors:
      a: { from: x, as: mlp }
"""
    graph = expanded(text)
    assert shapes(graph) == {"b/0/a": (5, 1), "b/1/a": (5, 1), "b/2/a": (5, 1), "rest/0/a": (5,)}
    assert [names(t) for t in graph.targets] == [["l.0.x"], ["l.1.x"], ["l.2.x"], ["l.3.x"]]


def test_a_rules_own_stack_lies_where_its_pattern_says_and_layers_go_between() -> None:
    rule = '{ stack: { expert: experts }, from: "e.{{ expert }}.x", as: mlp embed -> expert embed mlp }'
    target = only(expanded(BLOCK.replace("{ from: x, as: mlp embed }", rule)))
    assert names(target) == [f"l.{n}.e.{e}.x" for n in range(4) for e in range(3)]
    grid = np.stack([tensor(n, (5, 2)) for n in names(target)]).reshape(4, 3, 5, 2)
    assert np.array_equal(value(target.node), grid.transpose(1, 0, 3, 2))
    assert [a.name for a in target.type.axes] == ["expert", "layer", "embed", "mlp"]


def test_a_rules_own_stack_may_lie_anywhere() -> None:
    rule = '{ stack: { expert: experts }, from: "e.{{ expert }}.x", as: mlp embed -> mlp expert embed }'
    target = only(expanded(f"tensors: {{ a: {rule} }}"))
    assert np.array_equal(value(target.node), np.stack([tensor(n, (5, 2)) for n in names(target)], axis=1))


def test_a_rules_stack_of_two_variables() -> None:
    rule = '{ stack: { i: 2, j: 3 }, from: "{{ i }}.{{ j }}", as: mlp -> j mlp i }'
    target = only(expanded(f"tensors: {{ a: {rule} }}"))
    assert names(target) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    grid = np.stack([tensor(n, (5,)) for n in names(target)]).reshape(2, 3, 5)
    assert np.array_equal(value(target.node), grid.transpose(1, 2, 0))


def test_a_stack_may_run_over_a_range() -> None:
    target = only(expanded(BLOCK.replace("layer: layers }", 'layer: "range(1, layers, 2)" }', 1)))
    assert names(target) == ["l.1.x", "l.3.x"]


def test_a_stack_or_a_loop_over_nothing_makes_no_arrays() -> None:
    assert expanded(BLOCK.replace("layers }", "layers - 4 }", 1)).targets == ()
    assert expanded(BLOCK.replace("for: { layer: layers", "for: { layer: layers - 4"), "unscanned").targets == ()


def test_always_places_are_in_both_layouts() -> None:
    text = BLOCK.replace(
        "scanned: [{ at: b/layers, stack: { layer: layers } }]", "always: [{ at: b, let: { layer: 7 } }]"
    )
    text = "".join(line for line in text.splitlines(True) if "unscanned" not in line)
    for layout in ("scanned", "unscanned"):
        assert [names(t) for t in expanded(text, layout).targets] == [["l.7.x"]]


def test_when_of_blocks_and_places() -> None:
    assert expanded(BLOCK.replace("    source:", "    when: layers > 4\n    source:")).targets == ()
    assert expanded(BLOCK.replace("layers } }]", "layers }, when: layers > 4 }]", 1)).targets == ()
    looped = BLOCK.replace("for: { layer: layers }", "for: { layer: layers }, when: layer % 2 == 0")
    assert list(shapes(expanded(looped, "unscanned"))) == ["b/layers_0/a", "b/layers_2/a"]


def test_when_of_a_rule_may_differ_between_places_and_must_not_within_a_stack() -> None:
    odd = BLOCK.replace("as: mlp embed", "as: mlp embed, when: layer % 2 == 1")
    assert list(shapes(expanded(odd, "unscanned"))) == ["b/layers_1/a", "b/layers_3/a"]
    assert len(expanded(odd.replace("layer: layers }", 'layer: "range(1, 4, 2)" }', 1)).targets) == 1
    assert len(expanded(odd.replace("layer: layers }", 'layer: "range(0, 4, 2)" }', 1)).targets) == 0
    found = refused(odd.replace("layer % 2 == 1", "«layer % 2 == 1»"), "invalid-expression")
    assert found.message == "true for some of the stacked layers and false for others"


def test_let_may_give_a_dim_another_value_for_the_patterns_of_its_place() -> None:
    text = BLOCK.replace("layers } }]", "layers }, let: { mlp: 2 * mlp } }]", 1)
    assert only(expanded(text)).type.shape == (10, 4, 2)
    assert set(shapes(expanded(text, "unscanned")).values()) == {(5, 2)}, "and not elsewhere"


def test_let_may_not_give_a_dim_values_that_differ_along_a_stack() -> None:
    text = BLOCK.replace("layers } }]", "layers }, let: { mlp: «mlp + layer» } }]", 1)
    assert "dim `mlp` differs among the stacked layers" in refused(text, "invalid-value").message


# -- weights that are stored as codes ------------------------------------------------------------------------

CODED = "tensors: { a: { from: x.weight, as: mlp embed -> embed mlp } }\n"
STACKED = 'tensors: { a: { stack: { n: 4 }, from: "{{ n }}.weight", as: mlp embed -> n embed mlp } }\n'


def fp8(*names: str) -> tuple[Quantised, dict[str, str]]:
    """Those weights in fp8 by blocks of two by two, and the dtypes of the tensors."""
    weights = {f"{n}.weight": Weight(Fp8((2, 2)), f"{n}.weight", (f"{n}.scale",)) for n in names}
    return Quantised(weights), {**dict.fromkeys(weights, "float8_e4m3fn")}


def test_a_weight_that_is_stored_as_codes_is_decoded() -> None:
    quantised, stored = fp8("x")
    target = only(expanded(CODED, stored=stored, quantised=quantised))
    (leaf,) = leaves(target.node)
    assert leaf.decoded and leaf.decoded.beside[0].tensors == ("x.scale",)
    assert leaf.decoded.beside[0].type.shape == (3, 1)
    weight = tensor("x.weight", (5, 2), "float8_e4m3fn").astype(np.float32)
    scale = tensor("x.scale", (3, 1)).repeat(2, axis=0)[:5]
    assert np.array_equal(value(target.node), (weight * scale).T)
    assert target.steps == ("fp8 in blocks of 2x2", "mlp embed -> embed mlp")


def test_scales_of_stacked_weights_follow_them() -> None:
    quantised, stored = fp8("0", "1", "2", "3")
    (leaf,) = leaves(only(expanded(STACKED, stored=stored, quantised=quantised)).node)
    assert leaf.decoded and leaf.decoded.beside[0].tensors == ("0.scale", "1.scale", "2.scale", "3.scale")


@pytest.mark.parametrize("coded", ["0", "3", "12", "02", "123"])
def test_some_of_the_stacked_weights_may_be_codes(coded: str) -> None:
    quantised, stored = fp8(*coded)
    target = only(expanded(STACKED, stored=stored, quantised=quantised))
    each = []
    for n in "0123":
        weight = tensor(f"{n}.weight", (5, 2), stored.get(f"{n}.weight", "float32")).astype(np.float32)
        scale = tensor(f"{n}.scale", (3, 1)).repeat(2, axis=0)[:5]
        each.append((weight * scale if n in coded else weight).T)
    assert np.array_equal(value(target.node), np.stack(each))


def test_experts_of_a_layer_may_be_stored_in_two_ways() -> None:
    text = 'tensors: { a: { stack: { n: 2, e: 2 }, from: "{{ n }}{{ e }}.weight", as: mlp embed -> n e embed mlp } }\n'
    quantised, stored = fp8("00", "11")
    target = only(expanded(text, stored=stored, quantised=quantised))
    for n, e in product(range(2), range(2)):
        weight = tensor(f"{n}{e}.weight", (5, 2), stored.get(f"{n}{e}.weight", "float32")).astype(np.float32)
        scale = tensor(f"{n}{e}.scale", (3, 1)).repeat(2, axis=0)[:5]
        assert np.array_equal(value(target.node)[n, e], (weight * scale if n == e else weight).T)


def test_a_weight_of_a_shape_that_a_code_has_not_is_refused_at_its_rule() -> None:
    quantised = Quantised({"x.weight": Weight(Nvfp4(True), "x.weight_packed", ("x.weight_scale", "x.global"))})
    with pytest.raises(InputError) as caught:
        expanded(CODED, quantised=quantised)
    (found,) = caught.value.diagnostics
    assert found.code == "op-mismatch"
    assert found.message.startswith("`x.weight` is stored as nvfp4: nvfp4 needs rows of whole groups of 16")


def test_a_decoded_array_is_stored_in_the_chosen_dtype() -> None:
    quantised, stored = fp8("x")
    target = only(expanded(CODED, stored=stored, quantised=quantised, dtype="bfloat16"))
    assert value(target.node).dtype == ml_dtypes.bfloat16


# -- namings and ignore --------------------------------------------------------------------------------------

NAMINGS = """\
sources:
  hub: { text: model, side: left }
  moved: { text: model.language_model, side: right }
tensors: { "{{ side }}": { from: "{{ text }}.x", as: mlp } }
"""


@pytest.mark.parametrize(
    ("headers", "naming", "path"),
    [
        ({"model.x": ("float32", (5,))}, "hub", "params/params/left"),
        ({"model.language_model.x": ("float32", (5,))}, "moved", "params/params/right"),
        (None, "hub", "params/params/left"),  # the order of preference
    ],
)
def test_the_headers_decide_which_naming_a_checkpoint_has(headers: Headers | None, naming: str, path: str) -> None:
    plan = compiled(NAMINGS, headers)
    assert (plan.choices.naming, [a.name for a in plan.arrays]) == (naming, [path])


def test_where_no_naming_fits_the_one_that_lacks_least_is_reported() -> None:
    text = """\
blocks:
  b: { source: "{{ text }}", always: [{ at: b }], tensors: { y: { from: y, as: mlp } } }
"""
    (found,) = problems(NAMINGS + text, {"model.language_model.x": ("float32", (5,))})
    assert found.message == "the checkpoint has no tensor `model.language_model.y`"


def test_ignore_patterns_are_templates_with_loops_and_conditions() -> None:
    text = """\
tensors: { a: { from: x, as: mlp } }
ignore:
  - { source: "l.{{ n }}.bias", for: { n: 4 }, when: n % 2 == 0, reason: none needed }
  - { source: "*.inv_freq", reason: computed }
  - { source: never, when: layers == 5, reason: not here }
"""
    ignored = expanded(text).ignored
    assert [(i.patterns, i.reason) for i in ignored] == [
        (("l.0.bias", "l.2.bias"), "none needed"),
        (("*.inv_freq",), "computed"),
    ]


# -- errors --------------------------------------------------------------------------------------------------


def rule(text: str) -> str:
    return f"tensors:\n  a: {text}\n"


ERRORS: list[tuple[str, str, str]] = [
    # names and expressions
    (rule('{ from: «"{{ y }}.x"», as: mlp }'), "invalid-template", "'y' is undefined"),
    (rule('{ from: «"{{ factor }}.x"», as: mlp }'), "invalid-template", "text and whole numbers"),
    (rule("{ from: x, as: mlp, when: «tied» }"), "invalid-expression", "'tied' is undefined"),
    (rule("{ from: x, as: mlp, for: { n: «factor» } }"), "invalid-expression", "a count, a range or a list is needed"),
    (rule("{ from: x, as: mlp, for: { n: «true» } }"), "invalid-expression", "a count, a range or a list is needed"),
    (rule("{ from: x, as: mlp, stack: { n: «mlp / 2» } }"), "invalid-expression", "a count, a range or a list"),
    ("tensors:\n  a//b: «{» from: x, as: mlp }\n", "invalid-template", "`a//b` is not a path"),
    # patterns
    (rule("{ from: x, as: mlp «mpl» }"), "unknown-dim", "there is no dim `mpl`"),
    (rule("{ from: x, as: (mlp «mpl») }"), "unknown-dim", "there is no dim `mpl`"),
    (rule('{ from: x, as: "mlp «mpl»" }'), "unknown-dim", "there is no dim `mpl`"),
    (rule("{ from: x, as: mlp «factor» }"), "invalid-pattern", "is 0.5, which is not the size of an axis"),
    (rule("{ from: x, as: mlp «=»> mlp }"), "invalid-pattern", "a pattern has names"),
    (rule("{ from: x, as: «mlp -> embed» }"), "invalid-pattern", "only on the left: mlp"),
    (rule("{ from: x, as: mlp «mlp» }"), "invalid-pattern", "`mlp` stands twice on one side"),
    (rule('{ from: "{{ n }}", stack: { n: 2 }, as: «mlp» }'), "invalid-pattern", "stacking axis `n` has no place"),
    # sources
    (rule("«{» from: x }"), "missing-key", "`as` is missing"),
    (rule("«{» as: mlp }"), "missing-key", "`from` is missing"),
    (rule('{ from: "{{ n }}", stack: «{» n: 0 }, as: mlp -> n mlp }'), "invalid-value", "stacks no tensors at all"),
    (rule("{ from: «[»{ from: x, as: mlp }, { from: y, as: mlp }] }"), "unjoined-parts", "the parts are not joined"),
    # ops
    (rule("{ from: x, as: mlp, ops: [{ scale: «heads *» }] }"), "invalid-expression", ""),
    (rule("{ from: x, as: mlp, ops: [{ permute_rope: «mlp» }] }"), "op-mismatch", "`mlp` is 5"),
    (rule("{ from: x, as: mlp, ops: [{ add: 1 }, { permute_rope: «embed» }] }"), "op-mismatch", "no axis `embed`"),
    (
        rule("{ from: [{ from: x, as: mlp, ops: [{ permute_rope: «mlp» }] }, { from: y, as: mlp }] }"),
        "op-mismatch",
        "`mlp` is 5",
    ),
    (rule("{ from: x, as: mlp embed, ops: [{ rearrange: mlp embed -> embed «mpl» }] }"), "unknown-dim", "no dim `mpl`"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "message"), ERRORS)
def test_errors_of_a_rule_are_at_their_place(text: str, code: str, message: str) -> None:
    assert message in refused(text, code).message


PLACES: list[tuple[str, str, str]] = [
    ("source: l.{{ layer }}", "source: «l.{{ lair }}»", "'lair' is undefined"),
    ("at: b/layers,", 'at: «"b/{{ n }}"»,', "'n' is undefined"),
    ("stack: { layer: layers }", "stack: { layer: «layer» }", "'layer' is undefined"),
    ("layers } }]", "layers }, let: { m: «layer / lair» } }]", "'lair' is undefined"),
    ("layers } }]", "layers }, when: «odd» }]", "'odd' is undefined"),
    ("layers } }]", "layers }, axis: «[»1, 2] }]", "2 positions for 1 stacking axes"),
]


@pytest.mark.parametrize(("old", "new", "message"), PLACES)
def test_errors_of_a_place_are_at_their_place(old: str, new: str, message: str) -> None:
    text = BLOCK.replace(old, new, 1)
    plain, span = marked(HEAD + text)
    (found,) = problems(plain.removeprefix(HEAD))
    assert (found.span, message in found.message) == (span, True), found


def test_a_stacking_variable_is_no_axis_of_a_layers_tensor() -> None:
    text = BLOCK.replace("layer: layers }", "experts: layers }, let: { layer: experts }", 1)
    found = refused(text.replace("as: mlp embed", "as: «experts mlp -> mlp experts»"), "invalid-pattern")
    assert "`experts` is a stacking variable of the layout" in found.message


def test_an_axis_past_the_end_is_refused_at_the_rule() -> None:
    found = refused(BLOCK.replace("{ from: x, as: mlp embed }", "«{» from: x, as: mlp embed, axis: 3 }"), "op-mismatch")
    assert found.message == "axis 3 for the layers is past the end of bfloat16[layer=4, mlp=5, embed=2]"


def test_the_problems_of_all_rules_are_reported_together() -> None:
    text = """\
tensors:
  a: { from: x, as: mlp none }
  b: { from: "{{ none }}", as: mlp }
blocks:
  b:
    source: l.{{ layer }}
    scanned: [{ at: b/layers, stack: { layer: layers } }]
    tensors:
      c: { from: x, as: mlp, ops: [{ permute_rope: mlp }] }
      d: { from: x, as: none }
"""
    found = problems(text)
    lines = [d.span.line - HEAD.count("\n") for d in found if d.span]
    assert [d.code for d in found] == ["unknown-dim", "invalid-template", "op-mismatch", "unknown-dim"]
    assert lines == [2, 3, 9, 10]


def test_a_problem_that_every_layer_has_is_reported_once() -> None:
    assert len(problems(BLOCK.replace("mlp embed", "mlp none"), layout="unscanned")) == 1


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ("unsupported: [{ layout: scanned, reason: «because of this» }]", "unsupported-layout"),
        ("unsupported: [{ layout: scanned, when: layers == 4, reason: «because of this» }]", "unsupported-layout"),
    ],
)
def test_a_layout_the_target_lacks(entry: str, code: str) -> None:
    text = f"{entry}\ntensors: {{ a: {{ from: x, as: mlp }} }}\n"
    found = refused(text, code)
    assert (found.message, found.help) == ("m has no scanned layout: because of this", "use --no-scan")
    assert len(compiled(marked(text)[0], layout="unscanned").arrays) == 1


def test_a_layout_that_some_models_lack_is_there_for_the_others() -> None:
    text = (
        "unsupported: [{ layout: scanned, when: layers == 5, reason: because }]\ntensors: { a: { from: x, as: mlp } }\n"
    )
    assert len(compiled(text).arrays) == 1


def test_a_family_without_towers_cannot_be_multimodal() -> None:
    (found,) = problems("tensors: { a: { from: x, as: mlp } }\n", multimodal=True)
    assert (found.code, found.help) == ("no-towers", "leave out --multimodal")


def test_logical_axes_are_as_many_as_the_arrays() -> None:
    found = refused("tensors: { a: { from: x, as: mlp embed, axes: «rows» } }\n", "op-mismatch")
    assert "2 axes" in found.message


def test_an_error_of_a_place_does_not_hide_those_of_rules() -> None:
    text = BLOCK.replace("source: l.{{ layer }}", "source: l.{{ lair }}").replace("mlp embed }", "mlp none }")
    found = problems("tensors: { t: { from: x, as: none } }\n" + text)
    assert [d.code for d in found] == ["unknown-dim", "invalid-template"]


SLOW = (
    "min(range(99999))",
    "1 if 1.5 in range(99999) else 2",
    "1 if config.words == config.words else 2",
)


@pytest.mark.parametrize("expression", SLOW, ids=lambda text: text[:12])
def test_what_takes_long_at_each_of_many_points_is_refused_by_its_steps(expression: str) -> None:
    slow = f'"a/{{{{ i }}}}": {{ for: {{ i: range(99999) }}, from: "x{{{{ {expression} }}}}", as: mlp }}'
    found = problems(f"tensors:\n  {slow}\n", {"x": ("float32", (5,))}, {"words": ["w"] * 200_000})
    assert [d.code for d in found] == ["too-large"]
    assert found[0].message == f"going through loops and stacks takes more than {MAX_STEPS} steps"


def test_steps_do_not_depend_on_how_fast_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0, 1000)
    for clock in ("process_time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, clock, lambda: next(ticks))
    monkeypatch.setattr("ckptc.compile.scope.process_time", lambda: next(ticks), raising=False)
    assert len(compiled(BLOCK).arrays) == 1


def test_many_names_at_many_points_are_refused_before_they_are_made() -> None:
    dims = "".join(f", d{n}: {n + 1}" for n in range(2000))
    text = "tensors: { a: { from: 'x{{ i }}', as: mlp -> i mlp, stack: { i: range(90000) } } }\n"
    mapping = read(HEAD.replace(", factor: 0.5", dims) + text)
    with pytest.raises(InputError, match=r"too-large: .* for 20\d\d names"):
        compile_plan(mapping, mapping.models["m"], Options())


@pytest.mark.parametrize("target", ["''", "a/", "/a", "a//b", "\"{{ '' }}\"", "\"a/{{ '' }}\"", "\"{{ '' }}/a\""])
def test_an_empty_part_of_a_path_is_refused(target: str) -> None:
    text = f"tensors: {{ {target}: {{ from: x, as: mlp }} }}\n"
    (found,) = problems(text)
    assert found.code in ("invalid-template", "invalid-value")
    assert found.message.endswith("is not a path") or "empty" in found.message


@pytest.mark.parametrize("at", ["/l", "l/", "l//m", "\"{{ '' }}\""])
def test_an_empty_part_of_a_place_is_refused(at: str) -> None:
    text = BLOCK.replace("at: b/layers,", f"at: {at},")
    (found,) = problems(text)
    assert found.code == "invalid-template" and found.message.endswith("is not a path")


def test_a_dim_of_a_place_may_be_a_list_of_which_nothing_is_made() -> None:
    text = BLOCK.replace("stack: { layer: layers } }]", "stack: { layer: layers }, let: { embed: config.sizes } }]", 1)
    found = problems(text, {"x": ("float32", (5,))}, {"sizes": [1, 2]})
    assert [d.message for d in found] == ["dim `embed` is [1, 2], which is not the size of an axis"]

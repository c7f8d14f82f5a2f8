"""Every named model, in every layout MaxText has: the compiled arrays are MaxText's own parameter tree, paths and shapes,
but for the collection of what routes tokens to experts."""

from __future__ import annotations

import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.spec.mapping import shipped
from reference import MOVED, placed, tree, trees

MODELS = {name: (mapping, model) for mapping in shipped() for name, model in mapping.models.items()}
# Names MaxText has no tree for: another name, or a sister, of a model that it has.
ALIASES = {
    "qwen3-coder-480b-a35b": "qwen3-480b-a35b",
    "qwen3.5-35b-fp8": "qwen3.5-35b-a3b-fp8",  # under its own name MaxText has no settings, and builds a small Llama
}
CASES = [(name, layout) for name in MODELS for layout in trees().get(ALIASES.get(name, name), {})]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_arrays_are_maxtexts_tree(name: str, layout: str) -> None:
    mapping, model = MODELS[name]
    options = Options(
        layout="unscanned" if layout.startswith("unscan") else "scanned",
        multimodal=layout.endswith(".mm"),
        dtype="float8_e4m3fn" if name.endswith("-fp8") else "bfloat16",  # their trees have scales: nothing is decoded
    )
    plan = compile_plan(mapping, model, options)
    expected = {path: shape for path, (shape, _) in tree(ALIASES.get(name, name), layout).items()}
    assert {a.name: a.shape for a in plan.arrays} == expected
    assert [a.name for a in plan.arrays] == sorted(a.name for a in plan.arrays)


def test_trees_differ_from_the_output_in_the_place_of_the_routing_alone() -> None:
    moved = {
        (m, path)
        for m, layouts in trees().items()
        for tree in layouts.values()
        for path in tree
        if placed(path) != path
    }
    assert {model for model, _ in moved} == {m for m in trees() if m.startswith(("deepseek3", "deepseek4", "kimi"))}
    assert all(path.split("/")[1] in MOVED and path.endswith(MOVED[path.split("/")[1]]) for _, path in moved)


def test_every_tree_has_its_model() -> None:
    assert set(trees()) - set(MODELS) == set()

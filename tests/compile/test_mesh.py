"""Arrays lie on a mesh as flax and MaxText lay them, and their shards are whole chunks."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import flax.linen
import pytest
from jax.sharding import PartitionSpec

from ckptc.cli import render
from ckptc.cli.render import orbax
from ckptc.compile.compiler import compile_plan
from ckptc.compile.mesh import Mesh, Spec, partition, read_mesh
from ckptc.compile.options import Options
from ckptc.diagnostics import InputError
from ckptc.plan.check import check_plan
from ckptc.plan.json import dumps, loads
from ckptc.plan.model import Plan
from ckptc.spec.mapping import load_mapping, shipped
from ckptc.spec.rules import load_rules
from ckptc.spec.target import Rules, target_tree
from plans import altered, with_arrays
from reference import tree, trees

TREE = target_tree("maxtext")
MESHES: tuple[Mesh, ...] = tuple(
    read_mesh(text, TREE.mesh_axes)
    for text in (
        "fsdp=16,tensor=4",
        "tensor=8",
        "fsdp=8,fsdp_transpose=4",
        "fsdp=4,expert=8,tensor=2,stage=1",
        "stage=2,context=2,tensor_sequence=3,autoregressive=2",
        "data=64",
    )
)
RULE_SETS: dict[str, str] = {
    "default": "",
    "one": "logical_axis_rules: [[mlp, [fsdp]], [embed, tensor], [heads, null]]",
    "all": "override_logical_axis_rules: true\nlogical_axis_rules: [[embed, fsdp], [mlp, fsdp], [embed, tensor], [mlp, tensor]]",
}


def rules_of(name: str, directory: Path) -> Rules:
    if not RULE_SETS[name]:
        return TREE.rules
    (directory / "rules.yaml").write_text(RULE_SETS[name], "utf-8")
    return load_rules(directory / "rules.yaml", TREE)[1]


def flaxs(axes: tuple[str | None, ...], mesh: Mesh, rules: Rules) -> list[list[str]]:
    """Of each axis, the mesh axes that flax gives it, without those of size 1, as MaxText leaves them out."""
    sizes = dict(mesh)
    found: Any = flax.linen.logical_to_mesh_axes(axes, rules)
    assert isinstance(found, PartitionSpec)
    named = [[] if over is None else [over] if isinstance(over, str) else list(over) for over in found]
    return [[name for name in over if sizes.get(name, 1) > 1] for over in named]


@pytest.mark.parametrize("name", RULE_SETS)
def test_every_array_is_sharded_as_by_flax(name: str, tmp_path: Path) -> None:
    rules = rules_of(name, tmp_path)
    seen = set()
    for model, layouts in trees().items():
        for layout in layouts:
            for shape, axes in tree(model, layout).values():
                if len(axes) == len(shape):
                    seen.add((axes, shape))
    assert len(seen) > 500
    some = 0
    for axes, shape in seen:
        for mesh in MESHES:
            split = partition(axes, shape, mesh, rules)
            # What divides and what does not is together what flax says, in its order.
            expected = flaxs(axes, mesh, rules)
            assert [sorted(a + b, key=e.index) for a, b, e in zip(
                map(list, split.spec), map(list, split.indivisible), expected, strict=True
            )] == expected  # fmt: skip
            for size, shards, left in zip(shape, split.shards(mesh, len(shape)), split.indivisible, strict=True):
                assert size % shards == 0
                assert all(size % (shards * dict(mesh)[name]) for name in left)
            some += any(split.spec)
    assert some > 500


def test_rules_take_the_place_of_those_of_the_same_axes_and_come_last(tmp_path: Path) -> None:
    one, all_ = rules_of("one", tmp_path), rules_of("all", tmp_path)
    assert one[-3:] == (("mlp", ("fsdp",)), ("embed", ("tensor",)), ("heads", ()))
    assert one[:-3] == tuple(rule for rule in TREE.rules if rule[0] not in ("mlp", "embed", "heads"))
    assert [logical for logical, _ in all_] == ["embed", "mlp", "embed", "mlp"]


def test_a_file_with_axes_of_a_mesh_has_all_the_rules(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("mesh_axes: [b, a]\nlogical_axis_rules: [[embed, [a, b]]]\nsteps: 3\n", "utf-8")
    axes, rules = load_rules(tmp_path / "r.yaml", TREE)
    assert (axes, rules) == (("b", "a"), (("embed", ("a", "b")),))
    assert read_mesh(" a=2, b=3", axes) == (("b", 3), ("a", 2)), "the order of the mesh is the target's"


@pytest.mark.parametrize(
    ("shape", "spec", "indivisible"),
    [
        ((64, 8), (("fsdp", "tensor"), ()), ((), ())),
        ((24, 8), (("fsdp",), ()), (("tensor",), ())),
        ((12, 8), (("tensor",), ()), (("fsdp",), ())),
        ((9, 8), ((), ()), (("fsdp", "tensor"), ())),
    ],
)
def test_a_mesh_axis_that_does_not_divide_is_left_out(shape: tuple[int, ...], spec: Spec, indivisible: Spec) -> None:
    split = partition(("x", None), shape, (("fsdp", 8), ("tensor", 4)), (("x", ("fsdp", "tensor")),))
    assert (split.spec, split.indivisible) == (spec, indivisible)


def compiled(model: str, mesh: str, **options: Any) -> Plan:
    mapping, found = next((m, m.models[model]) for m in shipped() if model in m.models)
    options |= {"mesh": read_mesh(mesh, TREE.mesh_axes), "rules": TREE.rules}
    return compile_plan(mapping, found, Options(**options))


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("llama3.1-8b", "fsdp=16,tensor=4"),
        ("gemma2-2b", "fsdp=256"),
        ("qwen3-30b-a3b", "fsdp=8,expert=8"),
        ("deepseek3-671b", "fsdp=16,expert=16,tensor=2"),
    ],
)
def test_shards_are_whole_chunks_within_the_budget(model: str, mesh: str) -> None:
    plan = compiled(model, mesh, memory=64 << 20)
    check_plan(plan, "plan")
    assert plan.totals.peak_memory_bytes <= plan.choices.memory
    for a in plan.arrays:
        for size, shards, chunk, unit in zip(a.shape, a.shards, a.chunk, a.unit, strict=True):
            assert shards == 1 or (size % shards == 0 and size // shards % chunk == 0), a.name
            assert unit % chunk == 0 or unit == size, a.name
    assert any(prod(a.shards) == prod(n for _, n in orbax(plan).mesh) for a in plan.arrays)


def test_the_source_is_read_once_for_a_mesh_too() -> None:
    plan = compiled("llama3.1-8b", "fsdp=16,tensor=4")
    assert plan.totals.read_bytes == sum(t.end - t.begin for t in plan.tensors)


def test_an_awkward_share_is_cut_into_whole_chunks(tmp_path: Path) -> None:
    """Shares of 11 · 173 rows, of which 600 would fit: eleven chunks, and not four of which the last is smaller."""
    (tmp_path / "m.yaml").write_text(
        "family: f\ntarget: maxtext\nextra: true\ndims: { vocab: 4 * 1903, embed: 4096 }\nmodels: { m: { repo: r } }\n"
        "tensors: { token_embedder/embedding: { from: a, as: vocab embed } }\n",
        "utf-8",
    )
    mapping = load_mapping(tmp_path / "m.yaml")
    options = Options(mesh=(("tensor", 4),), rules=TREE.rules, memory=4 * 600 * 4096 * 4)
    (array,) = compile_plan(mapping, mapping.models["m"], options).arrays
    assert (array.shards, array.chunk) == ((4, 1), (173, 4096))


def test_a_plan_keeps_its_mesh() -> None:
    plan = compiled("llama3.1-8b", "fsdp=16,tensor=4")
    assert loads(dumps(plan)) == plan
    wi = next(a for a in plan.arrays if a.name.endswith("wi_0/kernel"))
    assert (wi.axes, wi.spec) == (("embed", "layers", "mlp"), (("fsdp",), (), ("tensor",)))
    assert '"mesh"' not in dumps(compile_without_mesh()) and '"spec"' not in dumps(compile_without_mesh())


def compile_without_mesh() -> Plan:
    mapping, model = next((m, m.models["llama3.1-8b"]) for m in shipped() if "llama3.1-8b" in m.models)
    return compile_plan(mapping, model, Options())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: {"spec": (("fsdp",), (), ("fsdp",))}, "each once"),
        (lambda a: {"spec": (("data",), (), ("tensor",))}, "not sharded over axes of the mesh"),
        (lambda a: {"shards": (4, 1, 4)}, "has shards [4, 1, 4], its mesh makes [16, 1, 4]"),
        (lambda a: {"chunk": (a.chunk[0] * 2, *a.chunk[1:]), "stored": ()}, "are not whole chunks"),
    ],
)
def test_a_plan_that_contradicts_its_mesh_is_refused(change: Any, reason: str) -> None:
    plan = compiled("llama3.1-8b", "fsdp=16,tensor=4")
    arrays = [altered(a, **change(a)) if a.name.endswith("wi_0/kernel") else a for a in plan.arrays]
    with pytest.raises(InputError, match="invalid-plan") as caught:
        check_plan(with_arrays(plan, arrays), "plan")
    assert reason in str(caught.value)


def test_the_summary_says_how_arrays_lie_on_the_mesh_and_what_does_not_divide() -> None:
    text = render.summary(compiled("llama3.1-8b", "fsdp=3,tensor=4"))
    assert "\nmesh    fsdp=3, tensor=4: 12 devices, 12 arrays sharded, 0 whole on each, 4.02 GB a device\n" in text
    assert "axis embed=4096 is not divided by fsdp=3 in 3 arrays: not sharded over it; JAX refuses" in text
    assert "-, -, tensor" in text
    assert "mesh " not in render.summary(compile_without_mesh())

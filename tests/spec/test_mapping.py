"""A mapping's YAML as records: defaults, models that share numbers, and finding a model by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptc.diagnostics import Diagnostic, InputError, Span
from ckptc.spec import mapping as spec
from ckptc.spec.mapping import Family, find_model, load_mapping, shipped

HEAD = "family: f\ntarget: maxtext\nextra: true\ndims: { a: 1 }\n"
MODELS = "models: { m: { repo: r/m } }\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def read(directory: Path, text: str) -> Family:
    (directory / "m.yaml").write_text(text, "utf-8")
    return load_mapping(directory / "m.yaml", "m.yaml")


def refused(directory: Path, text: str) -> Diagnostic:
    """The only problem of a text in which «…» is what the diagnostic must underline."""
    before, rest = text.split("«")
    inside, after = rest.split("»")
    with pytest.raises(InputError) as caught:
        read(directory, before + inside + after)
    (found,) = caught.value.diagnostics
    assert found.span == Span("m.yaml", before.count("\n") + 1, len(before) - before.rfind("\n"), len(inside))
    return found


# -- records -------------------------------------------------------------------------------------------------


def test_what_is_left_out_has_its_default(directory: Path) -> None:
    found = read(directory, HEAD + MODELS)
    assert (found.family, found.title, found.target, found.dims) == ("f", "", "maxtext", {"a": 1})
    assert (found.multimodal, found.unsupported, found.rules) == (False, (), ())
    assert (found.blocks, found.ignore, found.sources) == ((), (), {"hub": {}})


def test_a_rule_of_one_source(directory: Path) -> None:
    (rule,) = read(directory, HEAD + MODELS + "tensors: { a/b: { from: x, as: c d, ops: [{ add: 1 }] } }\n").rules
    (origin,) = rule.origins
    assert (rule.target, origin.name, origin.pattern, origin.ops) == ("a/b", "x", "c d", ())
    assert [(op.name, op.argument, op.where) for op in rule.ops] == [("add", 1, ("tensors", "a/b", "ops", 0, "add"))]
    assert (rule.fill, rule.dtype, rule.loop, rule.stack, rule.when) == (None, None, {}, {}, None)
    assert (rule.collection, rule.axes, rule.axis, rule.partial) == ("params", None, None, None)
    assert rule.where == ("tensors", "a/b")


def test_a_rule_of_parts_has_an_origin_for_each(directory: Path) -> None:
    parts = "[{ from: x, as: c, ops: [{ scale: 2 }] }, { from: y, as: d }]"
    (rule,) = read(directory, HEAD + MODELS + f"tensors: {{ a: {{ from: {parts}, ops: [{{ concat: c }}] }} }}\n").rules
    assert [(o.name, o.pattern) for o in rule.origins] == [("x", "c"), ("y", "d")]
    assert [op.where for op in rule.origins[0].ops] == [("tensors", "a", "from", 0, "ops", 0, "scale")]
    assert [op.name for op in rule.ops] == ["concat"], "what joins them is the rule's"


def test_a_rule_with_everything(directory: Path) -> None:
    keys = "fill: 2, as: c, dtype: source, for: { n: 3 }, stack: { e: 4 }, when: n > 1, collection: q, axes: c, axis: 0"
    (rule,) = read(directory, HEAD + MODELS + f"tensors: {{ a: {{ {keys}, partial: because }} }}\n").rules
    assert (rule.fill, rule.dtype, rule.loop, rule.stack) == (2, "source", {"n": 3}, {"e": 4})
    assert (rule.when, rule.collection, rule.axes, rule.axis) == ("n > 1", "q", "c", 0)
    assert (rule.partial, rule.origins[0].name) == ("because", None)


def test_the_places_of_a_block_by_layout_with_those_of_both_first(directory: Path) -> None:
    text = """\
blocks:
  b:
    source: l
    when: a == 1
    scanned: [{ at: s, for: { k: 2 }, let: { m: k } }]
    unscanned: [{ at: u, when: true }]
    always: [{ at: w }]
    tensors: { t: { from: x, as: c } }
"""
    (block,) = read(directory, HEAD + MODELS + text).blocks
    assert (block.name, block.source, block.when, block.where) == ("b", "l", "a == 1", ("blocks", "b"))
    assert {k: [p.at for p in v] for k, v in block.places.items()} == {"scanned": ["w", "s"], "unscanned": ["w", "u"]}
    place = block.places["scanned"][1]
    assert (place.loop, place.stack, place.let, place.when) == ({"k": 2}, {}, {"m": "k"}, None)
    assert place.where == ("blocks", "b", "scanned", 0)
    assert block.rules[0].where == ("blocks", "b", "tensors", "t")


@pytest.mark.parametrize(
    ("axis", "stack", "expected"),
    [
        ("", "{ i: 2 }", (1,)),
        ("", "{ i: 2, j: 3 }", (1, 2)),
        (", axis: 0", "{ i: 2, j: 3 }", (0, 1)),
        (", axis: [2, 0]", "{ i: 2, j: 3 }", (2, 0)),
    ],
)
def test_stacking_axes_are_neighbours_unless_each_is_given(
    axis: str, stack: str, expected: tuple[int, ...], directory: Path
) -> None:
    text = f"blocks: {{ b: {{ source: l, scanned: [{{ at: s, stack: {stack}{axis} }}], tensors: {{}} }} }}\n"
    (block,) = read(directory, HEAD + MODELS + text).blocks
    assert block.places["scanned"][0].axis == expected


def test_unsupported_ignore_and_sources(directory: Path) -> None:
    text = """\
unsupported: [{ layout: unscanned, reason: because }]
ignore: [{ source: x, reason: because }, { source: "*.y", reason: why, when: false }]
sources: { moved: { text: model.text }, hub: { text: model } }
"""
    found = read(directory, HEAD + MODELS + text)
    assert [(u.layout, u.reason, u.when) for u in found.unsupported] == [("unscanned", "because", None)]
    assert [(i.source, i.when, i.where) for i in found.ignore] == [
        ("x", None, ("ignore", 0)),
        ("*.y", False, ("ignore", 1)),
    ]
    assert list(found.sources) == ["moved", "hub"], "the order is the preference"


def test_every_place_leads_back_to_the_yaml(directory: Path) -> None:
    text = HEAD + MODELS + "tensors:\n  a: { from: x, as: c, ops: [{ pad: { c: 3 } }] }\n"
    found = read(directory, text)
    (rule,) = found.rules
    assert found.document.key_span(rule.where) == Span("m.yaml", 7, 3, 1)
    assert found.document.span((*rule.where, "as")) == Span("m.yaml", 7, 21, 1)
    assert found.document.key_span(rule.ops[0].where) == Span("m.yaml", 7, 32, 3)


# -- models --------------------------------------------------------------------------------------------------


def test_the_familys_config_is_under_each_models(directory: Path) -> None:
    text = """\
config: { a: 1, text: { b: 2, c: 3 }, list: [1, 2] }
models:
  plain: { repo: r/plain }
  own: { repo: r/own, config: { a: 10, text: { c: 30, d: 40 }, list: [3] } }
  none: { repo: r/none, config: { text: null } }
"""
    models = read(directory, HEAD + text).models
    assert models["plain"].config == {"a": 1, "text": {"b": 2, "c": 3}, "list": [1, 2]}
    assert models["own"].config == {"a": 10, "text": {"b": 2, "c": 30, "d": 40}, "list": [3]}, "section by section"
    assert models["none"].config == {"a": 1, "text": None, "list": [1, 2]}
    assert [(n, m.name, m.repo) for n, m in models.items()] == [(n, n, f"r/{n}") for n in ("plain", "own", "none")]


def test_like_shares_config_and_set_along_a_chain_and_the_nearest_wins(directory: Path) -> None:
    text = """\
config: { a: 0, z: 0 }
models:
  c: { repo: r/c, like: b, config: { c: 3 }, set: { a: 30 } }
  b: { repo: r/b, like: a, config: { a: 2, b: { y: 2 } } }
  a: { repo: r/a, config: { a: 1, b: { x: 1, y: 1 } }, set: { a: 10 } }
"""
    models = read(directory, HEAD + text).models
    assert models["c"].config == {"a": 2, "z": 0, "b": {"x": 1, "y": 2}, "c": 3}
    assert (models["c"].set, models["b"].set, models["a"].set) == ({"a": 30}, {"a": 10}, {"a": 10})
    assert models["c"].repo == "r/c", "the repository is its own"
    assert models["a"].config == {"a": 1, "z": 0, "b": {"x": 1, "y": 1}}, "which sharing leaves alone"


def test_like_names_a_model_of_the_family(directory: Path) -> None:
    text = HEAD + "models:\n  tiny: { repo: r }\n  other: { repo: r, like: «tinny» }\n"
    found = refused(directory, text)
    assert found.code == "unknown-model"
    assert found.message == "`like` names `tinny`, which is not a model of this family"
    assert found.help == "did you mean `tiny`?"


@pytest.mark.parametrize(
    "models",
    ["a: { repo: r, like: «a» }", "a: { repo: r, like: «b» }, b: { repo: r, like: c }, c: { repo: r, like: b }"],
)
def test_like_may_not_lead_back(models: str, directory: Path) -> None:
    found = refused(directory, HEAD + f"models: {{ {models} }}\n")
    assert (found.code, found.message) == ("unknown-model", "`like` of `a` leads back to itself")


# -- finding -------------------------------------------------------------------------------------------------


def test_a_model_of_a_mapping_of_ones_own(directory: Path) -> None:
    own = read(directory, HEAD + "models: { tiny: { repo: r }, large: { repo: r } }\n")
    assert find_model("large", (own,)) == (own, own.models["large"])


def test_a_model_of_a_mapping_of_ones_own_is_not_looked_for_among_the_shipped(directory: Path) -> None:
    own = read(directory, HEAD + MODELS)
    with pytest.raises(InputError) as caught:
        find_model("llama3.1-8b", (own,))
    assert caught.value.diagnostics[0].code == "unknown-model"


@pytest.mark.parametrize(
    ("name", "help"),
    [
        ("llama3.1-8B", "did you mean `llama3.1-8b`?"),
        ("gema2-2b", "did you mean `gemma2-2b`?"),
        (
            "quite something else",
            "`ckptc models` lists every named model; `--mapping FILE` uses a mapping of your own",
        ),
        ("", "`ckptc models` lists every named model; `--mapping FILE` uses a mapping of your own"),
    ],
)
def test_an_unknown_model(name: str, help: str) -> None:
    with pytest.raises(InputError) as caught:
        find_model(name)
    (found,) = caught.value.diagnostics
    assert (found.code, found.message, found.help) == ("unknown-model", f"there is no model `{name}`", help)


def test_every_shipped_model_is_found_by_its_name_and_the_names_are_unique() -> None:
    names = [name for mapping in shipped() for name in mapping.models]
    assert len(names) == len(set(names))
    for name in names:
        mapping, model = find_model(name)
        assert model is mapping.models[name]


def test_only_files_that_mention_a_name_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading YAML is most of a short command's time."""
    read_: list[str] = []

    def load(path: Path, target: str) -> Family:
        read_.append(path.name)
        return load_mapping(path, target=target)

    monkeypatch.setattr(spec, "load_shipped", load)
    assert find_model("mixtral-8x7b")[0].family == "mixtral"
    assert read_ == ["mixtral.yaml"]


def test_shipped_mappings_are_in_the_order_of_their_families_and_named_briefly() -> None:
    families = [mapping.family for mapping in shipped()]
    assert families == sorted(families) and len(set(families)) == len(families)
    assert all(m.document.name.startswith("mappings/") and m.document.name.count("/") == 1 for m in shipped())


def test_a_chain_of_models_costs_what_its_length_says(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model of the chain has a number of its own, so that merging all of them would be quadratic."""
    merged = []
    real = spec._merge
    monkeypatch.setattr(spec, "_merge", lambda into, over: (merged.append(len(over)), real(into, over)))
    count = 1500
    lines = [
        f"  m{n}: {{ like: m{n - 1}, repo: r/m, config: {{ k{n}: {n} }}, set: {{ a: {n} }} }}" for n in range(count)
    ]
    lines[0] = "  m0: { repo: r/m, config: { k0: 0 } }"
    found = read(directory, HEAD + "models:\n" + "\n".join(reversed(lines)) + "\n")
    assert list(found.models) == [f"m{n}" for n in reversed(range(count))]
    assert sum(merged) == 0, "nobody has asked for a config"
    last = found.models[f"m{count - 1}"]
    assert last.config == {f"k{n}": n for n in range(count)}
    assert last.set == {"a": count - 1}
    assert last.config is last.config  # its sections are found by identity
    assert sum(merged) == count
    assert found.models["m1"].config == {"k0": 0, "k1": 1}


def test_what_a_model_adds_to_a_section_is_not_added_to_the_model_it_is_like(directory: Path) -> None:
    models = (
        "models: { m: { repo: r/m, config: { s: { a: 1 } } }, n: { like: m, repo: r/n, config: { s: { b: 2 } } } }\n"
    )
    found = read(directory, HEAD + "config: { s: { z: 0 } }\n" + models).models
    assert found["n"].config == {"s": {"z": 0, "a": 1, "b": 2}}
    assert found["m"].config == {"s": {"z": 0, "a": 1}}

"""Mappings against the schema: every violation at its place, in words, with the nearest name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft7Validator

from ckptc.diagnostics import Diagnostic, InputError, Span, nearest
from ckptc.ops import VOCABULARY
from ckptc.spec.document import load, parse
from ckptc.spec.resources import mapping_files, schema, shipped_file, target_file
from ckptc.spec.schema import check

HEAD = "family: f\ntarget: maxtext\ndims: {}\nmodels: { m: { repo: r } }\n"
GOOD = [
    "",
    "title: a family\nmultimodal: true\nconfig: { a: { b: [1, null] } }\n",
    "sources: { hub: {}, moved: { text: model, n: 1 } }\n",
    "unsupported: [{ layout: scanned, reason: because, when: layers == 3 }]\n",
    "ignore: [{ source: x, reason: because, when: true }]\n",
    "tensors: { a: { from: x, as: b } }\n",
    "tensors: { a: { fill: 0.5, as: b, dtype: float32, collection: c, axes: b _, axis: 0, partial: because } }\n",
    "tensors: { a: { from: [{ from: x, as: b }, { from: y, as: b, ops: [] }], ops: [{ concat: b }] } }\n",
    "tensors: { a: { for: { n: 3, m: [1, x], k: { a: 1 } }, stack: { e: 3 }, when: true, from: x, as: b } }\n",
    "blocks: { b: { source: l, when: true, scanned: [{ at: x, axis: [1, 2], let: { n: 1 } }], tensors: {} } }\n",
]


def problems(text: str) -> tuple[Diagnostic, ...]:
    with pytest.raises(InputError) as caught:
        check(parse(text, "m.yaml"))
    return caught.value.diagnostics


def refused(text: str, code: str) -> Diagnostic:
    """The only problem of a text, after HEAD, in which «…» is what the diagnostic must underline."""
    before, rest = (HEAD + text).split("«")
    inside, after = rest.split("»")
    span = Span("m.yaml", before.count("\n") + 1, len(before) - before.rfind("\n"), len(inside))
    (found,) = problems(before + inside + after)
    assert (found.code, found.span) == (code, span), found
    return found


@pytest.mark.parametrize("text", GOOD)
def test_what_is_allowed(text: str) -> None:
    check(parse(HEAD + text, "m.yaml"))


@pytest.mark.parametrize("file", mapping_files(), ids=lambda f: f.stem)
def test_shipped_families_are_valid_and_name_the_schema(file: Any) -> None:
    document = load(file)
    kind = "family" if "runs_as" in document.data else "mapping"
    check(document, kind)
    assert file.read_text("utf-8").startswith(f"# yaml-language-server: $schema=../schema/{kind}.schema.json\n")


SHARED = [*((f, "part", 2) for f in shipped_file("parts").glob("*.yaml")), (shipped_file("logical.yaml"), "logical", 1)]
SHARED += [(f, "block", 3) for f in shipped_file("targets").glob("*/*.yaml")]


@pytest.mark.parametrize(("file", "kind", "depth"), SHARED, ids=lambda f: getattr(f, "stem", ""))
def test_what_families_share_is_valid_and_names_the_schema(file: Any, kind: str, depth: int) -> None:
    check(load(file), kind)
    first = f"# yaml-language-server: $schema={'../' * depth}schema/{kind}.schema.json\n"
    assert file.read_text("utf-8").startswith(first)


def test_the_shipped_target_is_valid_and_names_its_schema() -> None:
    file = target_file("maxtext")
    check(load(file), "target")
    assert file.read_text("utf-8").startswith("# yaml-language-server: $schema=../../schema/target.schema.json\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrays: { a: 'b  c' }", "`a` must be made of names, a space between them"),
        ("stacks: { a: { axes: b } }", "`a` needs the key `at`"),
        ("logical_axis_rules: [[a]]", "item 1 of `logical_axis_rules` needs at least 2 items"),
        ("logical_axis_rule: []", "unknown key `logical_axis_rule`"),
    ],
)
def test_a_target_is_checked_as_mappings_are(text: str, message: str) -> None:
    whole = {
        "target": "t",
        "arrays": "{}",
        "stacks": "{}",
        "places": "[p]",
        "besides": "{}",
        "pipelines": "{}",
        "mesh_axes": "[m]",
        "logical_axis_rules": "[]",
    }
    rest = "\n".join(f"{k}: {v}" for k, v in whole.items() if not text.startswith(f"{k}:"))
    with pytest.raises(InputError) as caught:
        check(parse(f"{rest}\n{text}\n", "t.yaml"), "target")
    assert [d.message for d in caught.value.diagnostics] == [message]


# -- the schema itself ---------------------------------------------------------------------------------------


def objects(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if value.get("type") == "object":
            yield path, value
        for key, inner in value.items():
            yield from objects(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from objects(inner, f"{path}/{i}")


@pytest.mark.parametrize("name", ["mapping", "plan", "target", "rules"])
def test_the_schema_is_a_schema_and_lets_no_unknown_key_through(name: str) -> None:
    Draft7Validator.check_schema(schema(name))
    open_ = [path for path, value in objects(schema(name)) if value.get("additionalProperties", True) is True]
    # What a config.json holds is its own.
    assert [path for path in open_ if not path.endswith("/properties/config")] == []


def test_every_op_of_the_vocabulary_is_in_the_schema_and_no_other() -> None:
    known = schema("mapping")["definitions"]["op"]["properties"]
    assert set(known) == {op.name for op in VOCABULARY}


def test_every_key_of_a_mapping_is_described_for_an_editor() -> None:
    definitions = schema("mapping")["definitions"]

    def described(value: dict[str, Any]) -> bool:
        reference = value.get("$ref", "").rpartition("/")[2]
        return "description" in value or (bool(reference) and described(definitions[reference]))

    ops = definitions["op"]["properties"]
    rules = definitions["rule"]["properties"]
    plain = {"when", "dtype"} & set(rules) | {"concat"}
    for name, value in {**schema("mapping")["properties"], **rules, **ops}.items():
        assert described(value) or name in plain | {"family"}, name


# -- violations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing", "- a", "text", "3", "true"])
def test_what_is_no_map_is_no_mapping(text: str) -> None:
    (found,) = problems(text)
    assert (found.code, found.span) == ("invalid-mapping", Span("m.yaml", 1, 1))


@pytest.mark.parametrize(
    ("text", "help"),
    [
        ("«tensor»: {}\n", "did you mean `tensors`?"),
        ("«zzz»: 1\n", None),
        ("tensors: { a: { «form»: x, as: b } }\n", "did you mean `from`?"),  # not `for`: letters are swapped
        ("tensors: { a: { from: x, «whn»: true } }\n", "did you mean `when`?"),
        ("blocks: { b: { source: l, «unscaned»: [], tensors: {} } }\n", "did you mean `unscanned`?"),
        ("blocks: { b: { source: l, scanned: [{ at: x, «lets»: {} }], tensors: {} } }\n", "did you mean `let`?"),
        ("ignore: [{ source: x, reason: because, «wen»: true }]\n", "did you mean `when`?"),
        ("tensors: { a: { from: [{ from: x, as: b, «op»: [] }, { from: y, as: b }] } }\n", "did you mean `ops`?"),
    ],
)
def test_an_unknown_key_is_underlined_and_the_nearest_named(text: str, help: str | None) -> None:
    found = refused(text, "unknown-key")
    key = text[text.index("«") + 1 : text.index("»")]
    assert (found.message, found.help) == (f"unknown key `{key}`", help)
    assert len(found.notes) == 1 and found.notes[0].startswith("known here: ")


def test_a_key_that_is_there_already_is_not_what_was_meant() -> None:
    assert refused("tensors: { a: { from: x, «whenn»: true } }\n", "unknown-key").help == "did you mean `when`?"
    assert refused("tensors: { a: { from: x, when: true, «whenn»: true } }\n", "unknown-key").help is None


def test_an_unknown_op_is_called_an_op() -> None:
    found = refused("tensors: { a: { from: x, as: b, ops: [{ scale: 2 }, { «transpoze»: b }] } }\n", "unknown-key")
    assert (found.message, found.help) == ("unknown op `transpoze`", "did you mean `transpose`?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensors: { a: { from: [«{» from: x }, { from: y, as: b }] } }\n", "item 1 of `from` needs the key `as`"),
        ("blocks: { «b»: { tensors: {} } }\n", "`b` needs the key `source`"),
        (
            "blocks: { b: { source: l, always: [«{» axis: 1 }], tensors: {} } }\n",
            "item 1 of `always` needs the key `at`",
        ),
        ("ignore: [{ source: x, reason: because }, «{» source: x }]\n", "item 2 of `ignore` needs the key `reason`"),
        ("tensors: { a: { ops: [{ «split»: { axis: b, parts: 2 } }] } }\n", "`split` needs the key `take`"),
    ],
)
def test_a_missing_key_is_reported_at_what_lacks_it(text: str, message: str) -> None:
    assert refused(text, "missing-key").message == message


def test_every_missing_key_is_reported() -> None:
    found = problems("family: f\n")
    assert [d.message.split()[-1] for d in found] == ["`target`", "`dims`", "`models`"]
    assert {d.span for d in found} == {Span("m.yaml", 1, 1)}
    assert found[0].help == "`target`: the tree that is written"


@pytest.mark.parametrize("name", ["Layers", "1a", "a-b", "_a", "é"])
@pytest.mark.parametrize(
    "text",
    [
        "tensors: {{ a: {{ from: x, as: b, for: {{ «{}»: 3 }} }} }}\n",
        "tensors: {{ a: {{ from: x, as: b, stack: {{ «{}»: 3 }} }} }}\n",
        "sources: {{ hub: {{ «{}»: x }} }}\n",
        "blocks: {{ b: {{ source: l, always: [{{ at: x, let: {{ «{}»: 1 }} }}], tensors: {{}} }} }}\n",
    ],
)
def test_names_are_lower_case(name: str, text: str) -> None:
    found = refused(text.format(name), "invalid-name")
    assert found.message == f"`{name}` is not a name"


@pytest.mark.parametrize(
    ("text", "message", "shown"),
    [
        ("tensors: { a: { from: «3», as: b } }\n", "`from` must be text or a list", "3"),
        ('tensors: { a: { from: «""», as: b } }\n', "`from` is empty", '""'),
        (
            "tensors: { a: { from: «[»{ from: x, as: b }] } }\n",
            "`from` needs at least 2 items",
            '[{"from": "x", "as": "b"}]',
        ),
        ("tensors: { a: { from: [{ from: «3», as: b }, { from: y, as: b }] } }\n", "`from` must be text", "3"),
        ("tensors: { a: { from: [«x», { from: y, as: b }] } }\n", "item 1 of `from` must be a map", '"x"'),
        ("tensors: { a: «x» }\n", "`a` must be a list or a map", '"x"'),
        ("tensors: { a: { from: x, as: «[»b, c] } }\n", "`as` must be text", '["b", "c"]'),
        ("tensors: { a: { from: x, as: b, axis: «-1» } }\n", "`axis` must be 0 or more", "-1"),
        ("tensors: { a: { from: x, as: b, axis: «1.5» } }\n", "`axis` must be a whole number", "1.5"),
        ("tensors: { a: { from: x, as: b, when: «3» } }\n", "`when` must be text or true or false", "3"),
        (
            "tensors: { a: { from: x, as: b, collection: «a/b» } }\n",
            "`collection` must be made of letters, digits and `_`",
            '"a/b"',
        ),
        ("tensors: { a: { from: x, as: b, partial: «no» } }\n", "`partial` needs at least 3 characters", '"no"'),
        ("tensors: { a: { from: x, as: b, for: { n: «[»] } } }\n", "`n` needs at least 1 item", "[]"),
        (
            "tensors: { a: { from: x, as: b, for: { n: [1, «[»2]] } } }\n",
            "item 2 of `n` must be text, a number or true or false",
            "[2]",
        ),
        ("tensors: { a: { from: x, as: b, ops: «{» scale: 2 } } }\n", "`ops` must be a list", '{"scale": 2}'),
        (
            "tensors: { a: { from: x, as: b, ops: [«{» scale: 2, add: 1 }] } }\n",
            "item 1 of `ops` takes at most 1 op",
            '{"scale": 2, "add": 1}',
        ),
        (
            "tensors: { a: { from: x, as: b, ops: [«permute_rope»] } }\n",
            "item 1 of `ops` must be a map",
            '"permute_rope"',
        ),
        (
            "tensors: { a: { from: x, as: b, ops: [{ concat: «A B» }] } }\n",
            "`concat` must be made of lower case letters, digits and `_`, a letter first",
            '"A B"',
        ),
        ("tensors: { a: { from: x, as: b, ops: [{ slice: { b: «[»1] } }] } }\n", "`b` needs at least 2 items", "[1]"),
        (
            "blocks: { b: { source: l, always: [{ at: x, axis: «-1» }], tensors: {} } }\n",
            "`axis` must be 0 or more",
            "-1",
        ),
        (
            "blocks: { b: { source: l, always: [{ at: x, axis: [1, «-1»] }], tensors: {} } }\n",
            "item 2 of `axis` must be 0 or more",
            "-1",
        ),
        (
            "blocks: { b: { source: l, always: [{ at: x, axis: «x» }], tensors: {} } }\n",
            "`axis` must be a whole number or a list",
            '"x"',
        ),
        ("multimodal: «1»\n", "`multimodal` must be true or false", "1"),
        ("sources: «{»}\n", "`sources` needs at least 1 key", "{}"),
        ("«title»:\n", "`title` must be text", "nothing"),
    ],
)
def test_a_wrong_value_is_underlined_and_shown_with_what_is_expected(text: str, message: str, shown: str) -> None:
    found = refused(text, "invalid-value")
    assert (found.message, found.notes) == (message, (f"found: {shown}",))


def test_a_word_that_is_none_of_the_allowed_suggests_the_nearest() -> None:
    found = refused("tensors: { a: { from: x, as: b, dtype: «bfloat15» } }\n", "invalid-value")
    assert found.message == "`dtype` must be one of float32, bfloat16, float16, int32, int64, source"
    assert found.help == "did you mean `bfloat16`?"
    (found,) = problems(HEAD.replace("maxtext", "megatron"))
    assert (found.message, found.span) == ("`target` must be maxtext", Span("m.yaml", 2, 9, 8))


def test_a_long_value_is_cut() -> None:
    (note,) = refused(f"tensors: {{ a: {{ from: x, as: «{'b ' * 150}b» }} }}\n", "invalid-value").notes
    assert len(note) == len("found: ") + 60 and note.endswith("…")


def test_a_comma_that_ends_a_value_is_explained() -> None:
    found = problems(HEAD + "tensors: { a: { from: x, as: (b, c) -> c, for: { n: range(1, 3) } } }\n")
    assert [d.code for d in found] == ["unknown-key", "invalid-name"]
    assert {d.help for d in found} == {"inside `{ … }` and `[ … ]` a comma ends a value: quote text that holds one"}


def test_all_violations_are_reported_in_the_order_of_the_file() -> None:
    text = (
        HEAD.replace("family: f", "family: F")
        + "tensors: { b: { form: x }, a: { from: 3, as: b, axis: -1 } }\nzzz: 1\n"
    )
    found = problems(text)
    assert [d.code for d in found] == ["invalid-value", "unknown-key", "invalid-value", "invalid-value", "unknown-key"]
    places = [(d.span.line, d.span.column) for d in found if d.span]
    assert places == sorted(places)


def test_violations_can_be_read_by_programs() -> None:
    (found,) = problems(HEAD + "zzz: 1\n")
    assert json.loads(json.dumps(found.code)) == "unknown-key"
    assert str(InputError([found])) == "unknown-key: unknown key `zzz`"


# -- nearest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("form", ["for", "from"], "from"),
        ("embde", ["embed", "embd"], "embed"),
        ("layres", ["layers", "layer"], "layers"),
        ("padded", ["padded_vocab", "vocab"], "padded_vocab"),
        ("scael", ["scale", "slice"], "scale"),
        ("zzz", ["layers"], None),
        ("", ["layers"], None),
        ("a", [], None),
    ],
)
def test_nearest(word: str, known: list[str], expected: str | None) -> None:
    assert nearest(word, known) == expected

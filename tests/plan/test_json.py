"""Plans as JSON: what is written is read back, and what was not written by ckptc is refused, whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from msgspec.structs import replace

from ckptc.diagnostics import InputError
from ckptc.ops.nest import AxisMap, Factor, Part
from ckptc.plan.json import digest, dumps, loads
from ckptc.plan.model import (
    FORMAT,
    Beside,
    Choices,
    Decode,
    File,
    LeftOut,
    Made,
    Orbax,
    Plan,
    Source,
    Tensor,
    Totals,
    tabulated,
)
from ckptc.plan.schema import schema
from ckptc.spec.resources import schema as shipped
from plans import altered, array, operand, with_arrays

SHA = "sha256:" + "0123456789abcdef" * 4

# One of everything a plan can hold: stacked tensors with arithmetic, a constant, codes with scales; names beyond ASCII.
DIMS: dict[str, int | float | str | bool | list[Any]] = {"embed": 6, "rate": 0.5, "kind": "größe", "on": True}
STACKED = Part(
    source=0,
    base=1,
    first=0,
    axes=(AxisMap(0, (Factor(2, 1, 0, 1),)), AxisMap(0, (Factor(3, 2, 1), Factor(2, 1, 3)))),
    math=(("scale", 0.1), ("cast", "bfloat16")),
)
DECODED = Part(0, 0, 0, (AxisMap(0, (Factor(4, 1, 1),)),))
CONSTANT = Part(None, 0, 0, (AxisMap(4, (Factor(2, 1, 0),)),), (("add", 1.0),), 0.25)
SETTINGS = (("block", (2, 2)), ("flat", False), ("word", "größe"), ("number", 3))
CODES = Decode(code="fp8", settings=SETTINGS, shape=(6,), beside=(Beside("float32", (4,)),))
ARRAYS = (
    array(
        "params/params/a",
        (2, 6),
        "bfloat16",
        (1, 6),
        (2, 6),
        (operand("bfloat16", (2, 3), (0, 1)),),
        (STACKED,),
        shards=(2, 1),
        axes=("layers", None),
        rule="blocks: a",
        ops=("a -> a", "scale 0.1"),
    ),
    array(
        "params/params/b",
        (6,),
        "float32",
        (6,),
        (6,),
        (operand("float8_e4m3fn", (6,), (2,), CODES, (3,)),),
        (DECODED, CONSTANT),
        rule="b",
    ),
)
KINDS, OUTPUTS = tabulated(ARRAYS)
FILES = (File("model-00001-of-00002.safetensors", 4096, SHA), File("sub/zweite.safetensors", 2048, SHA))
PLAN = Plan(
    made=Made("0.1.0", "tiny", "tinies", "none/tiny", SHA),
    choices=Choices("scanned", "bfloat16", False, 1 << 28, "hub", DIMS, 16),
    totals=Totals(2, 4, 18, 88, 48, 112),
    sources=(Source("safetensors", FILES, SHA),),
    layout=Orbax(),
    left_out=(LeftOut("*.inv_freq", "MaxText computes them", 2, 64),),
    kinds=KINDS,
    outputs=OUTPUTS,
    tensors=(
        Tensor("a.0", 0, 100, 124),
        Tensor("a.1", 1, 100, 124),
        Tensor("q", 1, 124, 148),
        Tensor("größe", 1, 148, 164),
    ),
)
BODY = json.loads(dumps(PLAN))


def signed(body: Any) -> str:
    """The text of a body with a digest that fits, as an edit by someone who knows how, if what it says has one."""
    text = json.dumps(body, ensure_ascii=False)
    try:
        loads(text)
    except InputError as error:
        (found,) = error.diagnostics
        if found.code == "edited-plan":
            return json.dumps({**body, "digest": found.notes[0].removeprefix("expected: ")}, ensure_ascii=False)
    return text


def changed(change: Callable[[Any], Any]) -> Any:
    body = copy.deepcopy(BODY)
    change(body)
    return body


def codes(text: str | bytes) -> set[str]:
    with pytest.raises(InputError) as refused:
        loads(text, "p.json")
    assert all("p.json" in d.message for d in refused.value.diagnostics)
    return {d.code for d in refused.value.diagnostics}


# -- what is written is read back ----------------------------------------------------------------------------


def test_a_plan_reads_back_as_it_was() -> None:
    assert loads(dumps(PLAN)) == PLAN
    assert loads(dumps(PLAN).encode()) == PLAN


def test_a_plan_read_back_is_written_the_same() -> None:
    assert dumps(loads(dumps(PLAN))) == dumps(PLAN)


def test_the_schema_describes_what_is_written() -> None:
    assert [e.message for e in Draft7Validator(schema()).iter_errors(BODY)] == []


def test_the_shipped_schema_is_that_of_the_records() -> None:
    """`python tools/plan_schema.py` writes it."""
    assert schema() == shipped("plan")


def test_each_array_and_tensor_has_a_line_of_its_own() -> None:
    lines = dumps(PLAN).splitlines()
    for output in PLAN.outputs:
        assert sum(line.startswith(f'  ["{output.name}",') for line in lines) == 1
    for tensor in PLAN.tensors:
        assert sum(line.startswith(f'  ["{tensor.name}",') for line in lines) == 1


def test_what_programs_read_is_where_the_documentation_says() -> None:
    kinds = BODY["kinds"]
    assert [(name, kinds[kind]["shape"], kinds[kind]["dtype"]) for name, kind, *_ in BODY["outputs"]] == [
        ("params/params/a", [2, 6], "bfloat16"),
        ("params/params/b", [6], "float32"),
    ]
    totals = {
        "arrays": 2,
        "tensors": 4,
        "parameters": 18,
        "read_bytes": 88,
        "write_bytes": 48,
        "peak_memory_bytes": 112,
    }
    assert BODY["totals"] == totals


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
COUNTS = st.integers(0, 1 << 62)
SIZES = st.integers(1, 1 << 62)
FACTORS = st.builds(Factor, SIZES, SIZES, COUNTS, COUNTS)
STEPS = st.one_of(st.tuples(st.sampled_from(["scale", "add"]), FLOATS), st.tuples(st.just("cast"), st.just("float32")))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: "/" not in s)
AXES = st.lists(st.builds(AxisMap, COUNTS, st.lists(FACTORS, max_size=3).map(tuple)), max_size=4).map(tuple)
MATH = st.lists(STEPS, max_size=3).map(tuple)
PARTS = st.one_of(
    st.builds(Part, st.just(0), COUNTS, COUNTS, AXES, MATH),
    st.builds(Part, st.none(), st.just(0), st.just(0), AXES, MATH, FLOATS),
)


@settings(deadline=None)
@given(
    path=st.lists(TEXT, min_size=1),
    rule=st.text(st.characters(exclude_categories=["Cs"])),
    parts=st.lists(PARTS, min_size=1),
)
def test_any_names_and_parts_read_back(path: list[str], rule: str, parts: list[Part]) -> None:
    plan = with_arrays(
        PLAN, (altered(PLAN.arrays[0], name="/".join(path), rule=rule, ops=(rule,), parts=tuple(parts)),)
    )
    assert loads(dumps(plan)) == plan


# -- what is refused -----------------------------------------------------------------------------------------


EDITS = {"[2,6]": "[6,2]", '"shards":16': '"shards":8', "0.1": "0.2", "größe": "grösse", "148,164": "148,165"}


@pytest.mark.parametrize("old", EDITS)
def test_an_edited_plan_is_refused(old: str) -> None:
    text = dumps(PLAN)
    assert old in text
    assert codes(text.replace(old, EDITS[old])) == {"edited-plan"}


@pytest.mark.parametrize("change", [{"notes": ("x",)}, {"left_out": ()}, {"tensors": PLAN.tensors[::-1]}], ids=str)
def test_every_field_is_under_the_digest(change: dict[str, Any]) -> None:
    assert digest(replace(PLAN, **change)) != digest(PLAN) == BODY["digest"]


def test_what_has_no_default_is_not_left_out() -> None:
    """Or two plans would have one digest."""
    assert digest(replace(PLAN, padding=())) == digest(PLAN) != digest(replace(PLAN, batches=((0,), (1,))))


def test_spaces_and_line_breaks_are_not_under_the_digest() -> None:
    assert loads(json.dumps(BODY, indent=4)) == PLAN


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_plan_is_refused(share: float) -> None:
    text = dumps(PLAN)
    assert codes(text[: int(len(text) * share)]) == {"invalid-plan"}


@pytest.mark.parametrize("format_", [FORMAT + 1, FORMAT - 1, str(FORMAT), None, [FORMAT]])
def test_another_format_is_refused(format_: Any) -> None:
    assert codes(signed({**BODY, "format": format_})) == {"plan-format"}


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "{}", '"plan"', '{"format":1}', b"\xff\xfe{", b"\x00\x01"])
def test_what_is_no_plan_at_all_is_refused(text: str | bytes) -> None:
    assert codes(text) == {"invalid-plan"}


@pytest.mark.parametrize(
    "where",
    [
        [],
        ["made"],
        ["choices"],
        ["totals"],
        ["sources", 0],
        ["sources", 0, "files", 0],
        ["layout"],
        ["kinds", 0],
        ["kinds", 1, "sources", 0],
        ["kinds", 1, "sources", 0, "decode"],
        ["kinds", 1, "sources", 0, "decode", "beside", 0],
        ["kinds", 0, "parts", 0],
        ["left_out", 0],
    ],
    ids=str,
)
def test_an_unknown_key_is_refused(where: list[Any]) -> None:
    def add(body: Any) -> None:
        for step in where:
            body = body[step]
        body["surprise"] = 1

    assert codes(signed(changed(add))) == {"invalid-plan"}


@pytest.mark.parametrize("key", sorted(set(BODY) - {"format", "made"}))
def test_a_missing_key_is_refused(key: str) -> None:
    assert codes(json.dumps(changed(lambda b: b.pop(key)))) == {"invalid-plan"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("old", ["0.25", "0.5", ":88,"], ids=["in an array", "in the dims", "in the totals"])
def test_a_number_that_json_has_not_is_refused(number: str, old: str) -> None:
    text = dumps(PLAN)
    assert old in text
    assert codes(text.replace(old, f":{number}," if old == ":88," else number)) == {"invalid-plan"}


@pytest.mark.parametrize(
    ("old", "new"), [('"model":"tiny"', '"model":"tiny","model":"other"'), ('"size":4096', '"size":4096,"size":1')]
)
def test_of_a_key_given_twice_the_last_counts_and_the_digest_is_of_that(old: str, new: str) -> None:
    assert codes(dumps(PLAN).replace(old, new, 1)) == {"edited-plan"}


def test_half_of_a_surrogate_pair_is_refused() -> None:
    """JSON can say it and UTF-8 cannot."""
    text = dumps(PLAN).replace('"rule":"b"', '"rule":"\\ud800"')
    assert codes(text) == {"invalid-plan"}


@pytest.mark.parametrize("depth", [100, 900, 5_000, 200_000])
def test_a_nest_without_end_is_refused(depth: int) -> None:
    text = dumps(PLAN).replace('"embed":6', '"embed":' + "[" * depth + "]" * depth)
    assert codes(text) <= {"invalid-plan", "edited-plan"}


ROWS: dict[str, Any] = {
    "not a list": {"name": "a.0"},
    "too short": ["a.0", 0, 100],
    "too long": ["a.0", 0, 100, 124, 0, 0],
    "a number as the name": [7, 0, 100, 124],
    "text as an offset": ["a.0", 0, "100", 124],
    "a fraction": ["a.0", 0, 100.5, 124],
    "true as an offset": ["a.0", 0, True, 124],
    "null": ["a.0", None, 100, 124],
    "a file before the first": ["a.0", -2, 100, 124],
    "a negative offset": ["a.0", 0, -1, 124],
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("position", [0, 2])
def test_a_malformed_row_of_tensors_is_refused(row: Any, position: int) -> None:
    assert codes(signed(changed(lambda b: b["tensors"].__setitem__(position, row)))) == {"invalid-plan"}


# -- the schema says the same ---------------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.just(0.5), st.sampled_from(["", "a", "a/b", "/a", "a//b", "a/"]),
    st.sampled_from([[], [0], [1, 0], ["x", 0, 0, 0], ["x", -1, 2, 3], {}, {"name": "x"}]),
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, x in inner for place in places(x, (*at, key)))]


TABLES = [
    place for place in places(BODY) if place[:1] in (("tensors",), ("kinds",), ("outputs",), ("layout",), ("sources",))
]


@settings(max_examples=400, deadline=None)
@given(place=st.sampled_from(TABLES), edit=st.sampled_from(["put", "drop", "again"]), junk=JUNK)
def test_tables_are_refused_where_the_schema_refuses_them(place: tuple[Any, ...], edit: str, junk: Any) -> None:
    body = copy.deepcopy(BODY)
    holder = body
    for step in place[:-1]:
        holder = holder[step]
    if edit == "put":
        holder[place[-1]] = junk
    elif edit == "drop":
        del holder[place[-1]]
    elif isinstance(holder, list):
        holder.append(junk)
    by_schema = Draft7Validator(schema()).is_valid(body)
    try:
        loads(signed(body))
        accepted = True
    except InputError:
        accepted = False
    assert accepted == by_schema

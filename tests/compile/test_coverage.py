"""Nothing is silent: every target filled by one rule, every tensor consumed whole or ignored with a reason."""

from __future__ import annotations

import pytest

from ckptc.diagnostics import Diagnostic

from .test_expand import HEAD, Headers, compiled, marked, problems, refused

X: Headers = {"x": ("float32", (5,))}
RULE = "tensors: { a: { from: x, as: mlp } }\n"


def only(text: str, code: str, headers: Headers | None = None, **options: object) -> Diagnostic:
    (found,) = problems(text, headers, **options)  # type: ignore[arg-type]
    assert found.code == code, found
    return found


# -- targets -------------------------------------------------------------------------------------------------


def test_two_rules_for_one_array() -> None:
    text = 'tensors:\n  a/b: { from: x, as: mlp }\n  «a/{{ "b" }}»: { from: y, as: mlp }\n'
    found = refused(text, "duplicate-target")
    assert found.message == "two rules fill `params/params/a/b`"
    assert found.notes == ("the other rule: a/b",)


def test_a_rule_and_a_rule_of_a_block_for_one_array() -> None:
    text = (
        RULE.replace("a:", "b/a:")
        + "blocks: { b: { source: l, always: [{ at: b }], tensors: { «a»: { from: x, as: mlp } } } }\n"
    )
    found = refused(text, "duplicate-target")
    assert found.notes == ("the other rule: b/a",)


def test_a_loop_whose_variable_the_target_leaves_out() -> None:
    found = refused('tensors: { «a»: { for: { n: 2 }, from: "{{ n }}", as: mlp } }\n', "duplicate-target")
    assert found.notes == ("the other rule: a",)


def test_layers_whose_place_leaves_the_layer_out_are_one_problem_for_each() -> None:
    text = "blocks: { b: { source: l, always: [{ at: b, for: { n: 3 } }], tensors: { a: { from: x, as: mlp } } } }\n"
    assert {(d.code, d.message) for d in problems(text)} == {("duplicate-target", "two rules fill `params/params/b/a`")}


@pytest.mark.parametrize("outer", ["a", "a/b"])
def test_an_array_inside_another_array(outer: str) -> None:
    text = f"tensors:\n  {outer}: {{ from: x, as: mlp }}\n  «a/b/c»: {{ from: y, as: mlp }}\n"
    found = refused(text, "duplicate-target")
    assert found.message == f"`params/params/a/b/c` lies inside the array `params/params/{outer}`"
    assert found.notes == (f"the other rule: {outer}",)


def test_names_that_only_begin_alike_are_not_inside() -> None:
    assert (
        len(
            compiled(
                "tensors: { a: { from: x, as: mlp }, ab/c: { from: y, as: mlp }, a-b: { from: z, as: mlp } }"
            ).arrays
        )
        == 3
    )


def test_the_same_path_in_two_collections_is_two_arrays() -> None:
    text = "tensors: { a: { from: x, as: mlp }, \"{{ 'a' }}\": { from: y, as: mlp, collection: Bias } }"
    assert [a.name for a in compiled(text).arrays] == ["params/Bias/a", "params/params/a"]


def test_conditions_that_exclude_each_other_share_a_target() -> None:
    other = "\"{{ 'a' }}\": { from: y, as: mlp, when: layers != 4 }"
    text = f"tensors: {{ a: {{ from: x, as: mlp, when: layers == 4 }}, {other} }}"
    assert len(compiled(text, X).arrays) == 1


# -- sources -------------------------------------------------------------------------------------------------


def test_a_tensor_that_no_rule_consumes_is_listed_at_the_nearest_rule() -> None:
    text = "tensors:\n  a: { from: x, as: mlp }\n  n: { from: «model.norm.weight», as: mlp }\n"
    plain, span = marked(HEAD + text)
    headers: Headers = {**X, "model.norm.weight": ("float32", (5,)), "model.norm.bias": ("bfloat16", (5, 1))}
    found = only(plain.removeprefix(HEAD), "unconsumed-tensor", headers)
    assert (found.message, found.span) == ("no rule consumes a tensor of the checkpoint", span)
    assert found.notes == ("`model.norm.bias` bfloat16[5, 1]",)
    assert found.help == "add a rule, or an entry under `ignore` with the reason; the nearest rule is this one"


def test_many_unconsumed_tensors_are_one_problem() -> None:
    found = only(RULE, "unconsumed-tensor", {**X, **{f"y{n:02}": ("float32", (5,)) for n in range(20)}})
    assert found.message == "no rule consumes 20 tensors of the checkpoint"
    assert [n.split()[0] for n in found.notes] == [*(f"`y{n:02}`" for n in range(8)), "and"]
    assert found.notes[-1] == "and 12 more"


def test_without_a_checkpoint_there_is_nothing_to_consume() -> None:
    assert len(compiled(RULE).arrays) == 1


@pytest.mark.parametrize(
    ("pattern", "names", "rest"),
    [
        ("y", ["y"], []),
        ("y", ["y", "y2", "xy"], ["y2", "xy"]),  # the whole name
        ("y*", ["y", "y2", "xy"], ["xy"]),
        ("*y", ["y", "y2", "xy"], ["y2"]),
        ("*.y.*", ["a.y.b", ".y.", "a.b.y.c.d", "y.b"], ["y.b"]),
        ("a.*.b", ["a.1.b", "a.1.2.b", "a.b"], ["a.b"]),
        ("a.b", ["a.b", "axb"], ["axb"]),  # a dot is a dot
        ("a[0-9]", ["a[0-9]", "a1"], ["a1"]),  # and nothing else is special
        ("*", ["y", "z"], []),
        ("**", ["y", "z"], []),
        ("a*a", ["aa", "aba", "a"], ["a"]),  # one letter is not two
        ("*ab*ab", ["abab", "abxabab", "ab"], ["ab"]),
        ("*" + "a*" * 100 + "b", ["a" * 3000, "a" * 3000 + "b"], ["a" * 3000]),  # not in time exponential in the stars
    ],
)
def test_ignore_patterns(pattern: str, names: list[str], rest: list[str]) -> None:
    text = f'tensors: {{ a: {{ fill: 1 }} }}\nignore: [{{ source: "{pattern}", reason: because }}]\n'
    headers: Headers = dict.fromkeys(names, ("float32", (5,)))
    if rest:
        assert only(text, "unconsumed-tensor", headers).notes == tuple(f"`{name}` float32[5]" for name in rest)
    else:
        assert compiled(text, headers).left_out[0].tensors == len(names)


def test_what_is_ignored_is_in_the_plan_with_its_reason_and_size() -> None:
    text = RULE + 'ignore: [{ source: "y*", reason: first }, { source: "*", reason: second }]\n'.replace('"*"', '"*2"')
    headers: Headers = {**X, "y1": ("float32", (3,)), "y2": ("bfloat16", (4,)), "z2": ("bfloat16", (1,))}
    left = [(x.pattern, x.reason, x.tensors, x.bytes) for x in compiled(text, headers).left_out]
    assert left == [("y*", "first", 2, 20), ("*2", "second", 1, 2)], "one that two entries cover counts for the first"


def test_an_entry_that_covers_nothing_is_no_error() -> None:
    assert compiled(RULE + 'ignore: [{ source: "y*", reason: because }]\n', X).left_out == ()


def test_an_entry_counts_only_when_it_holds() -> None:
    text = RULE + "ignore: [{ source: y, when: layers == 5, reason: because }]\n"
    assert only(text, "unconsumed-tensor", {**X, "y": ("float32", (5,))}).notes == ("`y` float32[5]",)


def test_a_tensor_that_is_ignored_and_consumed() -> None:
    found = refused(RULE + 'ignore: [{ source: «"x*"», reason: because }]\n', "ignored-and-consumed", X)
    assert found.message == "`x` is ignored, but a rule consumes it"


# -- whole ---------------------------------------------------------------------------------------------------

HALF = "tensors:\n  a: { from: «x», as: mlp, ops: [{ slice: { mlp: [0, 3] } }] PARTIAL }\n"


def test_a_tensor_of_which_some_is_left() -> None:
    found = refused(HALF.replace("PARTIAL", ""), "partly-consumed-tensor", X)
    assert found.message == "rules read 3 of the 5 elements of `x`"
    assert (found.notes, found.help) == (
        ("rule: a",),
        "another rule should take the rest, or `partial` say why it is left",
    )


def test_partial_says_why_some_is_left() -> None:
    plain = marked(HALF)[0]
    assert len(compiled(plain.replace("PARTIAL", ", partial: because"), X).arrays) == 1


def test_another_rule_may_take_the_rest() -> None:
    plain = marked(HALF)[0].replace("PARTIAL", "")
    assert len(compiled(plain + "  b: { from: x, as: mlp, ops: [{ slice: { mlp: [3, 5] } }] }\n", X).arrays) == 2


def test_layers_of_which_some_is_left_are_one_problem() -> None:
    text = """\
blocks:
  b:
    source: l.{{ layer }}
    always: [{ at: "b/{{ layer }}", for: { layer: layers } }]
    tensors: { a: { from: x, as: mlp, ops: [{ slice: { mlp: 0 } }] } }
"""
    found = only(text, "partly-consumed-tensor", {f"l.{n}.x": ("float32", (5,)) for n in range(4)})
    assert found.message == "rules read 1 of the 5 elements of `l.0.x`"


def test_a_tensor_may_be_consumed_by_several_rules() -> None:
    assert len(compiled("tensors: { a: { from: x, as: mlp }, b: { from: x, as: mlp } }", X).arrays) == 2


def test_scales_are_consumed_with_what_they_scale() -> None:
    headers: Headers = {"x": ("float8_e4m3fn", (5,)), "x_scale_inv": ("float32", (1,))}
    assert len(compiled(RULE, headers).tensors) == 2
    found = only(RULE, "unconsumed-tensor", {**headers, "x": ("float32", (5,))})
    assert found.notes == ("`x_scale_inv` float32[1]",), "where nothing is scaled, they are not"


def test_a_weight_that_is_ignored_is_ignored_however_it_is_stored() -> None:
    headers: Headers = {
        "x": ("float32", (5,)), "y.weight": ("float8_e4m3fn", (4, 4)), "y.weight_scale": ("float32", (4, 1)),
        "y.input_scale": ("float32", ()),
    }  # fmt: skip
    assert only(RULE, "unconsumed-tensor", headers).notes[0].startswith("`y.weight` ")
    plan = compiled(RULE + "ignore: [{ source: y.weight, reason: not needed }]\n", headers)
    assert [(x.pattern, x.tensors) for x in plan.left_out] == [("y.weight", 3)]


def test_targets_and_sources_are_reported_together() -> None:
    text = """\
tensors:
  a: { from: x, as: mlp }
  "{{ 'a' }}": { from: x, as: mlp embed }
ignore: [{ source: x, reason: because }]
"""
    found = problems(text, {**X, "y": ("float32", (5,))})
    assert [d.code for d in found] == [
        "duplicate-target",
        "shape-mismatch",
        "ignored-and-consumed",
        "unconsumed-tensor",
    ]


def test_one_half_read_twice_is_not_the_whole() -> None:
    half = "{ from: x, as: heads, ops: [{ split: { axis: heads, parts: 2, take: 0 } }] }"
    text = f"tensors:\n  a: {half}\n  b: {half}\n"
    assert {d.code for d in problems(text, {"x": ("float32", (2,))})} == {"partly-consumed-tensor"}

"""Dims: what wins over what, what is evaluated, and the place of every error."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ckptc.compile.dims import evaluate_dims
from ckptc.diagnostics import Diagnostic, InputError, Span
from ckptc.spec.mapping import load_mapping

CONFIG = {"hidden_size": 64, "heads": 4, "text": {"layers": 12}, "tied": True, "name": "silu", "none": None}


def dims(written: str, config: Mapping[str, Any] = CONFIG, model_set: str = "{}", **given: Any) -> dict[str, Any]:
    """The dims of a mapping whose only model fixes `model_set`; `given` as `--set` gives them."""
    text = f"family: f\ntarget: maxtext\ndims: {written}\nmodels: {{ m: {{ repo: r, set: {model_set} }} }}\n"
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "m.yaml").write_text(text, "utf-8")
        mapping = load_mapping(Path(directory) / "m.yaml", "m.yaml")
    return evaluate_dims(mapping, mapping.models["m"], config, given)


def problems(*args: Any, **given: Any) -> tuple[Diagnostic, ...]:
    with pytest.raises(InputError) as caught:
        dims(*args, **given)
    return caught.value.diagnostics


def problem(*args: Any, **given: Any) -> Diagnostic:
    (found,) = problems(*args, **given)
    return found


def column(written: str, part: str) -> int:
    """Where a part of the dims stands on its line."""
    return len("dims: ") + written.index(part) + 1


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("config.hidden_size", 64),
        ("config.text.layers", 12),
        ("config.hidden_size // config.heads", 16),
        ("config.head_dim | default(config.hidden_size // config.heads)", 16),
        ("config.none | default(5)", 5),  # null is as good as missing
        ("config.heads | default(5)", 4),
        ("config.tied", True),
        ("config.name", "silu"),
        ("'round_up(config.hidden_size + 1, 64)'", 128),  # a comma needs quotes here
        ("'[1, 2]'", [1, 2]),
        ("0", 0),
    ],
)
def test_an_expression_over_the_config(expression: str, expected: object) -> None:
    assert dims(f"{{ a: {expression} }}") == {"a": expected}


def test_dims_use_each_other_in_any_order() -> None:
    assert dims("{ a: b * c, b: c + 1, c: config.heads }") == {"a": 20, "b": 5, "c": 4}


def test_dims_keep_the_order_of_the_mapping() -> None:
    assert list(dims("{ c: 1, b: 2, a: 3 }", b=5)) == ["c", "b", "a"]


def test_a_section_of_the_config_may_be_a_dim() -> None:
    assert dims("{ text: config.text | default(config), layers: text.layers }")["layers"] == 12
    assert dims("{ text: config.vision | default(config), embed: text.hidden_size }")["embed"] == 64


# -- what wins -----------------------------------------------------------------------------------------------


def test_what_a_model_sets_wins_over_the_mapping_and_what_the_user_sets_over_both() -> None:
    written, fixed = "{ a: config.heads, b: a * 2 }", "{ a: 10 }"
    assert dims(written) == {"a": 4, "b": 8}
    assert dims(written, CONFIG, fixed) == {"a": 10, "b": 20}
    assert dims(written, CONFIG, fixed, a=100) == {"a": 100, "b": 200}
    assert dims(written, CONFIG, fixed, b=1) == {"a": 10, "b": 1}


def test_what_is_set_may_be_an_expression_over_other_dims_and_the_config() -> None:
    assert dims("{ a: 1, b: 2 }", CONFIG, "{ a: b + config.heads }") == {"a": 6, "b": 2}
    assert dims("{ a: 1, b: 2 }", CONFIG, "{ a: b + 1 }", b="config.heads * 2") == {"a": 9, "b": 8}


def test_what_is_overridden_is_not_evaluated() -> None:
    assert dims("{ a: config.missing }", a=3) == {"a": 3}
    assert dims("{ a: config.missing }", CONFIG, "{ a: 3 }") == {"a": 3}


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "config.missing",
        "config.missing.deeper",
        "config.text.missing * 2",
    ],
)
def test_a_key_that_the_config_lacks(expression: str) -> None:
    written = f"{{ a: 1, b: {expression} }}"
    found = problem(written)
    assert (found.code, found.span) == (
        "missing-config",
        Span("m.yaml", 3, column(written, expression), len(expression)),
    )
    assert "there is no key `missing`" in found.message
    assert found.notes == (f"expression: {expression}",)
    assert found.help == "give it with `--set b=VALUE`"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1 / 0", "division by zero"),
        ("1 +", ""),
        ("nobody", "'nobody' is undefined"),
        ("open('x')", "can be called"),
        ("config.__class__", "cannot be reached"),
        ("config.hidden_size - 65", "is -1, not a size, number or name"),
        ("-1", "is -1, not a size, number or name"),
        ("config.none", "is None, not a size, number or name"),
        ("10 * 999999999999999999", "larger than 10^18"),
        ("'\"x\" * 3'", "takes two numbers"),
    ],
)
def test_an_expression_that_gives_no_size(expression: str, message: str) -> None:
    written = f"{{ b: {expression}, a: 1 }}"
    found = problem(written)
    assert (found.code, found.span) == (
        "invalid-expression",
        Span("m.yaml", 3, column(written, expression), len(expression)),
    )
    assert found.message.startswith("dim `b` ") and message in found.message


def test_circular_dims_are_shown_as_the_circle() -> None:
    written = "{ z: a, a: b + 1, b: c, c: 2 * a, d: 1 }"
    found = problem(written)
    assert (found.code, found.message) == ("circular-dims", "dim `a` needs itself: a -> b -> c -> a")
    assert found.span == Span("m.yaml", 3, column(written, "b + 1"), 5)


def test_a_dim_of_itself() -> None:
    assert problem("{ a: a + 1 }").message == "dim `a` needs itself: a -> a"


def test_two_circles_are_two_problems() -> None:
    assert [d.message.split(":")[0] for d in problems("{ a: b, b: a, c: d, d: c }")] == [
        "dim `a` needs itself",
        "dim `c` needs itself",
    ]


def test_what_depends_on_a_failure_is_not_reported_too() -> None:
    assert [d.message.split()[1] for d in problems("{ a: b + 1, b: c, c: config.missing, d: nobody }")] == [
        "`c`",
        "`d`",
    ]


def test_an_unknown_dim_in_set_suggests_the_nearest() -> None:
    found = problem("{ padded_vocab: 1, vocab: 2 }", paded_vocab=3)
    assert (found.code, found.span) == ("unknown-dim", None)
    assert found.message == "`--set paded_vocab`: there is no dim `paded_vocab` in m.yaml"
    assert found.notes == ("dims: padded_vocab, vocab",)
    assert found.help == "did you mean `padded_vocab`?"


def test_an_unknown_dim_that_is_like_nothing_suggests_nothing() -> None:
    assert problem("{ a: 1 }", quite_another=3).help is None


def test_an_unknown_dim_of_a_model_is_at_its_key() -> None:
    found = problem("{ layers: 1 }", CONFIG, "{ laiers: 2 }")
    assert (found.code, found.help) == ("unknown-dim", "did you mean `layers`?")
    assert found.span == Span("m.yaml", 4, len("models: { m: { repo: r, set: { ") + 1, len("laiers"))


def test_what_the_user_sets_is_named_as_such() -> None:
    found = problem("{ a: 1 }", a="nobody")
    assert (found.code, found.span) == ("invalid-expression", None)
    assert found.message.startswith("`--set a`: dim `a` cannot be computed: ")
    assert problem("{ a: 1 }", a=0).message == "`--set a`: dim `a` is 0, and a size is above 0"
    assert problem("{ a: 1, b: 3 }", a="b - 3").message == "`--set a`: dim `a` is 0, and a size is above 0"
    assert problem("{ a: 1 }", a=-5).message == "`--set a`: dim `a` is -5, not a size, number or name"
    assert problem("{ a: 1, b: a }", a="b").message.endswith("dim `a` needs itself: a -> b -> a")


def test_all_problems_are_reported_together() -> None:
    found = problems("{ a: config.missing, b: nobody, c: c, d: -1 }", e=1)
    assert [d.code for d in found] == [
        "unknown-dim",
        "missing-config",
        "invalid-expression",
        "circular-dims",
        "invalid-expression",
    ]

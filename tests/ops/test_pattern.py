"""Patterns: what parses, into what, and where it fails."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptc.ops.pattern import Pattern, PatternError, parse_pattern, show

VALID = [
    ("", Pattern((), None)),
    ("   ", Pattern((), None)),
    ("a", Pattern((("a",),), None)),
    ("vocab embed", Pattern((("vocab",), ("embed",)), None)),
    (" a\tb\n", Pattern((("a",), ("b",)), None)),
    ("a -> a", Pattern((("a",),), (("a",),))),
    ("a->a", Pattern((("a",),), (("a",),))),
    ("->", Pattern((), ())),
    ("a ->", Pattern((("a",),), ())),
    ("-> a", Pattern((), (("a",),))),
    ("(heads head_dim) embed -> embed heads head_dim",
     Pattern((("heads", "head_dim"), ("embed",)), (("embed",), ("heads",), ("head_dim",)))),
    ("a(b c)d", Pattern((("a",), ("b", "c"), ("d",)), None)),
    ("(a)(b)", Pattern((("a",), ("b",)), None)),
    ("a 1 b -> a b", Pattern((("a",), (), ("b",)), (("a",), ("b",)))),
    ("()", Pattern(((),), None)),
    ("(1)", Pattern(((),), None)),
    ("(a 1 b)", Pattern((("a", "b"),), None)),
    ("a1 b_2", Pattern((("a1",), ("b_2",)), None)),
    ("a 1", Pattern((("a",), ()), None)),
    ("(2 mlp) embed -> 2 embed mlp", Pattern((("2", "mlp"), ("embed",)), (("2",), ("embed",), ("mlp",)))),
    ("11", Pattern((("11",),), None)),
]  # fmt: skip

INVALID = [
    ("a b A", 4, 1, "a pattern has names"),
    ("headDim", 4, 1, "a pattern has names"),
    ("a + b", 2, 1, "a pattern has names"),
    ("a  ,b", 3, 1, "a pattern has names"),
    ("_a", 0, 1, "a pattern has names"),
    ("0", 0, 1, "a pattern has names"),
    ("12345", 0, 1, "a pattern has names"),
    ("2 2", 2, 1, "`2` stands twice"),
    ("1a", 0, 1, "a pattern has names"),
    ("a - > b", 2, 1, "a pattern has names"),
    ("a ... b", 2, 1, "a pattern has names"),
    ("é", 0, 1, "a pattern has names"),
    ("a.part", 1, 1, "a pattern has names"),
    ("a -> b -> c", 7, 2, "one `->`"),
    ("a -> ->", 5, 2, "one `->`"),
    ("(a -> b)", 3, 2, "one `->`"),
    ("(a (b))", 3, 1, "do not nest"),
    ("a)", 1, 1, "without `(`"),
    ("a -> )b", 5, 1, "without `(`"),
    ("a (b", 2, 1, "never closed"),
    ("a -> b (c  ", 7, 1, "never closed"),
    ("embed embed", 6, 5, "`embed` stands twice"),
    ("(aa aa)", 4, 2, "`aa` stands twice"),
    ("aa (b aa)", 6, 2, "`aa` stands twice"),
    ("(aa b) -> b (aa  b)", 17, 1, "`b` stands twice"),
]


@pytest.mark.parametrize(("text", "pattern"), VALID)
def test_a_pattern_parses(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(("text", "at", "length", "message"), INVALID)
def test_a_wrong_pattern_says_where(text: str, at: int, length: int, message: str) -> None:
    with pytest.raises(PatternError, match=message.replace("(", r"\(")) as caught:
        parse_pattern(text)
    assert (caught.value.at, caught.value.length) == (at, length)


def test_names_of_the_left_come_first() -> None:
    assert parse_pattern("(b a) c -> c d a b").names() == ["b", "a", "c", "d"]


sides = st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=3).map(
    lambda groups: tuple(tuple(f"x{i}_{j}_{k}" for k, j in enumerate(g)) for i, g in enumerate(groups))
)


@given(sides)
def test_what_is_shown_parses_to_the_same(groups: tuple[tuple[str, ...], ...]) -> None:
    assert parse_pattern(show(groups)).left == groups


@given(st.text("ab1()-> \tZ.", max_size=30))
def test_any_text_parses_or_fails_within_it(text: str) -> None:
    try:
        parse_pattern(text)
    except PatternError as error:
        assert error.at >= 0 and error.at + error.length <= len(text)


def test_a_long_pattern_takes_time_in_proportion() -> None:
    started = time.process_time()
    parse_pattern("1 " * 200_000)
    assert time.process_time() - started < 3

"""Expressions and templates: what they can say, and that they can do nothing else."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptc.spec.expressions import (
    FUNCTIONS,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_LENGTH,
    ExpressionError,
    Key,
    evaluate,
    names,
    render,
)

NAMES: dict[str, Any] = {
    "a": 1,
    "b": 7,
    "half": 0.5,
    "s": "abc",
    "l": [1, 2, 3],
    "n": None,
    "yes": True,
    "long": "x" * 1500,
    "many": [0] * 1500,
    "k": Key("wi_0", {"name": "gate"}, 3),
    "wi": Key("wi_1", "up_proj", 1),
    "config": {"x": 2, "sub": {"y": 3, "none": None}, "keys": "a key", "_name": "hidden", "list": [4, 5]},
}

VALUES: list[tuple[str, object]] = [
    ("1", 1), ("-1", -1), ("+1", 1), ("1.5", 1.5), ("'x'", "x"), ('"x"', "x"), ("[1, a]", [1, 1]), ("(1, 2)", (1, 2)),
    ("[]", []),
    ("true", True), ("false", False), ("none", None),
    ("a + b * 2", 15), ("(a + b) * 2", 16), ("b - a", 6), ("b / 2", 3.5), ("b // 2", 3), ("b % 4", 3), ("-b // 2", -4),
    (" a ", 1), ("a\n+ b", 8),
    ("a < b", True), ("a <= 1 <= b", True), ("a == 2", False), ("a != 2", True), ("a in l", True), ("9 not in l", True),
    ("a in range(3)", True),
    ("a and b", 7), ("0 or b", 7), ("not a", False), ("b if a else 0", 7), ("1 if a > b else 2 if b > 9 else 3", 3),
    ("l[0]", 1), ("l[-1]", 3), ("s[1]", "b"), ("range(5)[2]", 2), ("[1] + [2]", [1, 2]), ("s + 'd'", "abcd"),
    ("s == 'abc'", True),
    ("config.x", 2), ("config.sub.y", 3), ("config['sub']['y']", 3), ("config.list[1]", 5), ("config.keys", "a key"),
    ("config['_name']", "hidden"),
    ("k", "wi_0"), ("k.value.name", "gate"), ("k.index", 3), ("wi.value", "up_proj"), ("k == 'wi_0'", True),
    ("c | default(5)", 5), ("a | default(5)", 1), ("n | default(5)", 5), ("config.z | default(config.x)", 2),
    ("config.sub.none | default(0)", 0),
    ("config['z'] | default(4)", 4), ("(config.z | default(1)) + 1", 2),
    ("len(l)", 3), ("len(range(7))", 7), ("min(a, b)", 1), ("max(l)", 3), ("int(3.9)", 3), ("int(b / 2)", 3),
    ("int('12')", 12), ("sqrt(16)", 4.0),
    ("round_up(5, 4)", 8), ("round_up(8, 4)", 8), ("round_up(0, 4)", 0), ("ceil_div(5, 4)", 2), ("ceil_div(8, 4)", 2),
    ("range(3)", range(3)), ("range(1, 7, 2)", range(1, 7, 2)), (f"len(range({MAX_ITEMS}))", MAX_ITEMS),
    ("float32(0.1)", 0.10000000149011612), ("bfloat16(sqrt(2560))", 50.5), ("bfloat16(1)", 1.0),
    ("1e300 * half", 5e299),
    ("1000000000000000000", 10**18), ("result | default(1)", 1), ("loop | default(2)", 2),
]  # fmt: skip

REFUSED: list[tuple[str, str]] = [
    # reaching into Python
    ("s.__class__", "`__class__` cannot be reached"), ("().__class__.__bases__[0].__subclasses__()", ""),
    ("config.__init__", "cannot be reached"), ("k.__dict__", "cannot be reached"), ("s._x", "cannot be reached"),
    ("s['__class__']", "there is no `__class__` in a value of type str"),
    ("config['__class__']", "there is no key `__class__`"),
    ("l['__len__']", "there is no `__len__`"), ("n['__class__']", "there is no"),
    ("range(3)['__class__']", "there is no"),
    ("s['__cla' + 'ss__']", "there is no"), ("s | default(s.__class__)", "cannot be reached"),
    ("range.__globals__", "cannot be reached"), ("range['__globals__']", "is a function"),
    ("len", "`len` is a function"),
    ("[len]", "is a function"), ("a | default(len)", "is a function"), ("len if a else 1", "is a function"),
    ("max(l, min)", "is a function"),
    ("s.join", "there is no `join`"), ("s['join']", "there is no `join`"), ("l.append", "there is no `append`"),
    ("a.real", "there is no `real`"),
    ("k.upper", "there is no `upper`"), ("config.sub.items", "there is no key `items`"),
    ("config['items']", "there is no key `items`"),
    ("config.items()", "can be called"), ("self", "another name"), ("self.x", "another name"),
    ("super", "another name"), ("caller", "another name"),
    ("lipsum", "undefined"), ("cycler", "undefined"), ("joiner", "undefined"), ("namespace", "undefined"),
    ("dict", "undefined"),
    ("lipsum()", "can be called"), ("dict()", "can be called"), ("eval('1')", "can be called"),
    ("open('/etc/passwd')", "can be called"),
    ("s()", "can be called"), ("range(3)()", "can be called"), ("(range)(3)(1)", "can be called"),
    ("config.x()", "can be called"),
    ("s.index", "there is no `index` in a value of type str"),
    ("l.index", "there is no `index` in a value of type list"),
    ("s.value", "there is no `value` in a value of type str"),
    # formatting
    ("'{0.__class__}'.format(s)", "can be called"), ("s.format", "there is no `format`"),
    ("s['format_map']", "there is no"),
    ("'%s' % a", "`%` takes two numbers"), ("'%1000000000d' % 1", "takes two numbers"),
    ("s % [1]", "takes two numbers"),
    # growth
    ("2 ** 3", "`pow` is not part"), ("9**9**9**9", "`pow` is not part"), ("s * 5", "`*` takes two numbers"),
    ("5 * s", "takes two numbers"),
    ("[0] * 1000000000", "takes two numbers"), ("l * b", "takes two numbers"), ("s // 2", "takes two numbers"),
    ("a ~ b", "`concat` is not part"),
    ("long + long", "longer than 2000"), ("many + many", "longer than 2000"), ("l + many + many", "longer than"),
    ("l + s", "concatenate"),
    (f"range({MAX_ITEMS + 1})", "is longer than"), ("range(1000000000000000000)", "is longer than"),
    ("range(0, -1000000, -1)", "is longer"),
    ("[range(99999999)]", "is longer than"), ("len(range(10000000))", "is longer than"),
    ("1000000000000000001", "larger than 10^18"), ("-1000000000000000001", "larger than 10^18"),
    ("1000000000000000000 + 1", "larger than 10^18"),
    ("1000000000000 * 1000000000000", "larger than 10^18"), ("-1000000000000 * 1000000000000", "larger"),
    ("(-1000000000000000000) - 1", "larger"), ("int('" + "9" * 1900 + "')", "larger"), ("9" * 1990, "larger"),
    ("int(1e300)", "larger"),
    ("1e999", "not finite"), ("-1e999", "not finite"), ("1e308 * 10", "not finite"), ("1e308 + 1e308", "not finite"),
    ("1e308 / 1e-10", "not finite"), ("float32(1e39)", "not finite"), ("bfloat16(1e39)", "not finite"),
    ("[1e999]", "not finite"),
    ("int(1e999)", "not finite"), ("max(1e999, 1)", "not finite"),
    # also on the way to a small result
    ("1000000000000 * 1000000000000 // 1000000000000", "larger"),
    ("min(1, 1000000000000 * 1000000000000)", "larger"),
    ("0 if 1e308 * 10 else 1", "not finite"),
    ("1 < 1e308 / 1e-10", "not finite"),
    # size of the text
    ("a" + "+a" * 990, "too deeply nested"), ("a" + "+a" * 1000, "longer than 2000"),
    ("a" + "+a" * 250, "too deeply nested"),
    ("(" * 900 + "a" + ")" * 900, "too deeply nested"), ("-" * 1900 + "a", "too deeply nested"),
    ("not " * 450 + "a", "too deeply nested"),
    ("[" * 900 + "]" * 900, "too deeply nested"), ("a if a else " * 150 + "a", "too deeply nested"),
    ("l" + "[0]" * 600, "too deeply nested"),
    ("config" + ".x" * 900, "too deeply nested"), ("a" + "|default(1)" * 150, "too deeply nested"),
    ("len(" * 300 + "l" + ")" * 300, "too deeply"),
    # everything else jinja knows
    ("{'a': 1}", "`dict` is not part"), ("l[0:2]", "`slice` is not part"), ("a is defined", "`test` is not part"),
    ("a is not none", "is not part"),
    ("s | upper", "filter `upper` does not exist"), ("s | attr('__class__')", "filter `attr`"),
    ("l | map('upper')", "filter `map`"),
    ("config | tojson", "filter `tojson`"), ("s|safe", "filter `safe`"), ("l|sum", "filter `sum`"),
    ("max(1, 2, key=len)", "is not part"),
    ("a | default(value=1)", "is not part"), ("range(**config)", "unexpected keyword"), ("a := 1", "expected token"),
    ("lambda: 1", "expected token"),
    ("[x for x in l]", "expected token"), ("a; b", "expected token"), ("a = 1", "expected token"),
    ("import os", "expected token"),
    ("a #b", "unexpected char"), ("{% if a %}", "statements and comments"), ("{# a #}", "statements and comments"),
    ("'{#'", "statements"),
    ("{{ a }}", "expected token"), ("a }}", "unexpected '}'"), ("a) }} {{ (b", "more than one"),
    ("a) }}x{{ (b", "more than one"),
    ("1, 2", "chunk after expression"), ("", "unexpected 'end of template'"), ("   ", "unexpected"),
    ("1 +", "unexpected"), ("'a", "unexpected char"),
    ("a b", "expected token"), ("(a", "unexpected"), ("`a`", "unexpected char"), ("a\x00", "unexpected char"),
    ("a if", "unexpected"),
    # failures
    ("zzz", "'zzz' is undefined"), ("zzz + 1", "'zzz' is undefined"), ("zzz.x", "'zzz' is undefined"),
    ("zzz['x']", "'zzz' is undefined"),
    ("[zzz]", "'zzz' is undefined"), ("[[1, zzz]]", "'zzz' is undefined"), ("zzz == 1", "'zzz' is undefined"),
    ("zzz or 1", "'zzz' is undefined"),
    ("zzz if a else 1", "'zzz' is undefined"), ("len(zzz)", "'zzz' is undefined"),
    ("a | default(zzz) + zzz", "'zzz' is undefined"),
    ("zzz | default(yyy)", "'yyy' is undefined"), ("config.z", "there is no key `z`"),
    ("config.z.y | default(1)", "there is no key `z`"),
    ("config['z']", "there is no key `z`"), ("config.sub.y.z", "there is no `z` in a value of type int"),
    ("n.x", "there is no `x`"),
    ("1 if false", "no else section"), ("a / 0", "division by zero"), ("a // 0", "division by zero"),
    ("a % 0", "division by zero"),
    ("round_up(1, 0)", "division by zero"), ("ceil_div(1, 0)", "division by zero"), ("l[5]", "out of range"),
    ("s + a", "concatenate"), ("a + s", "unsupported"),
    ("a - s", "unsupported"), ("-s", "bad operand"), ("a < s", "not supported"), ("len(a)", "no len"),
    ("min([])", "empty"), ("sqrt(-1)", ""),
    ("sqrt(s)", "number"), ("int(s)", "invalid literal"), ("range(half)", "integer"), ("range(1, 5, 0)", "zero"),
    ("bfloat16(s)", "number"),
    ("float32(l)", "")
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_an_expression_has_a_value(text: str, value: object) -> None:
    found = evaluate(text, NAMES)
    assert found == value
    assert type(found) is type(value) or isinstance(found, Key)


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text[:40] for text, _ in REFUSED])
def test_an_expression_is_refused(text: str, message: str) -> None:
    started = time.process_time()
    with pytest.raises(ExpressionError) as caught:
        evaluate(text, NAMES)
    assert message in str(caught.value)
    assert str(caught.value), "a reason is given"
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "text",
    [
        "1.5 in range(99999)" + " or 1.5 in range(99999)" * 20,
        "max(range(99999))" + " + max(range(99999))" * 20,
        "1" + "<2" * 55,
        "a and " * 50 + "a",
    ],
    ids=lambda t: t[:20],
)
def test_what_takes_longest_takes_seconds(text: str) -> None:
    started = time.process_time()
    evaluate(text, NAMES)
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    "around",
    ["(%s) + a", "-(%s)", "not (%s)", "(%s)[0]", "[%s]", "(%s).x", "len(%s)", "(%s) | default(1)", "(%s) if a else 1",
        "(%s) == 1", "(%s) and a",
     "a if (%s) else 1", "a | default(%s)", "l[%s]", "(%s,)"],
)  # fmt: skip
def test_any_nesting_is_evaluated_or_refused(around: str) -> None:
    """Up to where the text is too long, whatever Python's own limits are."""
    for depth in (1, 5, MAX_DEPTH // 2, MAX_DEPTH - 3, MAX_DEPTH, 100, 150):
        text = "zzz"
        for _ in range(depth):
            text = around % text
        with pytest.raises(ExpressionError):
            evaluate(text + " + zzz", NAMES)
        assert depth >= MAX_DEPTH // 3 or names(text) - {"a", "l"} == {"zzz"}


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([
    "a", "s", "l", "k", "n", "config", "zzz", "1", "0", "1.5", "'x'", "1e308", "+", "-", "*", "/", "//", "%", "**", "~",
    "(", ")", "[", "]", ".", ",",
    " if ", " else ", " in ", " not ", " and ", "|default(", "range(", "len(", "int(", "max(", "sqrt(", "{", "}", "{{",
    "}}", "{%", "%}", ".x", ".__class__",
    "['x']", ":", "<", "==", "is ", "\n", "#", "\\", "'",
]), max_size=12).map("".join))  # fmt: skip
def test_any_text_has_a_value_or_is_refused(text: str) -> None:
    for work in (
        lambda: evaluate(text, NAMES),
        lambda: names(text),
        lambda: render(text, NAMES),
        lambda: render("{{" + text + "}}", NAMES),
    ):
        try:
            value = work()
        except ExpressionError as error:
            assert str(error)
        else:
            assert isinstance(value, int | float | str | list | tuple | dict | range | set | None)
            assert " at 0x" not in repr(value)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=30))
def test_any_characters_have_a_value_or_are_refused(text: str) -> None:
    for work in (evaluate, render):
        try:
            work(text, NAMES)
        except ExpressionError as error:
            assert str(error)


def test_names_are_those_a_value_is_needed_for() -> None:
    assert names("a + b.c[d] * len(e) if f else range(2)") == {"a", "b", "d", "e", "f"}
    assert names("x | default(y)") == {"x", "y"}
    assert names("1") == set()
    assert names("'text'") == set()


@pytest.mark.parametrize(
    "text", ["a +", "2 ** a", "a" + "+a" * 900, "(" * 900, "a) }} {{ (b", "{% a %}", "x" * 3000, "len"]
)
def test_names_of_what_is_no_expression_are_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        names(text)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_value_cannot_take_the_name_of_a_function(name: str) -> None:
    for work in (lambda: evaluate("1", {name: 1}), lambda: render("{{ 1 }}", {name: 1})):
        with pytest.raises(ExpressionError, match=f"`{name}` is a function"):
            work()


@pytest.mark.parametrize(
    "name",
    [
        "context",
        "environment",
        "result",
        "undefined",
        "missing",
        "resolve",
        "l_0_a",
        "t_1",
        "root",
        "blocks",
        "True_",
        "type",
    ],
)
def test_names_of_jinjas_own_code_are_free(name: str) -> None:
    assert evaluate(f"{name} + 1", {name: 41}) == 42
    assert render(f"{{{{ {name} }}}}", {name: 41}) == "41"
    with pytest.raises(ExpressionError, match="undefined"):
        evaluate(name, {})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("", ""), ("plain.text", "plain.text"), ("{a}", "{a}"), ("}}", "}}"), ("{{ a }}", "1"), ("{{a}}{{b}}", "17"),
        ("x.{{ a }}.y", "x.1.y"),
        ("{{ a + b }}", "8"), ("{{ k }}.{{ k.value.name }}", "wi_0.gate"), ("{{ 'x' if a else 'y' }}", "x"),
        ("{{ c | default('z') }}", "z"),
        ("{{ s }}\n", "abc\n"), ("{{ '}}' }}", "}}"), ("{{ config['_name'] }}", "hidden"), ("é {{ s }}", "é abc"),
        ("{{ '<&>' }}", "<&>"),
        ("{{ '{{ b }}' }}", "{{ b }}"), ("*.{{ s }}[0]", "*.abc[0]"),
    ],
)  # fmt: skip
def test_a_template_renders(template: str, text: str) -> None:
    assert render(template, NAMES) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if a %}x{% endif %}", "statements and comments"),
        ("{% for i in range(999999999) %}x{% endfor %}", "statements"),
        ("{% set x = 1 %}", "statements"), ("{% macro m() %}{% endmacro %}", "statements"),
        ("{% import 'x' as y %}", "statements"),
        ("{% include '/etc/passwd' %}", "statements"), ("{% extends 'x' %}", "statements"),
        ("{% block b %}{% endblock %}", "statements"),
        ("{% raw %}{{ a }}{% endraw %}", "statements"), ("{%- do x -%}", "statements"), ("{%", "statements"),
        ("{% call m() %}", "statements"),
        ("a{# gone #}b", "statements and comments"), ("{#", "statements and comments"),
        ("{# {{ a }}", "statements and comments"),
        ("{{ a", "unexpected end of template"), ("{{ }}", "xpected"), ("{{ a b }}", "expected token"),
        ("{{ s | upper }}", "filter `upper`"),
        ("{{ zzz }}", "'zzz' is undefined"), ("{{ s.__class__ }}", "cannot be reached"),
        ("{{ range }}", "is a function"), ("{{ self }}", "another name"),
        ("{{ 2 ** 3 }}", "`pow` is not part"), ("{{ s.join }}", "there is no `join`"),
        ("{{ lipsum() }}", "can be called"),
        # What has no place in a name.
        ("{{ 4 / 2 }}", "not of 2.0 (float)"), ("{{ l }}", "(list)"), ("{{ none }}", "not of None"),
        ("{{ yes }}", "not of True (bool)"),
        ("{{ range(3) }}", "(range)"), ("{{ config }}", "(dict)"), ("{{ a == 1 }}", "(bool)"),
        ("{{ [zzz] }}", "(list)"), ("{{ (1, 2) }}", "(tuple)"),
        ("{{ k.value }}", "(dict)"), ("{{ a / 0 }}", "division by zero"),
        ("{{ long }}{{ long }}", "longer than 2000"), ("{{ long + long }}", "longer than 2000"),
        ("x" * (MAX_LENGTH - 5) + "{{ a }}", "longer than"),
        ("{{ a" + "+a" * 400 + " }}", "too deeply nested"), ("{{ a }}" * 300, "longer than"),
        ("{{ '" + "{{" * 900 + "' + long }}", "longer"),
    ],
    ids=lambda v: v[:40],
)  # fmt: skip
def test_a_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        render(template, NAMES)
    assert message in str(caught.value)


def test_a_text_from_the_checkpoint_is_not_a_template() -> None:
    """Values are text, even where they look like code."""
    assert render("{{ x }}", {"x": "{{ 1 + 1 }}{% set a = 1 %}"}) == "{{ 1 + 1 }}{% set a = 1 %}"


def test_a_huge_text_from_the_checkpoint_is_refused() -> None:
    with pytest.raises(ExpressionError, match="longer than 2000"):
        render("{{ x }}" * 200, {"x": "y" * 10_000_000})


def test_nothing_is_kept_between_evaluations() -> None:
    assert [evaluate("a", {"a": n}) for n in range(3)] == [0, 1, 2]
    assert [render("{{ a }}", {"a": n}) for n in range(3)] == ["0", "1", "2"]
    values = [1]
    assert evaluate("v + [2]", {"v": values}) == [1, 2]
    assert values == [1]


def test_an_expression_on_a_mapping_like_config_needs_no_dict() -> None:
    from types import MappingProxyType

    assert evaluate("config.a.b", {"config": MappingProxyType({"a": MappingProxyType({"b": 1})})}) == 1


def test_a_key_is_its_text() -> None:
    key = Key("wi_0", "gate_proj", 2)
    assert (key, key.value, key.index) == ("wi_0", "gate_proj", 2)
    assert {key: 1}["wi_0"] == 1
    assert f"{key}" == "wi_0"

"""Expressions and templates of mappings, on jinja2's sandbox, cut down to arithmetic.

A mapping computes sizes and names, nothing else. So the syntax tree of every expression is checked before it is compiled: names, numbers, strings,
lists, arithmetic, comparison, `and`/`or`/`not`, conditional expressions, indexing, attribute access on config sections, the functions below, and
one filter, `default`. No statements, loops, macros, imports, tests that reach further, or other filters exist here, and numbers that
would take long to compute are refused. What is left cannot run code, read files, or run long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import ml_dtypes
import numpy as np
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined, UndefinedError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_ITEMS = 100_000  # the longest range a mapping may ask for
MAX_NUMBER = 10**18
MAX_LENGTH = 2_000  # characters of an expression or template, and of any text one makes
MAX_STEPS = 20_000_000  # of one expansion or one expression; the largest models take 1.3 million
STEPS_EACH = 20  # to evaluate anything at all
STEPS_TO_COMPILE = 60  # for each step that evaluating takes
CACHED = 20_000  # expressions and templates that are kept compiled: more than MAX_STEPS can compile
MAX_DEPTH = 60  # of the syntax tree; Python compiles no more than 200 parentheses


class ExpressionError(ValueError):
    """An expression is not allowed, or failed. The message states the rule; callers add the place."""


class TooManySteps(ExpressionError):
    """Evaluating takes more steps than it may."""


class Meter:
    """Counts the steps of evaluations. A step is about a node of a syntax tree, or 16 items of a sequence gone through."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self.left = self.most = steps
        self.seen: set[str] = set()  # texts that were compiled

    def spend(self, steps: int) -> None:
        """Raises `TooManySteps` when there are not as many left."""
        if steps > self.left:
            raise TooManySteps(f"evaluating takes more than {self.most} steps")
        self.left -= steps


_METER: ContextVar[Meter | None] = ContextVar("meter", default=None)  # of the evaluation that walks sequences


def _walked(value: Any) -> Any:
    """The value. Its items count, for it may be gone through."""
    meter = _METER.get()
    if meter is not None and isinstance(value, str | list | tuple | range | Mapping):
        meter.spend(len(value) >> 4)
    return value


class Key(str):
    """A key of a mapping-valued `for`: renders as the key, and carries what it stands for as `.value` and its place as `.index`."""

    value: Any
    index: int  # type: ignore[assignment]

    def __new__(cls, key: str, value: Any, index: int) -> Key:
        self = super().__new__(cls, key)
        self.value, self.index = value, index
        return self


def _range(*args: int) -> range:
    out = range(*args)
    if len(out) > MAX_ITEMS:
        raise ExpressionError(f"range of {len(out)} items is longer than {MAX_ITEMS}")
    _walked(out)
    return out


def _round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _bfloat16(value: float) -> float:
    """The nearest bfloat16, as a float."""
    with np.errstate(all="ignore"):
        return float(np.asarray(value, dtype=ml_dtypes.bfloat16))


def _float32(value: float) -> float:
    """The nearest float32, as a float."""
    with np.errstate(all="ignore"):
        return float(np.float32(value))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "range": _range,
    "sqrt": math.sqrt,
    "min": min,
    "max": max,
    "len": len,
    "int": int,
    "round_up": _round_up,
    "ceil_div": _ceil_div,
    "bfloat16": _bfloat16,
    "float32": _float32,
}

_ALLOWED = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.List, nodes.Tuple, nodes.Neg, nodes.Pos, nodes.Not,
    nodes.And, nodes.Or, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Compare, nodes.Operand,
    nodes.CondExpr, nodes.Getattr, nodes.Getitem, nodes.Call, nodes.Filter,
)  # fmt: skip


def _default(value: Any, fallback: Any) -> Any:
    """`x | default(y)`: y where x is missing from the config, or is null there."""
    return fallback if value is None or isinstance(value, Undefined) else value


def _usable(value: Any) -> Any:
    """The value, if it is not a number that no mapping means."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ExpressionError("a number is larger than 10^18")
    if isinstance(value, float) and not math.isfinite(value):
        raise ExpressionError("a number is not finite")
    if isinstance(value, str) and len(value) > MAX_LENGTH:
        raise ExpressionError(f"a text is longer than {MAX_LENGTH} characters")
    return value


def _in_a_name(value: Any) -> Any:
    """What `{{ … }}` puts in a template's text."""
    if isinstance(value, Undefined):
        value._fail_with_undefined_error()
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ExpressionError(
            f"a name is made of text and whole numbers, not of {str(value)[:80]} ({type(value).__name__})"
        )
    return _usable(value)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "%", "+", "-", "/", "//"])

    def getattr(self, obj: Any, attribute: str) -> Any:
        # Sections of config.json are mappings: an attribute is a key, never a method of dict. Nothing else has attributes.
        if isinstance(obj, Mapping):
            return (
                _walked(obj[attribute])
                if attribute in obj
                else self.undefined(f"there is no key `{attribute}` in the checkpoint's config")
            )
        if isinstance(obj, Key) and attribute in ("value", "index"):
            return _walked(obj.value if attribute == "value" else obj.index)
        if isinstance(obj, Undefined):
            obj._fail_with_undefined_error()
        return self.undefined(f"there is no `{attribute}` in a value of type {type(obj).__name__}")

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Mapping):
            return self.getattr(obj, argument)
        if isinstance(obj, str | list | tuple | range) and isinstance(argument, int):
            return _walked(obj[argument])
        if isinstance(obj, Undefined):
            obj._fail_with_undefined_error()
        return self.undefined(f"there is no `{argument}` in a value of type {type(obj).__name__}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value in (left, right):
            if isinstance(value, Undefined):
                value._fail_with_undefined_error()
        # String repetition, formatting and list products are ways to make something huge from something small.
        if operator in ("*", "%", "//") and not all(isinstance(v, int | float) for v in (left, right)):
            raise ExpressionError(f"`{operator}` takes two numbers")
        long = (
            isinstance(left, str | list | tuple)
            and isinstance(right, str | list | tuple)
            and len(left) + len(right) > MAX_LENGTH
        )
        if operator == "+" and long:
            raise ExpressionError(f"`+` makes something longer than {MAX_LENGTH}")
        return _usable(super().call_binop(context, operator, left, right))


def _environment() -> _Environment:
    env = _Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_in_a_name)
    env.globals.clear()
    env.filters = {"default": _default}
    env.tests.clear()
    return env


_ENV = _environment()


def _walk(tree: nodes.Node) -> list[nodes.Node]:
    """Every node of a syntax tree. Not recursive, so that it can refuse what is nested too deeply."""
    out, level = [tree], [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in node.iter_child_nodes()]
        out += level
        if not level:
            return out
    raise ExpressionError("too deeply nested")


def _check(tree: nodes.Node) -> None:
    every = _walk(tree)
    called = {id(node.node) for node in every if isinstance(node, nodes.Call)}
    for node in every:
        if not isinstance(node, _ALLOWED):
            raise ExpressionError(f"`{type(node).__name__.lower()}` is not part of the expression language")
        if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
            raise ExpressionError(f"attribute `{node.attr}` cannot be reached")
        if isinstance(node, nodes.Filter) and node.name != "default":
            raise ExpressionError(f"filter `{node.name}` does not exist; there is `default`")
        if isinstance(node, nodes.Call) and not (isinstance(node.node, nodes.Name) and node.node.name in FUNCTIONS):
            raise ExpressionError("only " + ", ".join(sorted(FUNCTIONS)) + " can be called")
        if isinstance(node, nodes.Name) and node.name in FUNCTIONS and id(node) not in called:
            raise ExpressionError(f"`{node.name}` is a function: `{node.name}(…)`")
        if isinstance(node, nodes.Name) and node.name in ("self", "super", "caller", "varargs", "kwargs"):
            raise ExpressionError(f"`{node.name}` means something else to jinja; use another name")
        if isinstance(node, nodes.Const):
            _usable(node.value)


def _parse(text: str) -> nodes.Template:
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters")
    if "{%" in text or "{#" in text:  # comments and `raw` leave no trace in the syntax tree
        raise ExpressionError("statements and comments are not part of the template language, only `{{ … }}`")
    try:
        tree = _ENV.parse(text)
    except TemplateSyntaxError as error:
        raise ExpressionError(error.message or "syntax error") from None
    except (TemplateError, RecursionError, ValueError, OverflowError) as error:
        raise ExpressionError("too deeply nested" if isinstance(error, RecursionError) else str(error)) from None
    _check(tree)
    return tree


def _parse_expression(text: str) -> nodes.Template:
    tree = _parse("{{ (" + text + ") }}")
    if len(tree.body) != 1 or not isinstance(tree.body[0], nodes.Output) or len(tree.body[0].nodes) != 1:
        raise ExpressionError("more than one expression")
    return tree


@dataclass(frozen=True, slots=True)
class _Compiled:
    """An expression or a template, ready to be evaluated."""

    run: Callable[..., Any]
    names: tuple[str, ...]  # that it uses, functions too
    steps: int  # that evaluating it takes, but for what is walked
    walks: bool  # whether it goes through sequences: comparisons, `min`, `max`


def _compiled(tree: nodes.Template, run: Callable[..., Any]) -> _Compiled:
    every = _walk(tree)
    used = {node.name for node in every if isinstance(node, nodes.Name)}
    walks = any(isinstance(node, nodes.Compare) for node in every) or bool(used & {"min", "max"})
    return _Compiled(run, tuple(sorted(used)), STEPS_EACH + len(every), walks)


@lru_cache(maxsize=CACHED)
def _template(text: str) -> _Compiled:
    return _compiled(_parse(text), _ENV.from_string(text).render)


@lru_cache(maxsize=CACHED)
def _expression(text: str) -> _Compiled:
    tree = _parse_expression(text)
    return _compiled(tree, cast("Callable[..., Any]", _ENV.compile_expression(text, undefined_to_none=False)))


def names(text: str) -> set[str]:
    """The free names of an expression, without functions."""
    every = _walk(_parse_expression(text))
    return {node.name for node in every if isinstance(node, nodes.Name) and node.name not in FUNCTIONS}


def _finished(value: Any) -> Any:
    """The value. Raises for names that were never found, and for numbers that are none."""
    if isinstance(value, Undefined):
        value._fail_with_undefined_error()
    if isinstance(value, list | tuple):
        for item in value:
            _finished(item)
    return _usable(value)


def _evaluated(compiled: _Compiled, text: str, names: Mapping[str, Any], meter: Meter) -> Any:
    """The value, of the names that it uses and no others: a mapping may have thousands."""
    if not FUNCTIONS.keys().isdisjoint(names.keys()):
        name = min(FUNCTIONS.keys() & names.keys())
        raise ExpressionError(f"`{name}` is a function; a value needs another name")
    given = {name: names[name] for name in compiled.names if name in names}
    meter.spend(compiled.steps + (0 if text in meter.seen else STEPS_TO_COMPILE * compiled.steps))
    meter.seen.add(text)
    if not compiled.walks:
        return compiled.run({**FUNCTIONS, **given})
    token = _METER.set(meter)
    try:
        for value in given.values():
            _walked(value)
        return compiled.run({**FUNCTIONS, **given})
    finally:
        _METER.reset(token)


def _guard(what: str, work: Callable[[], Any]) -> Any:
    try:
        return _finished(work())
    except UndefinedError as error:
        raise ExpressionError(error.message or "undefined name") from None
    except ExpressionError:
        raise
    except ZeroDivisionError:
        raise ExpressionError("division by zero") from None
    except (
        TemplateError,
        SyntaxError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ExpressionError(str(error) or f"{what} failed") from None


def evaluate(text: str, names: Mapping[str, Any], meter: Meter | None = None) -> Any:
    """The value of an expression.

    Raises ExpressionError for what is not allowed, undefined names, and failures; `TooManySteps` when the meter is
    used up.
    """
    counted = meter or Meter()
    return _guard("expression", lambda: _evaluated(_expression(text), text, names, counted))


def render(text: str, names: Mapping[str, Any], meter: Meter | None = None) -> str:
    """The text of a template such as `model.layers.{{ layer }}`. Raises as `evaluate` does."""
    if "{" not in text:
        return text
    counted = meter or Meter()
    out = _guard("template", lambda: _evaluated(_template(text), text, names, counted))
    if len(out) > MAX_LENGTH:
        raise ExpressionError(f"a name longer than {MAX_LENGTH} characters")
    return str(out)

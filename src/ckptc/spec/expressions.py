"""Expressions and templates of mappings, on jinja2's sandbox, cut down to arithmetic.

A mapping computes sizes and names, nothing else. So the syntax tree of every expression is checked before it is compiled: names, numbers, strings,
lists, arithmetic, comparison, `and`/`or`/`not`, conditional expressions, indexing, attribute access on config sections, the functions below, and
one filter, `default`. No statements, loops, macros, imports, tests that reach further, or other filters exist here, and numbers that
would take long to compute are refused. What is left cannot run code, read files, or run long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

import ml_dtypes
import numpy as np
from jinja2 import Environment, StrictUndefined, TemplateError, TemplateSyntaxError, Undefined, UndefinedError, nodes
from jinja2.environment import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_ITEMS = 1_000_000  # the longest range a mapping may ask for
MAX_NUMBER = 10**18
MAX_LENGTH = 2_000  # characters of an expression or template


class ExpressionError(ValueError):
    """An expression is not allowed, or failed. The message states the rule; callers add the place."""


class Key(str):
    """A key of a mapping-valued `for`: renders as the key, and carries what it stands for as `.value` and its place as `.index`."""

    value: Any
    index: int

    def __new__(cls, key: str, value: Any, index: int) -> Key:
        self = super().__new__(cls, key)
        self.value, self.index = value, index
        return self


def _range(*args: int) -> range:
    out = range(*args)
    if len(out) > MAX_ITEMS:
        raise ExpressionError(f"range of {len(out)} items is longer than {MAX_ITEMS}")
    return out


def _round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _bfloat16(value: float) -> float:
    """The nearest bfloat16, as a float."""
    return float(np.asarray(value, dtype=ml_dtypes.bfloat16))


def _float32(value: float) -> float:
    """The nearest float32, as a float."""
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


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "%", "+", "//"])

    def getattr(self, obj: Any, attribute: str) -> Any:
        # Sections of config.json are mappings: an attribute is a key, never a method of dict.
        if isinstance(obj, Mapping):
            return obj[attribute] if attribute in obj else self.undefined(f"there is no key `{attribute}` in the checkpoint's config")
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        # String repetition, formatting and list products are ways to make something huge from something small.
        if operator in ("*", "%", "//") and not all(isinstance(v, int | float) for v in (left, right)):
            raise ExpressionError(f"`{operator}` takes two numbers")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and abs(result) > MAX_NUMBER:
            raise ExpressionError("a number grows past 10^18")
        return result


def _environment() -> _Environment:
    env = _Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    env.globals.clear()
    env.filters = {"default": _default}
    env.tests.clear()
    return env


_ENV = _environment()


def _check(tree: nodes.Node) -> None:
    for node in [tree, *tree.find_all(nodes.Node)]:
        if not isinstance(node, _ALLOWED):
            raise ExpressionError(f"`{type(node).__name__.lower()}` is not part of the expression language")
        if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
            raise ExpressionError(f"attribute `{node.attr}` cannot be reached")
        if isinstance(node, nodes.Filter) and node.name != "default":
            raise ExpressionError(f"filter `{node.name}` does not exist; there is `default`")
        if isinstance(node, nodes.Call) and not (isinstance(node.node, nodes.Name) and node.node.name in FUNCTIONS):
            raise ExpressionError("only " + ", ".join(sorted(FUNCTIONS)) + " can be called")
        if isinstance(node, nodes.Const) and isinstance(node.value, int) and abs(node.value) > MAX_NUMBER:
            raise ExpressionError("a number is larger than 10^18")


def _parse(text: str) -> nodes.Template:
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters")
    try:
        tree = _ENV.parse(text)
    except TemplateSyntaxError as error:
        raise ExpressionError(error.message or "syntax error") from None
    except (TemplateError, RecursionError, ValueError, OverflowError) as error:
        raise ExpressionError("too deeply nested" if isinstance(error, RecursionError) else str(error)) from None
    _check(tree)
    return tree


@lru_cache(maxsize=4096)
def _template(text: str) -> Template:
    _parse(text)
    return _ENV.from_string(text)


@lru_cache(maxsize=4096)
def _expression(text: str) -> Callable[..., Any]:
    _parse("{{ (" + text + ") }}")
    return cast("Callable[..., Any]", Environment.compile_expression(_ENV, text, undefined_to_none=False))


def names(text: str) -> set[str]:
    """The free names of an expression, without functions."""
    tree = _parse("{{ (" + text + ") }}")
    called = {id(c.node) for c in tree.find_all(nodes.Call)}
    return {n.name for n in tree.find_all(nodes.Name) if id(n) not in called}


def _guard(what: str, work: Callable[[], Any]) -> Any:
    try:
        result = work()
        if isinstance(result, Undefined):
            result._fail_with_undefined_error()
        return result
    except UndefinedError as error:
        raise ExpressionError(error.message or "undefined name") from None
    except ExpressionError:
        raise
    except ZeroDivisionError:
        raise ExpressionError("division by zero") from None
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError, OverflowError, RecursionError, MemoryError) as error:
        raise ExpressionError(str(error) or f"{what} failed") from None


def evaluate(text: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression. Raises ExpressionError for what is not allowed, undefined names, and failures."""
    return _guard("expression", lambda: _expression(text)(**FUNCTIONS, **dict(names)))


def render(text: str, names: Mapping[str, Any]) -> str:
    """The text of a template such as `model.layers.{{ layer }}`. Raises ExpressionError, as `evaluate` does."""
    if "{" not in text:
        return text
    out = _guard("template", lambda: _template(text).render(FUNCTIONS, **dict(names)))
    if len(out) > MAX_LENGTH:
        raise ExpressionError(f"a name longer than {MAX_LENGTH} characters")
    return str(out)

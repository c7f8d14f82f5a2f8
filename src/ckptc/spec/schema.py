"""Mappings, targets and rules against their schemas in `schema/`: every violation as a diagnostic at its place in the YAML."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from typing import Any

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError
from referencing import Registry, Resource

from ckptc.diagnostics import Diagnostic, InputError, Span, did_you_mean
from ckptc.spec.document import Document, Path_
from ckptc.spec.resources import schema

_KINDS = {
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a map",
    "null": "nothing",
}
_PATTERNS = {
    "^[a-z][a-z0-9_]*$": "lower case letters, digits and `_`, a letter first",
    "^[a-z0-9][a-z0-9_.-]*$": "lower case letters, digits, `_`, `.` and `-`, a letter or digit first",
    "^[A-Za-z0-9_]+$": "letters, digits and `_`",
    "^[A-Za-z0-9_]+( [A-Za-z0-9_]+)*$": "names, a space between them",
}
_COMMA = "inside `{ … }` and `[ … ]` a comma ends a value: quote text that holds one"
_SHOWN = 60  # characters of a value


def check(document: Document, kind: str = "mapping") -> None:
    """Raises InputError with every violation of the schema of that kind: `mapping`, `family`, `part`, `block`, `target`, …"""
    if not isinstance(document.data, dict):
        found = "nothing" if document.data is None else _kind(document.data)
        raise InputError(
            [
                Diagnostic(
                    "invalid-mapping",
                    "a mapping is a map with the keys `family`, `target`, `dims`, `models`",
                    Span(document.name, 1, 1),
                    (f"found: {found}",),
                )
            ]
        )
    found_here: dict[Span | None, list[Diagnostic]] = defaultdict(list)
    for error in validator(kind).iter_errors(document.data):
        for diagnostic in _diagnose(error, document):
            found_here[diagnostic.span].append(diagnostic)
    if found_here:
        # A key that is no name has no valid value either: where a key is wrong, nothing else is said of the place.
        places = sorted(found_here, key=lambda s: (s.line, s.column) if s else (0, 0))
        raise InputError(d for place in places for d in _most_telling(found_here[place]))


@cache
def validator(kind: str) -> Draft7Validator:
    """Of a kind of file. Schemas refer to definitions of one another."""
    files = [Resource.from_contents(schema(name)) for name in ("mapping", "part", "logical")]
    return Draft7Validator(schema(kind), registry=Registry().with_resources((r.id() or "", r) for r in files))


def _most_telling(found: list[Diagnostic]) -> list[Diagnostic]:
    of_keys = [d for d in found if d.code in ("unknown-key", "invalid-name")]
    return list(dict.fromkeys(of_keys or found))


def _diagnose(error: ValidationError, document: Document) -> list[Diagnostic]:
    if error.validator in ("oneOf", "anyOf"):
        meant = _meant(error)
        if meant:
            return [d for inner in meant for d in _diagnose(inner, document)]
    path = tuple(error.absolute_path)
    instance: Any = error.instance
    rule: dict[str, Any] = error.schema if isinstance(error.schema, dict) else {}
    if error.validator == "additionalProperties":
        known = sorted(rule.get("properties", {}))
        return [_unknown_key(key, instance, known, path, document) for key in instance if key not in known]
    if error.validator == "required":
        # jsonschema reports each missing key on its own, naming it in the message alone.
        missing = [k for k in rule["required"] if k not in instance and error.message.startswith(f"'{k}'")]
        return [_missing_key(key, rule, path, document) for key in missing]
    if "propertyNames" in error.absolute_schema_path:
        key = str(instance)
        notes = (f"names are {_characters(error.validator_value)}",)
        help = _comma(_at(document.data, (*path, key)))
        return [Diagnostic("invalid-name", f"`{key}` is not a name", document.key_span((*path, key)), notes, help)]
    notes = (f"found: {_shown(instance)}",)
    return [Diagnostic("invalid-value", _expected(error), document.span(path), notes, _help(error))]


def _meant(error: ValidationError) -> list[ValidationError]:
    """What is wrong by the form, of several, that the value was meant to have: the one of its type. Else nothing."""
    forms: dict[Any, list[ValidationError]] = defaultdict(list)
    for inner in error.context or []:
        forms[inner.relative_schema_path[0]].append(inner)
    of_type = [found for found in forms.values() if not any(_is_type_of_whole(e) for e in found)]
    return of_type[0] if len(of_type) == 1 else []


def _is_type_of_whole(error: ValidationError) -> bool:
    return error.validator == "type" and not error.relative_path


def _unknown_key(key: str, instance: dict[str, Any], known: list[str], path: Path_, document: Document) -> Diagnostic:
    what = "op" if _is_op(path) else "key"
    notes = (f"known here: {', '.join(known)}",) if known else ()
    help = did_you_mean(key, [k for k in known if k not in instance]) or _comma(instance[key])
    return Diagnostic("unknown-key", f"unknown {what} `{key}`", document.key_span((*path, key)), notes, help)


def _missing_key(key: str, rule: dict[str, Any], path: Path_, document: Document) -> Diagnostic:
    about = rule.get("properties", {}).get(key, {}).get("description")
    return Diagnostic(
        "missing-key",
        f"{_name(path)} needs the key `{key}`",
        document.key_span(path),
        help=about and f"`{key}`: {about[0].lower()}{about[1:].rstrip('.')}",
    )


def _comma(value: Any) -> str | None:
    return _COMMA if value is None else None


def _is_op(path: Path_) -> bool:
    return path[-1:] == ("op",) or (len(path) > 1 and path[-2] == "ops")


def _at(data: Any, path: Path_) -> Any:
    for step in path:
        data = data[step]
    return data


def _name(path: Path_) -> str:
    """The value at `path`, in words."""
    if not path:
        return "a mapping"
    *before, last = path
    if isinstance(last, int):
        return f"item {last + 1} of {_name(tuple(before))}"
    return f"`{last}`"


def _expected(error: ValidationError) -> str:
    allowed: Any = error.validator_value
    name = _name(tuple(error.absolute_path))
    match error.validator:
        case "type":
            return f"{name} must be {_kinds(_types(allowed))}"
        case "oneOf" | "anyOf":
            types = [t for e in error.context or [] if _is_type_of_whole(e) for t in _types(e.validator_value)]
            return f"{name} must be {_kinds(types)}" if types else f"{name} has none of its forms"
        case "enum":
            return f"{name} must be {'one of ' if len(allowed) > 1 else ''}{', '.join(map(str, allowed))}"
        case "minItems" | "minProperties":
            return f"{name} needs at least {_many(allowed, error)}"
        case "maxItems" | "maxProperties":
            return f"{name} takes at most {_many(allowed, error)}"
        case "uniqueItems":
            return f"{name} has an item twice"
        case "minLength":
            return f"{name} is empty" if error.instance == "" else f"{name} needs at least {allowed} characters"
        case "maxLength":
            return f"{name} takes at most {allowed} characters"
        case "minimum":
            return f"{name} must be {allowed} or more"
        case "pattern":
            return f"{name} must be made of {_characters(allowed)}"
    return f"{name} is not valid ({error.validator})"


def _types(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _kinds(types: list[str]) -> str:
    """`text, a number or a list`. A number may be whole."""
    words = [word for kind, word in _KINDS.items() if kind in types and not (kind == "integer" and "number" in types)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _many(number: int, error: ValidationError) -> str:
    of_list, of_op = error.validator in ("minItems", "maxItems"), _is_op(tuple(error.absolute_path))
    return f"{number} {'item' if of_list else 'op' if of_op else 'key'}{'s' if number != 1 else ''}"


def _characters(pattern: Any) -> str:
    return _PATTERNS.get(pattern, f"what matches {pattern}")


def _help(error: ValidationError) -> str | None:
    allowed: Any = error.validator_value
    if error.validator == "enum" and isinstance(error.instance, str):
        return did_you_mean(error.instance, [str(v) for v in allowed])
    if _is_op(tuple(error.absolute_path)):
        if error.validator == "maxProperties":
            return "one op for each item: `[{ scale: 2 }, { add: 1 }]`"
        if error.validator == "type":
            return "an op is a map of its word to its argument: `{ scale: 2 }`"
    return None


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    return _KINDS[kinds[type(value)]]


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"

"""Mappings against `schema/mapping.schema.json`: every violation as a diagnostic at its place in the YAML."""

from __future__ import annotations

from typing import Any

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError, best_match

from ckptc.diagnostics import Diagnostic, InputError, Span, did_you_mean
from ckptc.spec.document import Document
from ckptc.spec.resources import schema

_KINDS = {
    "object": "a map", "array": "a list", "string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false",
    "null": "nothing",
}  # fmt: skip


def check(document: Document) -> None:
    """Raises InputError with every violation."""
    if not isinstance(document.data, dict):
        raise InputError(
            [
                Diagnostic(
                    "invalid-mapping",
                    "a mapping is a map with the keys `family`, `target`, `dims`, `models`",
                    Span(document.name, 1, 1),
                )
            ]
        )
    errors = sorted(
        Draft7Validator(schema("mapping")).iter_errors(document.data),
        key=lambda e: list(map(str, e.absolute_path)),
    )
    found = [d for error in errors for d in _diagnose(error, document)]
    if found:
        raise InputError(sorted(found, key=lambda d: (d.span.line, d.span.column) if d.span else (0, 0)))


def _diagnose(error: ValidationError, document: Document) -> list[Diagnostic]:
    if error.validator in ("oneOf", "anyOf"):
        inner = best_match(error.context or [])
        if inner is not None and inner.validator not in ("type",):
            return _diagnose(inner, document)
    path = tuple(error.absolute_path)
    instance: Any = error.instance
    span, rule = document.span(path), error.schema if isinstance(error.schema, dict) else {}
    if error.validator == "additionalProperties":
        known = sorted(rule.get("properties", {}))
        return [
            Diagnostic(
                "unknown-key",
                f"unknown key `{key}`",
                document.key_span((*path, key)),
                (f"known here: {', '.join(known)}",) if known else (),
                did_you_mean(key, known),
            )
            for key in instance
            if key not in rule.get("properties", {})
        ]
    if error.validator == "required":
        missing = [k for k in rule["required"] if k not in instance]
        return [
            Diagnostic("missing-key", f"key `{k}` is missing", document.key_span(path))
            for k in missing
            if f"'{k}'" in error.message
        ]
    if "propertyNames" in error.absolute_schema_path:
        key = str(error.instance)
        return [
            Diagnostic(
                "invalid-name",
                f"`{key}` is not a name",
                document.keys.get((*path, key), span),
                ("names are lower case letters, digits and `_`",),
            )
        ]
    return [Diagnostic("invalid-value", _expected(error), span, (f"found: {_shown(error.instance)}",), _help(error))]


def _expected(error: ValidationError) -> str:
    allowed: Any = error.validator_value
    key = next((str(p) for p in reversed(error.absolute_path) if isinstance(p, str)), "the file")
    if error.validator == "type":
        kinds = [allowed] if isinstance(allowed, str) else list(allowed)
        return f"`{key}` must be {' or '.join(_KINDS[k] for k in kinds)}"
    if error.validator == "enum":
        return f"`{key}` must be one of {', '.join(map(str, allowed))}"
    if error.validator in ("oneOf", "anyOf"):
        kinds = sorted({_KINDS[k] for sub in error.context or [] if sub.validator == "type" for k in _types(sub)})
        return f"`{key}` must be {' or '.join(kinds)}" if kinds else f"`{key}` has none of its forms"
    if error.validator in ("minItems", "minProperties"):
        return f"`{key}` needs at least {allowed}"
    if error.validator in ("maxItems", "maxProperties"):
        return f"`{key}` takes at most {allowed}"
    return f"`{key}` is not valid ({error.validator})"


def _types(error: ValidationError) -> list[str]:
    value: Any = error.validator_value
    return [value] if isinstance(value, str) else list(value)


def _help(error: ValidationError) -> str | None:
    allowed: Any = error.validator_value
    if error.validator == "enum" and isinstance(error.instance, str):
        return did_you_mean(error.instance, [str(v) for v in allowed])
    if error.validator == "maxProperties" and "ops" in error.absolute_path:
        return "one op for each item of the list"
    return None


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict) else "{" + ", ".join(map(str, value)) + "}"
    return text if len(text) <= 60 else text[:57] + "..."

"""The JSON Schema of plans, from the records that they are read into: draft-07, as editors know it."""

from __future__ import annotations

from typing import Any

import msgspec

from ckptc.plan.model import FORMAT, Digest, Plan

TITLE = "A conversion, concretely: which elements of which stored tensors become which boxes of which outputs."


def schema() -> dict[str, Any]:
    """As the shipped `schema/plan.schema.json` has it."""
    (plan, digest), definitions = msgspec.json.schema_components([Plan, Digest], ref_template="#/definitions/{name}")
    definitions = {name: _draft7(definition) for name, definition in definitions.items()}
    body = definitions.pop(plan["$ref"].rpartition("/")[2])
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "plan.schema.json",
        **body,
        "title": "ckptc plan",
        "description": TITLE,
        "required": ["format", "digest", *body["required"]],
        "properties": {
            "format": {"const": FORMAT, "description": "Version of this format."},
            "digest": {**digest, "description": "Of everything else in the plan."},
            **body["properties"],
        },
        "definitions": definitions,
    }


def _draft7(value: Any) -> Any:
    """msgspec writes the draft of 2020, in which the items of a list that has places are `prefixItems`."""
    if isinstance(value, list | tuple):
        return [_draft7(x) for x in value]
    if not isinstance(value, dict):
        return value
    out = {key: _draft7(x) for key, x in value.items()}
    if "prefixItems" in out:
        rest = out.get("items", {})
        out["items"], out["additionalItems"] = out.pop("prefixItems"), rest
    out.pop("discriminator", None)  # of OpenAPI
    return out

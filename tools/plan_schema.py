"""Writes `schema/plan.schema.json` from the records of plans: to be run when those have changed."""

from __future__ import annotations

import json
from pathlib import Path

from ckptc.plan.schema import schema

PATH = Path(__file__).parents[1] / "schema" / "plan.schema.json"


def text() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), "utf-8")

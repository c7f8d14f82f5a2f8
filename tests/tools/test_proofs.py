"""docs/proofs.md is what the records of proofs say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_records() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        page = importlib.import_module("proofs").page()
    finally:
        sys.path.remove(str(ROOT / "tools"))
    assert (ROOT / "docs" / "proofs.md").read_text("utf-8") == page, "run tools/proofs.py"
    for record in (ROOT / "mappings" / "proofs").glob("*.json"):
        assert f" | {record.stem} | " in page

"""docs/ops.md is what the ops and codes say of themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_as_the_tool_writes_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "ops_docs.py", tmp_path / "ops.md"], check=True)
    written = (tmp_path / "ops.md").read_text("utf-8")
    assert written == (ROOT / "docs" / "ops.md").read_text("utf-8"), "run python tools/ops_docs.py"

"""Writes docs/ops.md: every op and every code, as their own docstrings say them.

python tools/ops_docs.py [FILE]
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from ckptc.ops import VOCABULARY
from ckptc.ops.codes import CODES
from ckptc.spec.resources import schema

DOCS = Path(__file__).resolve().parents[1] / "docs" / "ops.md"


def text() -> str:
    """The page. What a mapping may write of an op is its description in the mapping's schema."""
    said = schema("mapping")["definitions"]["op"]["properties"]
    lines = ["# Ops and codes", "", "Written by `tools/ops_docs.py` from the docstrings. Do not edit.", "", "## Ops"]
    for op in VOCABULARY:
        argument = said[op.name].get("description", "")
        lines += ["", f"### `{op.name}`", "", inspect.cleandoc(op.__doc__ or ""), "", f"In a mapping: {argument}"]
    lines += [
        "",
        "## Codes",
        "",
        "How quantised uploads store weights. `quantization_config` and the headers say which it is.",
    ]
    for name, code in sorted(CODES.items()):
        shown = [
            f"`{c.describe()}`, {'x'.join(map(str, shape))}: stored {list(c.stored(shape))}"
            for c, shape in code.examples
        ]
        lines += ["", f"### `{name}`", "", inspect.cleandoc(code.__doc__ or ""), ""]
        lines += [f"`quant_method`: {', '.join(code.methods)}. For example {shown[0]}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS).write_text(text(), encoding="utf-8")

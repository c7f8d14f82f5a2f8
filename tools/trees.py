"""Writes `mappings/targets/maxtext.trees.json`: every path of the trees that MaxText makes, and a digest of each tree.

    python tools/trees.py

The trees themselves are in tests/data/trees.json.xz.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from ckptc.spec.trees import digest, numbered  # noqa: E402
from reference import tree, trees  # noqa: E402

NO_SETTINGS = ("qwen3.5-35b-fp8",)  # MaxText knows the name and builds a small Llama


def main() -> None:
    raw: set[str] = set()
    digests: dict[str, dict[str, str]] = {}
    for model, layouts in sorted(trees().items()):
        if model in NO_SETTINGS:
            continue
        for layout in sorted(layouts):
            found = {path: tuple(shape) for path, (shape, _) in tree(model, layout).items()}
            raw |= {path.split("/", 2)[2] for path in found}
            digests.setdefault(model, {})[layout] = digest(found.items())
    numbers: dict[str, set[str]] = {}
    for part in (part for path in raw for part in path.split("/")):
        if match := re.fullmatch(r"(.+)_(\d+)", part):
            numbers.setdefault(match[1], set()).add(match[2])
    lists = sorted(base for base, found in numbers.items() if len(found) > 2)  # of layers; the rest are names
    paths = {"/".join(numbered(part, lists) for part in path.split("/")) for path in raw}
    out = ROOT / "mappings" / "targets" / "maxtext.trees.json"
    out.write_text(
        json.dumps({"lists": lists, "paths": sorted(paths), "digests": digests}, indent=0) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()

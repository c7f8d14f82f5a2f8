"""Copies reference data into the repository, so that the tests need nothing outside it.

    python tools/reference.py REFERENCE_DIR

REFERENCE_DIR holds what MaxText expects and what MaxText's own converter produced:

    trees/<model>.<layout>.json.gz          one parameter tree; layout is scan, unscan, scan.mm or unscan.mm
    golden/<case>/case.json                 the model, and the sizes MaxText was given
    golden/<case>/hf/                       a tiny checkpoint in the Hub's layout
    golden/<case>/<output>/expected.safetensors
    golden/<case>/orbax/                    the same result saved as an Orbax checkpoint

Written, by default under tests/data:

    trees.json.xz       {model: {layout: {path: [shape, axes]}}}, keys sorted, one line
    golden/             the cases; Orbax checkpoints only of the cases in `ORBAX_CASES`

A path is the slash-joined place of an array in the saved state, where MaxText puts its variable collections
under one more `params`: `params/params/decoder/decoder_norm/scale`, `params/MoEBiasVar/decoder/…`. `axes` are
the logical axes as MaxText names them: null, or shorter than the shape, where it names none or only the
leading ones. The bytes depend on nothing but the input.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TREE_SUFFIX = ".json.gz"
LAYOUTS = ("scan", "unscan", "scan.mm", "unscan.mm")
ORBAX_CASES = frozenset({"qwen3_moe"})  # one is enough to show the layout of files and metadata
# Named in full rather than by preset, so that the bytes do not follow a change of liblzma's presets.
FILTERS = [
    {
        "id": lzma.FILTER_LZMA2,
        "dict_size": 64 << 20,
        "lc": 3,
        "lp": 0,
        "pb": 0,
        "mode": lzma.MODE_NORMAL,
        "nice_len": 273,
        "mf": lzma.MF_BT4,
        "depth": 512,
    }
]

Tree = dict[str, list[Any]]  # path -> [shape, axes]


class BadReference(Exception):
    """The reference directory is not what this program reads."""


def saved_path(parts: Sequence[str]) -> str:
    """The place in the saved state of an array whose place in MaxText's own state is `parts`."""
    for part in parts:
        if "-" in part or "/" in part:
            # Dashed names and slashed paths could no longer be turned into one another.
            raise BadReference(f"A part of the path {list(parts)} contains a separator: {part!r}.")
    return "/".join(("params", *parts))


def split_tree_name(file_name: str) -> tuple[str, str]:
    """`llama3.1-8b.scan.mm.json.gz` -> (`llama3.1-8b`, `scan.mm`)."""
    stem = file_name.removesuffix(TREE_SUFFIX)
    for layout in sorted(LAYOUTS, key=len, reverse=True):
        if stem.endswith(f".{layout}"):
            return stem.removesuffix(f".{layout}"), layout
    raise BadReference(f"{file_name} names no layout: expected <model>.<{'|'.join(LAYOUTS)}>{TREE_SUFFIX}.")


def read_tree(file: Path) -> Tree:
    """One parameter tree, reduced to shapes and logical axes."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        params = json.load(stream)["params"]
    tree: Tree = {}
    for key, entry in params.items():
        shape, axes, parts = entry["shape"], entry["axes"], entry["path"]
        if key != "-".join(parts):
            raise BadReference(f"{file.name}: the key {key} is not its own path {parts}.")
        if axes is not None and len(axes) > len(shape):
            raise BadReference(f"{file.name}: {key} has shape {shape} but the axes {axes}.")
        tree[saved_path(parts)] = [shape, axes]
    return dict(sorted(tree.items()))


def read_trees(directory: Path) -> dict[str, dict[str, Tree]]:
    """Every tree of the reference, by model and layout."""
    trees: dict[str, dict[str, Tree]] = {}
    for file in sorted(directory.glob(f"*{TREE_SUFFIX}")):
        model, layout = split_tree_name(file.name)
        trees.setdefault(model, {})[layout] = read_tree(file)
    if not trees:
        raise BadReference(f"There is no *{TREE_SUFFIX} in {directory}.")
    return trees


def pack(trees: dict[str, dict[str, Tree]]) -> bytes:
    """The trees as xz-compressed JSON, byte for byte the same for the same trees."""
    text = json.dumps(trees, sort_keys=True, separators=(",", ":"))
    return lzma.compress(text.encode(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, preset=None, filters=FILTERS)


def case_files(case: Path) -> list[Path]:
    """The files of a case to copy, relative to it."""
    files = [file.relative_to(case) for file in case.rglob("*") if file.is_file()]
    return sorted(
        file
        for file in files
        if file == Path("case.json")
        or file.parts[0] == "hf"
        or file.name == "expected.safetensors"
        or (file.parts[0] == "orbax" and case.name in ORBAX_CASES)
    )


def copy_golden(source: Path, target: Path) -> int:
    """Replaces the directory `target` by the cases in `source`; the number of cases."""
    cases = sorted(file.parent for file in source.glob("*/case.json"))
    if not cases:
        raise BadReference(f"There is no */case.json in {source}.")
    if target.exists():
        shutil.rmtree(target)  # a case that has left the reference must not stay behind
    for case in cases:
        for file in case_files(case):
            copy = target / case.name / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(case / file, copy)  # contents only: the reference may be read-only
    return len(cases)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    data = Path(__file__).resolve().parents[1] / "tests" / "data"
    parser = argparse.ArgumentParser(
        prog="reference.py",
        description="Copy MaxText's parameter trees and the golden cases into the repository's test data.",
        epilog="The output directory's trees.json.xz and golden/ are replaced; nothing else is touched.",
    )
    parser.add_argument("reference", type=Path, metavar="REFERENCE_DIR", help="holds trees/ and golden/")
    parser.add_argument("--output", type=Path, default=data, metavar="DIR", help="where to write (default: tests/data)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        trees = read_trees(options.reference / "trees")
        packed = pack(trees)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "trees.json.xz").write_bytes(packed)
        cases = copy_golden(options.reference / "golden", options.output / "golden")
    except BadReference as error:
        print(f"reference.py: {error}", file=sys.stderr)
        return 1
    count = sum(len(layouts) for layouts in trees.values())
    print(f"trees.json.xz: {len(trees)} models, {count} trees, {len(packed):,} bytes")
    print(f"golden: {cases} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The reference data under tests/data, for tests: what MaxText expects and what its own converter produced.

`tools/reference.py` puts the data there. Nothing here uses the package, so that a test compares two
independent readings of the same files.
"""

from __future__ import annotations

import functools
import json
import lzma
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DATA = Path(__file__).parent / "data"
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


# Collections of MaxText's that ckptc makes part of `params`, and what they hold. MaxText's `from_pretrained`, which all
# fine-tuning and MaxEngine go through, reads `params` only; its other loaders look there too.
MOVED = {"MoEBiasVar": "gate/bias", "Tid2EidVar": "tid2eid"}


@dataclass(frozen=True)
class GoldenCase:
    """One conversion by MaxText: a tiny checkpoint and every array it became."""

    name: str
    model: str
    multimodal: bool
    layout: str  # scan or unscan
    dtype: str  # that the result was saved in: bfloat16, float32 or float8_e4m3fn
    hf: Path  # the directory of the Hub's checkpoint; cases may share one
    expected: Path  # the safetensors file of the result
    vocab: int  # vocab_size as given to MaxText, which pads the checkpoint's own

    @property
    def id(self) -> str:
        """Unique among the cases: `llama3_1.scan.float32`."""
        return f"{self.name}.{self.expected.parent.name}"


def golden_cases() -> list[GoldenCase]:
    """Every golden conversion, in the order of the names."""
    cases = []
    for file in sorted((DATA / "golden").glob("*/*/expected.safetensors")):
        directory = file.parents[1]
        case = json.loads((directory / "case.json").read_text(encoding="utf-8"))
        layout, _, dtype = file.parent.name.partition(".")
        settings = dict(setting.split("=", 1) for setting in case["maxtext_config"])
        cases.append(
            GoldenCase(
                name=directory.name,
                model=case["model"],
                multimodal=case["multimodal"],
                layout=layout,
                dtype=dtype or case["save_dtype"],
                hf=(directory / case["hf"]).resolve(),
                expected=file,
                vocab=int(settings["vocab_size"]),
            )
        )
    return cases


def expected_arrays(case: GoldenCase) -> dict[str, np.ndarray[Any, Any]]:
    """What MaxText wrote, by slash-joined path: `params/params/decoder/decoder_norm/scale`. Of `MOVED`, `placed`."""
    known = {_unnumbered(part) for path in trees()[case.model][_tree_layout(case)] for part in path.split("/")}
    arrays = {}
    for name, array in read_safetensors(case.expected).items():
        parts = ["params", *name.split("-")]
        # A dash inside a part would have torn it: the pieces would not be parts of the model's own tree.
        strangers = [part for part in parts if _unnumbered(part) not in known]
        assert not strangers, f"{case.id}: {name} has parts unknown to the tree of {case.model}: {strangers}"
        arrays[placed("/".join(parts))] = array
    return arrays


def tree(model: str, layout: str) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """The full-size tree MaxText expects: path -> (shape, logical axes). Arrays of `MOVED` are `placed`.

    `layout` is scan, unscan, scan.mm or unscan.mm. MaxText names no axes for some arrays and only the leading
    ones for others: the axes may be fewer than the dimensions.
    """
    return {placed(path): (tuple(shape), tuple(axes or ())) for path, (shape, axes) in trees()[model][layout].items()}


def placed(path: str) -> str:
    """Where ckptc puts an array of MaxText's: at the same path, but within `params` where its collection is `MOVED`."""
    first, collection, rest = path.split("/", 2)
    return f"{first}/params/{rest}" if collection in MOVED else path


@functools.cache
def trees() -> dict[str, dict[str, dict[str, Any]]]:
    """Every tree: {model: {layout: {path as saved: [shape, axes]}}}."""
    loaded: dict[str, dict[str, dict[str, Any]]] = json.loads(lzma.decompress((DATA / "trees.json.xz").read_bytes()))
    return loaded


def read_safetensors(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a safetensors file."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        arrays[name] = np.frombuffer(content[start + begin : start + end], dtype).reshape(entry["shape"])
    return arrays


def _tree_layout(case: GoldenCase) -> str:
    return f"{case.layout}.mm" if case.multimodal else case.layout


def _unnumbered(part: str) -> str:
    """`layers_12` -> `layers_#`: a golden case has fewer layers than the model."""
    return re.sub(r"\d+", "#", part)

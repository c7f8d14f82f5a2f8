"""Modules of uploads that the formats' own libraries wrote, and what those libraries read from them.

`tests/data/codes/CASE.safetensors` holds a module's tensors as stored, and `expected:` its weight: bfloat16, or float16
as float32 where the library returns that. Its metadata has the upload's `quantization_config`, and the libraries' versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tests.ops.codes.decoding import all_rows, decoded, placed
from tests.ops.evaluate import dtype_of

from ckptc.compile.quantised import Weight, find
from ckptc.ir.source import SourceTensor
from ckptc.ops.codes import Code
from ckptc.storage.formats.safetensors import DTYPES

DATA = Path(__file__).parents[2] / "data" / "codes"
CASES = sorted(p.stem for p in DATA.glob("*.safetensors"))
EXPECTED = "expected:"
Array = np.ndarray[Any, Any]


def read(case: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """The upload's `quantization_config`, and its tensors with what is expected."""
    data = (DATA / f"{case}.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    config = json.loads(header.pop("__metadata__")["quantization_config"])
    out = {}
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        out[name] = np.frombuffer(data[begin + low : begin + high], dtype_of(DTYPES[entry["dtype"]][0]))
        out[name] = out[name].reshape(entry["shape"])
    return config, out


def weight_of(config: dict[str, Any], tensors: dict[str, Array]) -> tuple[str, Weight, set[str]]:
    """The one weight that the headers say is stored as codes, and what is left out."""
    headers = {n: SourceTensor(n, a.dtype.name, a.shape, 0, 0, a.nbytes) for n, a in tensors.items()}
    found = find({"quantization_config": config}, headers)
    ((name, weight),) = found.weights.items()
    assert {weight.stored, *weight.beside, *found.unused} == tensors.keys(), "nothing of the module is left"
    return name, weight, set(found.unused)


def both(case: str) -> tuple[Code, Array, Array]:
    """The code, the weight in float32 by the plain meaning, which the decoder agrees with, and what is expected."""
    config, tensors = read(case)
    stored = {n: a for n, a in tensors.items() if not n.startswith(EXPECTED)}
    name, weight, _ = weight_of(config, stored)
    expected = tensors[EXPECTED + name]
    arrays = [stored[n] for n in (weight.stored, *weight.beside)]
    out = weight.code.forward(arrays, expected.shape)
    rows = decoded(weight.code, expected.shape, arrays, all_rows(weight.code, expected.shape))
    assert placed(weight.code, expected.shape, rows).tobytes() == out.tobytes()
    return weight.code, out, expected


def same_bits(case: str) -> Code:
    """The code, of a case whose weight comes out bit for bit, rounded once to the dtype of what is expected."""
    code, out, expected = both(case)
    assert out.astype(expected.dtype).tobytes() == expected.tobytes()
    return code

"""Quantised uploads from file to restored checkpoint: the same arrays as from the same tensors dequantised beforehand, by loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from ckptc.cli.main import run
from reference import golden_cases, read_safetensors

CODES = [
    0,
    0.5,
    1,
    1.5,
    2,
    3,
    4,
    6,
]  # e2m1 without its sign: OCP Microscaling Formats (MX) specification 1.0, section 5.3.3
Tensors = dict[str, np.ndarray[Any, Any]]


def fp4(codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[rows, n/2] bytes and [rows, n/32] exponents -> [rows, n] float32, code by code."""
    out = np.zeros((codes.shape[0], codes.shape[1] * 2), np.float32)
    for row in range(out.shape[0]):
        for i in range(out.shape[1]):
            byte = int(codes[row, i // 2])
            code = byte & 15 if i % 2 == 0 else byte >> 4
            value = -float(CODES[code & 7]) if code & 8 else CODES[code & 7]
            out[row, i] = np.float32(value) * np.float32(2.0) ** (int(scales[row, i // 32]) - 127)
    return out


def fp8(values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], block: int) -> np.ndarray[Any, Any]:
    """[m, n] codes and one float32 scale a block -> [m, n] float32, element by element."""
    out = values.astype(np.float32)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] *= scales[row // block, column // block]
    return out


def source(name: str) -> tuple[dict[str, Any], Tensors]:
    hf = next(c.hf for c in golden_cases() if c.name == name)
    tensors: Tensors = {}
    for path in sorted(hf.glob("*.safetensors")):
        tensors.update(read_safetensors(path))
    return json.loads((hf / "config.json").read_text()), tensors


def convert(folder: Path, model: str, config: dict[str, Any], tensors: Tensors) -> Tensors:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
    output = folder / "out"
    options = ["--set", "padded_vocab=160", "--quiet", "--jobs", "1", "--memory", "1MiB"]
    assert run(["convert", "--model", model, "--source", str(folder), "--output", str(output), *options]) == 0
    tree = ocp.StandardCheckpointer().restore(output / "0" / "items")
    found: Tensors = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, (*path, key))
            else:
                found["/".join((*path, key))] = np.asarray(value)

    walk(tree["params"], ())
    return found


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name


def test_mxfp4_blocks_of_gpt_oss(tmp_path: Path) -> None:
    config, plain = source("gpt_oss")
    rng = np.random.default_rng(0)
    config |= {"hidden_size": 64, "intermediate_size": 32}  # whole groups of 32
    config.pop("quantization_config", None)
    size = {48: 64, 40: 32, 80: 64}
    plain = {k: _resized(v, size, rng) for k, v in plain.items()}
    stored = dict(plain)
    for name in [n for n in plain if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = plain[name].shape
        codes = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = rng.integers(120, 134, (experts, outputs, inputs // 32), dtype=np.uint8)
        rows = fp4(codes.reshape(experts * outputs, -1), scales.reshape(experts * outputs, -1))
        plain[name] = rows.reshape(experts, outputs, inputs).transpose(0, 2, 1)
        del stored[name]
        stored |= {f"{name}_blocks": codes, f"{name}_scales": scales}
    expected = convert(tmp_path / "plain", "gpt-oss-20b", config, plain)
    assert_same(convert(tmp_path / "stored", "gpt-oss-20b", config, stored), expected)


@pytest.mark.parametrize(("case", "model"), [("deepseek3", "deepseek3-671b")])
def test_fp8_blocks_with_incomplete_edges(tmp_path: Path, case: str, model: str) -> None:
    config, plain = source(case)
    rng = np.random.default_rng(1)
    stored = dict(plain)
    for name in [n for n in plain if n.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))]:
        shape = plain[name].shape
        codes = rng.normal(0, 1, shape).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(0.5, 2, [-(-n // 128) for n in shape]).astype(np.float32)
        plain[name] = fp8(codes, scales, 128)
        stored |= {name: codes, f"{name}_scale_inv": scales}
    expected = convert(tmp_path / "plain", model, config, plain)
    assert_same(convert(tmp_path / "stored", model, config, stored), expected)


def test_flat_fp4_experts_of_deepseek4(tmp_path: Path) -> None:
    config, plain = source("deepseek4")
    rng = np.random.default_rng(2)
    size = {20: 32}  # the experts' width; the rest is whole groups already
    config["moe_intermediate_size"] = 32
    plain = {k: _resized(v, size, rng) if ".ffn." in k else v for k, v in plain.items()}
    stored = dict(plain)
    for name in [n for n in plain if ".ffn.experts." in n]:
        rows, columns = plain[name].shape
        codes = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
        scales = rng.integers(120, 134, (rows, columns // 32), dtype=np.uint8)
        plain[name] = fp4(codes, scales)
        stored |= {name: codes.view(np.int8), name.removesuffix("weight") + "scale": scales}
    options = convert(tmp_path / "plain", "deepseek4-284b", config, plain)
    assert_same(convert(tmp_path / "stored", "deepseek4-284b", config, stored), options)


def _resized(array: np.ndarray[Any, Any], size: dict[int, int], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """An array of the same dtype in which axes of some sizes have others; new values where any differs."""
    shape = tuple(size.get(n, n) for n in array.shape)
    return array if shape == array.shape else rng.normal(0, 1, shape).astype(array.dtype)

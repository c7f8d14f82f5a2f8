"""Quantised uploads from file to restored checkpoint: the same arrays as from the same tensors dequantised beforehand, by loops."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file
from tests.ops.codes.published import read as published
from tests.ops.evaluate import same

from ckptc.cli.main import run
from ckptc.ops.codes import CODES, Code
from reference import golden_cases, read_safetensors

E2M1 = [
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
            value = -float(E2M1[code & 7]) if code & 8 else E2M1[code & 7]
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


# --- every code, from file to restored checkpoint --------------------------------------------------------------------

PLAIN = ("model.embed_tokens", "lm_head", "norm")  # names of what no upload quantises
LAYERS, EMBED, MLP = 3, 64, 128


def tiny_qwen3() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A config, and the shapes of its tensors."""
    config = {
        "num_hidden_layers": LAYERS, "hidden_size": EMBED, "intermediate_size": MLP, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 160, "tie_word_embeddings": False,
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (160, EMBED))
    shapes["model.norm.weight"] = (EMBED,)
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        shapes |= dict.fromkeys((f"{at}input_layernorm.weight", f"{at}post_attention_layernorm.weight"), (EMBED,))
        shapes |= dict.fromkeys((f"{at}self_attn.q_norm.weight", f"{at}self_attn.k_norm.weight"), (32,))
        shapes |= dict.fromkeys((f"{at}self_attn.q_proj.weight", f"{at}mlp.gate_proj.weight"), (128, EMBED))
        shapes |= dict.fromkeys((f"{at}self_attn.k_proj.weight", f"{at}self_attn.v_proj.weight"), (64, EMBED))
        shapes |= {f"{at}self_attn.o_proj.weight": (EMBED, 128), f"{at}mlp.up_proj.weight": (MLP, EMBED)}
        shapes[f"{at}mlp.down_proj.weight"] = (EMBED, MLP)
    return config, shapes


def config_of(code: Code) -> dict[str, Any]:
    """What an upload's `quantization_config` says of it: every key that some code reads, from the code's settings."""
    said: dict[str, Any] = dict(code.settings())
    bits, group = said.get("bits", 4), said.get("group", 32)
    weights = {"num_bits": bits, "type": "int", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    block = list(said.get("block", (128, 128))) if isinstance(said.get("block", ()), tuple) else None
    method = type(code).methods[0]
    return {
        "quant_method": method,
        "bits": bits,
        "group_size": group,
        "config_groups": groups,
        "weight_block_size": block,
    }


@pytest.mark.parametrize("layout", ["--scan", "--no-scan"])
@pytest.mark.parametrize("kind", CODES.values(), ids=CODES)
def test_every_code_converts_as_its_plain_weights_do(kind: type[Code], layout: str, tmp_path: Path) -> None:
    """Of one matrix, layer 1 is not quantised: uploads often leave some out. And some tensors say nothing of weights."""
    code = next(c for c, shape in kind.examples if len(shape) == 2)
    config, shapes = tiny_qwen3()
    rng, plain, stored = np.random.default_rng(0), dict[str, Any](), dict[str, Any]()
    for name, shape in shapes.items():
        weight = rng.normal(0, 1, shape).astype(ml_dtypes.bfloat16)
        if not any(word in name for word in PLAIN) and name != "model.layers.1.mlp.down_proj.weight":
            arrays = code.random(shape, np.random.default_rng(len(stored)))
            roles = {b.role for b in code.layout(shape).beside}
            upload = next(u for u in kind.uploads if u.beside.keys() == roles)
            stem = name.removesuffix(upload.weight)
            suffixes = [upload.codes, *(upload.beside[b.role] for b in code.layout(shape).beside)]
            arrays = [
                a.astype(first) if a.dtype != first and a.dtype.kind != "u" else a
                for a, first in paired(code, shape, arrays)
            ]
            stored |= {stem + suffix: a for suffix, a in zip(suffixes, arrays, strict=True)}
            stored |= {f"{name.removesuffix('.weight')}.input_scale": np.float32(1).reshape(1)}
            with np.errstate(all="ignore"):
                weight = code.forward(arrays, shape).astype(ml_dtypes.bfloat16)
        else:
            stored[name] = weight
        plain[name] = weight
    expected = converted(tmp_path / "plain", config, plain, layout)
    found = converted(tmp_path / "stored", config | {"quantization_config": config_of(code)}, stored, layout)
    assert found.keys() == expected.keys()
    assert [name for name in found if not same(found[name], expected[name])] == []


def paired(code: Code, shape: tuple[int, ...], arrays: list[Any]) -> list[tuple[Any, Any]]:
    """Each array with the first dtype that it may have, so that all modules of a kind have one."""
    dtypes = [code.dtypes[0], *(b.dtypes[0] for b in code.layout(shape).beside)]
    return [(a, np.dtype(getattr(ml_dtypes, d, d))) for a, d in zip(arrays, dtypes, strict=True)]


def converted(folder: Path, config: dict[str, Any], tensors: Tensors, layout: str) -> Tensors:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors")
    options = [layout, "--set", "padded_vocab=160", "--quiet", "--jobs", "1", "--memory", "1MiB", "--verify"]
    output = folder / "out"
    assert run(["convert", "--model", "qwen3-0.6b", "--source", str(folder), "--output", str(output), *options]) == 0
    tree = ocp.StandardCheckpointer().restore(output / "0" / "items")
    return {"/".join(p): np.asarray(v) for p, v in flattened(tree["params"])}


def flattened(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flattened(value, (*path, key))
        else:
            yield (*path, key), value


def test_a_summary_says_what_is_decoded_and_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, tensors = published("modelopt_nvfp4")
    name = "model.layers.0.self_attn.k_proj"
    stored = {k: v for k, v in tensors.items() if k.startswith(name)}
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 128}))
    said = {k: v for k, v in config.items() if k not in ("config_groups", "quant_method")}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    save_file({k: np.ascontiguousarray(v) for k, v in stored.items()}, tmp_path / "model.safetensors")
    mapping = tmp_path / "m.yaml"
    mapping.write_text(
        "family: f\ntarget: maxtext\nextra: true\ndims: { embed: config.hidden_size }\nmodels: { m: { repo: r/m } }\n"
        f"tensors: {{ a: {{ from: {name}.weight, as: embed embed2 }} }}\n".replace("embed2 }", "out }").replace(
            "{ embed:", "{ out: config.hidden_size, embed:"
        )
    )
    assert run(["compile", "--mapping", str(mapping), "--model", "m", "--source", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "decodes 1 weight stored as nvfp4\n" in text
    assert "ignores 1 tensor, 4 B: `*.input_scale`: " in text
    assert run(["models", "qwen3-0.6b"]) == 0
    assert re.search(r"^decodes .*\bnvfp4\b", capsys.readouterr().out, re.MULTILINE)

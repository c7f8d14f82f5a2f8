"""Scale: a model of 36,096 expert tensors compiles in little memory to a small plan, the same bytes every time."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ckptc.compile.compiler import compile_plan
from ckptc.compile.export import compile_export
from ckptc.compile.options import Options
from ckptc.compile.reading import ExportOptions
from ckptc.ir.saved import Saved, SavedArray
from ckptc.ir.source import Checkpoint, SourceFile, SourceTensor
from ckptc.plan.check import check_plan
from ckptc.plan.json import dumps, loads
from ckptc.plan.model import Plan
from ckptc.spec.mapping import find_model

MODEL = "qwen3-235b-a22b"
LAYERS, EXPERTS, FILES = 94, 128, 118
EXPERT_TENSORS = LAYERS * EXPERTS * 3
LAYOUTS = ("scanned", "unscanned")
MEMORY = 300 << 20  # bytes that the process may peak at; the interpreter and numpy are some 100 MB of it
BYTES = 5 << 20  # of the plan, in which each tensor has a row


def shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model as the Hub has it."""
    embed, mlp, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], embed)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for expert in range(config["num_experts"]):
            yield f"{layer}.mlp.experts.{expert}.gate_proj.weight", (mlp, embed)
            yield f"{layer}.mlp.experts.{expert}.up_proj.weight", (mlp, embed)
            yield f"{layer}.mlp.experts.{expert}.down_proj.weight", (embed, mlp)
        yield f"{layer}.mlp.gate.weight", (config["num_experts"], embed)
        for name, shape in (
            ("q", (queries, embed)),
            ("k", (keys, embed)),
            ("v", (keys, embed)),
            ("o", (embed, queries)),
        ):
            yield f"{layer}.self_attn.{name}_proj.weight", shape
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield f"{layer}.input_layernorm.weight", (embed,)
        yield f"{layer}.post_attention_layernorm.weight", (embed,)
    yield "model.norm.weight", (embed,)
    yield "lm_head.weight", (config["vocab_size"], embed)


@functools.cache
def checkpoint() -> Checkpoint:
    """The records of a checkpoint in many files, none of which exists."""
    config = find_model(MODEL)[1].config
    named = list(shapes(config))
    share = -(-len(named) // FILES)
    tensors, ends = {}, [4096] * FILES
    for n, (name, shape) in enumerate(named):
        file, size = n // share, 2
        for extent in shape:
            size *= extent
        tensors[name] = SourceTensor(name, "bfloat16", shape, file, ends[file], ends[file] + size)
        ends[file] += size
    files = [
        SourceFile(f"model-{i + 1:05}-of-{FILES:05}.safetensors", end, f"sha256:{i:064x}") for i, end in enumerate(ends)
    ]
    return Checkpoint(tuple(files), tensors, config)


@functools.cache
def compiled(layout: str, with_checkpoint: bool) -> Plan:
    mapping, model = find_model(MODEL)
    return compile_plan(mapping, model, Options(layout=layout), checkpoint() if with_checkpoint else None)


@pytest.mark.parametrize("with_checkpoint", [False, True], ids=["numbers", "headers"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_has_a_row_and_parts_are_few(layout: str, with_checkpoint: bool) -> None:
    plan = compiled(layout, with_checkpoint)
    assert plan.totals.tensors == len(plan.tensors) == len(checkpoint().tensors) == EXPERT_TENSORS + 849
    assert sum(len(a.parts) for a in plan.arrays) == len(plan.arrays)  # nothing here is joined or padded
    assert len(plan.arrays) == (15 if layout == "scanned" else 3 + 12 * LAYERS)
    experts = [a for a in plan.arrays if "/moe_block/w" in a.name]
    assert sum(len(s.tensors) for a in experts for s in a.sources) == EXPERT_TENSORS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_is_the_checkpoint_once(layout: str) -> None:
    plan = compiled(layout, True)
    assert plan.totals.read_bytes == sum(t.end - t.begin for t in checkpoint().tensors.values())
    assert plan.totals.write_bytes == plan.totals.read_bytes == 2 * plan.totals.parameters
    assert plan.totals.peak_memory_bytes <= plan.choices.memory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_loads_as_it_was(layout: str) -> None:
    text = dumps(compiled(layout, True))
    assert loads(text) == compiled(layout, True)
    assert len(text) < BYTES


@functools.cache
def exported(layout: str) -> Plan:
    """The way back, from arrays as the way there stores them."""
    arrays = tuple(SavedArray(a.path, a.shape, a.dtype, a.chunk) for a in compiled(layout, False).arrays)
    saved = Saved((SourceFile("_METADATA", 1, f"sha256:{0:064x}"),), arrays, 0)
    return compile_export(*find_model(MODEL), ExportOptions(), saved)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_has_a_row_for_each_tensor_and_all_else_once(layout: str) -> None:
    plan = exported(layout)
    assert plan.choices.layout == layout
    assert {t.name for t in plan.outputs} == checkpoint().tensors.keys()
    assert len(plan.kinds) < 30
    assert plan.totals.read_bytes == plan.totals.write_bytes == 2 * plan.totals.parameters
    text = dumps(plan)
    assert len(text) < 4_000_000
    assert loads(text) == plan
    check_plan(plan, "plan.json")


COMPILE = """
import hashlib, json, sys
from ckptc.compile.compiler import compile_plan
from ckptc.compile.options import Options
from ckptc.plan.json import dumps
from ckptc.run.memory import peak_resident_bytes
from ckptc.spec.mapping import find_model
plan = compile_plan(*find_model(sys.argv[1]), Options(layout=sys.argv[2]))
text = dumps(plan).encode()
peak = peak_resident_bytes()
json.dump({"digest": hashlib.sha256(text).hexdigest(), "bytes": len(text), "peak": peak}, sys.stdout)
"""


@functools.cache
def compiled_apart(layout: str, seed: int) -> dict[str, Any]:
    """Compiled in a process of its own, in which Python orders sets by `seed`."""
    command = [sys.executable, "-c", COMPILE, MODEL, layout]
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out: dict[str, Any] = json.loads(done.stdout)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_the_same_in_every_process(layout: str) -> None:
    assert compiled_apart(layout, 1)["digest"] == compiled_apart(layout, 2)["digest"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_a_compilation_is_bounded(layout: str) -> None:
    assert compiled_apart(layout, 1)["peak"] < MEMORY

"""Makes the trained checkpoints under tests/data/trained, with the real MaxText.

    python tools/make_trained.py WORKDIR --maxtext-python PYTHON [SHAPE ...]

All hold the same tiny Llama, of which hf/ is the original: ckptc converts it, and MaxText trains it with a learning rate
of 0, so that whatever shape a checkpoint has, its export is the original bit for bit. Shapes: what `SHAPES` says, and
`rl`, the tree of reinforcement learning, which tunix saves around MaxText's adapter.

PYTHON is that of `forward.py`, with `pip install --no-deps google-tunix==0.1.7` besides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

MODEL = "llama2-7b"
DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "trained"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,  # the root of which scales queries, exactly
    "vocab_size": 32,
}
SETTINGS = [
    f"model_name={MODEL}",
    "base_emb_dim=16",
    "base_mlp_dim=12",
    "base_num_decoder_layers=5",
    "base_num_query_heads=2",
    "base_num_kv_heads=1",
    "head_dim=16",
    "vocab_size=32",
    "override_model_config=true",
    "hardware=cpu",
    "skip_jax_distributed_system=true",
    "dtype=float32",
    "weight_dtype=float32",
    "attention=dot_product",
    "max_target_length=8",
    "per_device_batch_size=2",
    "sharding_tolerance=1.0",
]
TRAINING = [
    "dataset_type=synthetic",
    "steps=1",
    "checkpoint_period=1",
    "async_checkpointing=false",
    "learning_rate=0",
    "opt_type=sgd",
    "enable_goodput_recording=false",
    "log_config=false",
    "enable_tensorboard=false",
]
PIPELINE = ["ici_pipeline_parallelism=2", "ici_fsdp_parallelism=1", "pipeline_parallel_layers=4"]
# Of each shape: ckptc's options for what MaxText begins with, MaxText's settings, and how many devices it sees.
SHAPES: dict[str, tuple[list[str], list[str], int]] = {
    "diloco": ([], ["enable_diloco=true", "ici_diloco_parallelism=2", "ici_fsdp_parallelism=1"], 2),
    "scan_axis_0": (["--param-scan-axis", "0"], ["param_scan_axis=0"], 1),
    "scan_axis_2": (["--param-scan-axis", "2"], ["param_scan_axis=2"], 1),
    "pipeline": (["--pipeline", "stages=2,layers=4"], PIPELINE, 2),
    "pipeline_stages": (
        ["--no-scan", "--pipeline", "stages=2,layers_per_stage=2,layers=4"],
        [*PIPELINE, "num_layers_per_pipeline_stage=2", "scan_layers=false"],
        2,
    ),
    "pipeline_scanned_stages": (
        ["--pipeline", "stages=2,layers_per_stage=2,layers=4,scan_layers_per_stage"],
        [*PIPELINE, "num_layers_per_pipeline_stage=2", "scan_layers_per_stage=true"],
        2,
    ),
}
RL = """
import importlib.util
import sys
from maxtext.checkpoint_conversion.utils.hf_model_configs import HF_MODEL_CONFIGS
from maxtext.configs import pyconfig
from maxtext.utils import model_creation_utils
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR
# This file alone: the package imports much that this environment need not have.
tunix = importlib.util.find_spec("tunix").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("checkpoint_manager", tunix + "/sft/checkpoint_manager.py")
saving = importlib.util.module_from_spec(spec)
spec.loader.exec_module(saving)
config = pyconfig.initialize(["rl", MAXTEXT_CONFIGS_DIR + "/base.yml", *sys.argv[2:]])
# The adapter asks for this, for names of vLLM's; its tree does not depend on it.
HF_MODEL_CONFIGS.setdefault(config.model_name, HF_MODEL_CONFIGS["llama3.1-8b"])
model, mesh = model_creation_utils.from_pretrained(config, wrap_with_tunix_adapter=True)
with mesh:
    manager = saving.CheckpointManager(sys.argv[1])
    manager.save(0, model, force=True)
    manager.close()
"""


def make_original(directory: Path) -> None:
    """A random Llama in bfloat16."""
    generator = np.random.default_rng(0)
    e, m, q, kv = 16, 12, 32, 16
    shapes = {"model.embed_tokens.weight": (32, e), "model.norm.weight": (e,), "lm_head.weight": (32, e)}
    for layer in range(SIZES["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (q, e),
            "self_attn.k_proj": (kv, e),
            "self_attn.v_proj": (kv, e),
            "self_attn.o_proj": (e, q),
            "mlp.gate_proj": (m, e),
            "mlp.up_proj": (m, e),
            "mlp.down_proj": (e, m),
            "input_layernorm": (e,),
            "post_attention_layernorm": (e,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    directory.mkdir(parents=True)
    tensors = {n: generator.standard_normal(s).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **SIZES}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def make(shape: str, original: Path, work: Path, python: str) -> Path:
    """The checkpoint of a shape: the directory of its step."""
    options, settings, devices = SHAPES.get(shape, ([], [], 1))
    shutil.rmtree(work / shape, ignore_errors=True)
    converted = work / shape / "converted"
    command = [sys.executable, "-m", "ckptc", "convert", "--model", MODEL, "--source", str(original)]
    subprocess.run([*command, "--output", str(converted), "--quiet", *options], check=True)
    given = [*SETTINGS, *settings, f"load_parameters_path={converted}/0/items", "run_name=run"]
    given.append(f"base_output_directory={work / shape}")
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    if shape == "rl":
        program = ["-c", RL, str(work / shape / "rl"), *given, "enable_checkpointing=false"]
    else:
        base = subprocess.run(
            [python, "-c", "from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR as d; print(d)"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[-1]
        program = ["-m", "maxtext.trainers.pre_train.train", f"{base}/base.yml", *given, *TRAINING]
    with open(work / f"{shape}.log", "w", encoding="utf-8") as log:
        subprocess.run([python, *program], check=True, stdout=log, stderr=log, env={**os.environ, **flags})
    return work / shape / ("rl/0" if shape == "rl" else "run/checkpoints/0")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="WORKDIR")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}, rl (default: all)")
    parser.add_argument("--maxtext-python", required=True, metavar="PYTHON")
    options = parser.parse_intermixed_args()
    work = options.work.resolve()
    if not (DATA / "hf").exists():
        make_original(DATA / "hf")
    work.mkdir(parents=True, exist_ok=True)
    for shape in options.shapes or [*SHAPES, "rl"]:
        found = make(shape, DATA / "hf", work, options.maxtext_python)
        shutil.rmtree(DATA / shape, ignore_errors=True)
        shutil.copytree(found, DATA / shape)
        print(f"{shape}: {sum(f.stat().st_size for f in (DATA / shape).rglob('*') if f.is_file())} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

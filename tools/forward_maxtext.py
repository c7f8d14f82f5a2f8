"""Runs MaxText's own models on the checkpoints that `forward.py` has converted.

    python forward_maxtext.py FORWARDS

Runs where MaxText is; imports nothing of this repository. FORWARDS is the JSON list that `forward.py` writes. For each
directory in it this builds MaxText's model with the case's sizes, restores maxtext/0/items with MaxText's own
`load_params_from_path`, which fails unless every array of the model is there in the right shape, and leaves the logits
for the tokens of ../expected.npz in actual.npz, or the file error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import linen
from maxtext.common import checkpointing
from maxtext.configs import pyconfig
from maxtext.layers import quantizations
from maxtext.models import models
from maxtext.utils import maxtext_utils
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

# Float32 throughout, and the plainest implementation of everything: what is compared is weights, not kernels.
SETTINGS = [
    "run_name=forward",
    "enable_checkpointing=false",
    "skip_jax_distributed_system=true",
    "hardware=cpu",
    "dtype=float32",
    "weight_dtype=float32",
    "matmul_precision=highest",
    "float32_qk_product=true",
    "float32_logits=true",
    "attention=dot_product",
    "use_multimodal=false",
    "enable_dropout=false",
    "remat_policy=full",
    # Experts by plain einsum, and no token dropped for want of capacity.
    "sparse_matmul=false",
    "megablox=false",
    "capacity_factor=-1",
    "override_model_config=true",
]


def merged(settings: list[str]) -> list[str]:
    """The settings, a later one replacing an earlier one of the same name."""
    return [f"{name}={value}" for name, value in dict(setting.split("=", 1) for setting in settings).items()]


def run(case: dict[str, Any], directory: Path) -> None:
    with np.load(directory.parent / "expected.npz") as expected:
        tokens = np.asarray(expected["tokens"], np.int32)
    batch, length = tokens.shape
    own = [
        f"model_name={case['model']}",
        f"base_output_directory={directory / 'unused'}",
        f"per_device_batch_size={batch}",
        f"max_target_length={length}",
        f"max_prefill_predict_length={length}",
        f"scan_layers={str(case['layout'] == 'scan').lower()}",
    ]
    settings = merged([*SETTINGS, *own, *case["maxtext"]])
    config = pyconfig.initialize(["forward", os.path.join(MAXTEXT_CONFIGS_DIR, "base.yml"), *settings])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = models.transformer_as_linen(config, mesh, quant=quantizations.configure_quantization(config))
    with mesh, linen.logical_axis_rules(config.logical_axis_rules):
        shapes = linen.meta.unbox(maxtext_utils.get_abstract_param(model, config))
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(shapes))
        stored = str(directory / "maxtext" / "0" / "items")
        variables = checkpointing.load_params_from_path(stored, shapes, config.checkpoint_storage_concurrent_gb)
        positions, segments = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape), np.ones_like(tokens)
        apply = jax.jit(
            lambda variables, tokens: model.apply(
                variables,
                tokens,
                positions,
                decoder_segment_ids=segments,
                enable_dropout=False,
                rngs={"params": jax.random.key(0), "dropout": jax.random.key(0)},
            )
        )
        logits = apply(variables, tokens)
    if isinstance(logits, tuple):
        logits = logits[0]
    np.savez(directory / "actual.npz", logits=np.asarray(logits, np.float32))


def main() -> int:
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        directory = Path(case["directory"])
        if (directory / "error").exists():
            continue
        try:
            run(case, directory)
            print(f"{directory.parent.name}, {case['layout']}: forward pass done", file=sys.stderr)
        except Exception as error:  # one case must not take the others with it
            (directory / "error").write_text(f"maxtext: {type(error).__name__}: {error}", encoding="utf-8")
            (directory / "maxtext.log").write_text(traceback.format_exc(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Runs MaxText's own models on the checkpoints that `forward.py` has converted.

    python forward_maxtext.py FORWARDS

Runs where MaxText is; imports nothing of this repository. FORWARDS is the JSON list that `forward.py` writes. For each
directory in it, and each loader that it names, this builds MaxText's model with the case's sizes, restores
maxtext/0/items, and leaves the logits for the tokens of ../expected.npz in actual.LOADER.npz, or the file error.LOADER.

MaxText has three ways to restore parameters, and they read different collections of the tree:

 - `train`: train.py's, `load_params_from_path` into the NNX model. It looks for each variable in the collection of its
   class, then in `params`.
 - `pretrained`: `from_pretrained`, for fine-tuning, distillation, and MaxEngine. It reads the collection `params` only,
   and leaves what it does not find there deleted.
 - `linen`: `load_params_from_path` into the model as a Linen module, as the quantizer and older programs do.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import linen, nnx
from maxtext.common import checkpointing
from maxtext.configs import pyconfig
from maxtext.layers import quantizations
from maxtext.models import models
from maxtext.utils import maxtext_utils, maxtext_utils_nnx, model_creation_utils
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

Forward = Callable[..., Any]  # tokens, positions, segments: int32[batch, length] each -> logits

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


def configuration(case: dict[str, Any], directory: Path, batch: int, length: int) -> Any:
    """MaxText's configuration of the case."""
    own = [
        f"model_name={case['model']}",
        f"base_output_directory={directory / 'unused'}",
        f"load_parameters_path={directory / 'maxtext' / '0' / 'items'}",
        f"per_device_batch_size={batch}",
        f"max_target_length={length}",
        f"max_prefill_predict_length={length}",
        f"scan_layers={str(case['layout'] == 'scan').lower()}",
    ]
    settings = merged([*SETTINGS, *own, *case["maxtext"]])
    return pyconfig.initialize(["forward", os.path.join(MAXTEXT_CONFIGS_DIR, "base.yml"), *settings])


def by_train(config: Any, mesh: Any) -> Forward:
    """The model as train.py restores it from `load_parameters_path`."""
    create, abstract = model_creation_utils.create_nnx_abstract_model(config, mesh)
    wanted = checkpointing._abstract_params(nnx.split(abstract)[1])
    model = maxtext_utils_nnx.create_nnx_sharded_model(abstract, create, mesh=mesh)
    restored = checkpointing.load_params_from_path(
        config.load_parameters_path, wanted, config.checkpoint_storage_concurrent_gb
    )
    nnx.update(model, restored.to_pure_dict())
    return applied(model)


def by_pretrained(config: Any, mesh: Any) -> Forward:
    """The model as `from_pretrained` gives it."""
    return applied(model_creation_utils.from_pretrained(config, mesh=mesh))


def applied(model: Any) -> Forward:
    """The forward pass of an NNX model."""
    graph, state = nnx.split(model)

    def forward(state: Any, tokens: Any, positions: Any, segments: Any) -> Any:
        return nnx.merge(graph, state)(tokens, positions, decoder_segment_ids=segments, enable_dropout=False)

    compiled = jax.jit(forward)
    return lambda *inputs: compiled(state, *inputs)


def by_linen(config: Any, mesh: Any) -> Forward:
    """The model as a Linen module, with the variables that its loader gives."""
    model = models.transformer_as_linen(config, mesh, quant=quantizations.configure_quantization(config))
    shapes = linen.meta.unbox(maxtext_utils.get_abstract_param(model, config))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(shapes))
    variables = checkpointing.load_params_from_path(
        config.load_parameters_path, shapes, config.checkpoint_storage_concurrent_gb
    )

    def forward(variables: Any, tokens: Any, positions: Any, segments: Any) -> Any:
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        return model.apply(variables, tokens, positions, decoder_segment_ids=segments, enable_dropout=False, rngs=rngs)

    compiled = jax.jit(forward)
    return lambda *inputs: compiled(variables, *inputs)


LOADERS: dict[str, Callable[[Any, Any], Forward]] = {
    "train": by_train,
    "pretrained": by_pretrained,
    "linen": by_linen,
}


def run(case: dict[str, Any], directory: Path, loader: str) -> None:
    with np.load(directory.parent / "expected.npz") as expected:
        tokens = np.asarray(expected["tokens"], np.int32)
    config = configuration(case, directory, *tokens.shape)
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    with mesh, linen.logical_axis_rules(config.logical_axis_rules):
        forward = LOADERS[loader](config, mesh)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        logits = forward(tokens, positions, np.ones_like(tokens))
    if isinstance(logits, tuple):
        logits = logits[0]
    np.savez(directory / f"actual.{loader}.npz", logits=np.asarray(logits, np.float32))


def main() -> int:
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        directory = Path(case["directory"])
        if (directory / "error").exists():
            continue
        for loader in case["loaders"]:
            try:
                run(case, directory, loader)
                print(f"{directory.parent.name}, {case['layout']}, {loader}: forward pass done", file=sys.stderr)
            except Exception as error:  # one case must not take the others with it
                (directory / f"error.{loader}").write_text(
                    f"maxtext: {type(error).__name__}: {error}", encoding="utf-8"
                )
                (directory / f"maxtext.{loader}.log").write_text(traceback.format_exc(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

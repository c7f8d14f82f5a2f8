"""The target's side of a proof: MaxText's own model on what ckptc has converted.

    python maxtext_side.py JOB

Runs where MaxText is, as a program of its own; imports nothing of ckptc. JOB is the JSON file that
`ckptc.prove.prover` writes. For each layout and loader this builds MaxText's model, restores LAYOUT/0/items, and
leaves `LAYOUT.LOADER.npz`: the logits for the tokens of expected.npz, and, of the first loader, what the model
computes on the way.

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import linen, nnx
from maxtext.common import checkpointing
from maxtext.configs import pyconfig
from maxtext.layers import attention_mla, attention_op, attentions, embeddings, linears, moe, quantizations
from maxtext.models import models
from maxtext.utils import maxtext_utils, maxtext_utils_nnx, model_creation_utils
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

Forward = Callable[..., Any]  # tokens, positions, segments: int32[batch, length] each -> logits

# Float32 throughout, and the plainest implementation of everything: what is compared is weights, not kernels.
SETTINGS = {
    "run_name": "prove",
    "enable_checkpointing": "false",
    "skip_jax_distributed_system": "true",
    "hardware": "cpu",
    "dtype": "float32",
    "weight_dtype": "float32",
    "matmul_precision": "highest",
    "float32_qk_product": "true",
    "float32_logits": "true",
    "attention": "dot_product",
    "use_multimodal": "false",
    "enable_dropout": "false",
    "remat_policy": "full",
    # Experts by plain einsum, and no token dropped for want of capacity.
    "sparse_matmul": "false",
    "megablox": "false",
    "capacity_factor": "-1",
    "override_model_config": "true",
}


class Recorder:
    """What a model computes on the way: (point, array) in the order in which it does, from within compiled loops too."""

    def __init__(self) -> None:
        self.found: list[tuple[str, np.ndarray[Any, Any]]] = []
        self.active = False
        self.inside: list[str] = []

    def note(self, point: str, value: Any) -> None:
        if isinstance(value, tuple):
            value = value[0]
        jax.debug.callback(lambda x: self.found.append((point, np.asarray(x, np.float32))), value, ordered=True)

    def watch(self) -> None:
        """Puts itself around the calls of MaxText's layers. Of nested ones of a kind, the outer one counts."""
        self._around(embeddings.Embed, "embedding", None, "embedding")
        self._around(attentions.Attention, "attention", "attention input", "attention output")
        self._around(attention_mla.MLA, "attention", "attention input", "attention output")
        for kind in (linears.MlpBlock, moe.RoutedMoE, moe.RoutedAndSharedMoE):
            self._around(kind, "mlp", "mlp input", "mlp output")
        self._around(moe.GateLogit, "router", None, "router")
        self._heads()
        self._dense()

    def _around(self, kind: Any, name: str, before: str | None, after: str) -> None:
        plain = kind.__call__

        def watched(module: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.active or name in self.inside:
                return plain(module, *args, **kwargs)
            if before:
                given = args[0] if args else kwargs.get("inputs_q", kwargs.get("inputs"))
                if given is not None:
                    self.note(before, given)
            self.inside.append(name)
            try:
                out = plain(module, *args, **kwargs)
            finally:
                self.inside.pop()
            self.note(after, out)
            return out

        kind.__call__ = watched

    def _heads(self) -> None:
        plain = attention_op.AttentionOp.__call__

        def watched(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return plain(module, query, key, value, *args, **kwargs)
            self.note("query", query)
            self.note("key", key)
            self.note("value", value)
            out = plain(module, query, key, value, *args, **kwargs)
            self.note("heads", out)
            return out

        attention_op.AttentionOp.__call__ = watched

    def _dense(self) -> None:
        """What goes into an MLP's last matrix, whose kernel begins with the axis `mlp`."""
        plain = linears.DenseGeneral.__call__

        def watched(module: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            last = tuple(getattr(module, "kernel_axes", ()))[:1] == ("mlp",)
            if self.active and self.inside[-1:] == ["mlp"] and last:
                self.note("mlp hidden", inputs)
            return plain(module, inputs, *args, **kwargs)

        linears.DenseGeneral.__call__ = watched


def configuration(job: dict[str, Any], layout: str, directory: Path, batch: int, length: int) -> Any:
    """MaxText's configuration: its model's, with the sizes of the job."""
    own = {
        "model_name": job["maxtext_model"],
        "base_output_directory": str(directory / "unused"),
        "load_parameters_path": str(directory / layout / "0" / "items"),
        "per_device_batch_size": batch,
        "max_target_length": length,
        "max_prefill_predict_length": length,
        "scan_layers": str(layout == "scan").lower(),
    }
    settings = {**SETTINGS, **own, **job["maxtext"]}
    words = [f"{name}={value}" for name, value in settings.items()]
    return pyconfig.initialize(["prove", os.path.join(MAXTEXT_CONFIGS_DIR, "base.yml"), *words])


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


def run(job: dict[str, Any], layout: str, loader: str, directory: Path, recorder: Recorder, watched: bool) -> None:
    with np.load(directory / "expected.npz") as expected:
        tokens = np.asarray(expected["tokens"], np.int32)
    config = configuration(job, layout, directory, *tokens.shape)
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    with mesh, linen.logical_axis_rules(config.logical_axis_rules):
        forward = LOADERS[loader](config, mesh)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        recorder.found.clear()
        recorder.active = watched
        try:
            logits = forward(tokens, positions, np.ones_like(tokens))
            jax.effects_barrier()
        finally:
            recorder.active = False
    if isinstance(logits, tuple):
        logits = logits[0]
    points = {f"{n:05d}|-1|{point}": value for n, (point, value) in enumerate(recorder.found)}
    np.savez(directory / f"{layout}.{loader}.npz", logits=np.asarray(logits, np.float32), **points)


def main() -> int:
    path = Path(sys.argv[1])
    job, directory = json.loads(path.read_text(encoding="utf-8")), path.parent
    versions = {"maxtext": version("maxtext"), "jax": version("jax")}
    (directory / "maxtext.json").write_text(json.dumps(versions), encoding="utf-8")
    recorder = Recorder()
    recorder.watch()
    for layout in job["layouts"]:
        for number, loader in enumerate(job["loaders"]):
            try:
                run(job, layout, loader, directory, recorder, number == 0)
                print(f"done {layout} {loader}", flush=True)
            except Exception as error:  # one loader must not take the others with it
                traceback.print_exc()
                text = f"{type(error).__name__}: {error}"
                (directory / f"error.{layout}.{loader}").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

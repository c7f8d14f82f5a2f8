"""The checkpoint's own side of a proof: its class in transformers, on a tiny random checkpoint or on real weights.

    python transformers_side.py JOB

Runs where torch and transformers are, as a program of its own; imports nothing of ckptc. JOB is the JSON file that
`ckptc.prove.prover` writes. Leaves `hf/` as `save_pretrained` writes it, and `expected.npz`: `tokens`, `logits`, and
what the model computes on the way, in the order in which it does. Everything is float32; attention is `eager`: plain
matrix products and a softmax.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file


class Recorder:
    """What a model computes on the way, as arrays named `NUMBER|LAYER|POINT`."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self.layer = -1

    def note(self, point: str, value: Any) -> None:
        if isinstance(value, tuple):
            value = value[0]
        if isinstance(value, torch.Tensor):
            self.arrays[f"{len(self.arrays):05d}|{self.layer}|{point}"] = value.detach().float().numpy()

    def watch(self, model: Any) -> None:
        """Puts hooks on the decoder's layers, whatever the class names them."""
        for number, layer in enumerate(decoder_layers(model)):
            layer.register_forward_pre_hook(self._enter(number), with_kwargs=True)
            for name, child in layer.named_children():
                kind = type(child).__name__.lower()
                if "attention" in kind:
                    self._around(child, "attention")
                elif name in ("mlp", "feed_forward", "block_sparse_moe") or "mlp" in kind or "moe" in kind:
                    self._around(child, "mlp")
                    for inner, module in child.named_modules():
                        if inner in ("down_proj", "c_proj", "w2"):
                            module.register_forward_pre_hook(self._input("mlp hidden"), with_kwargs=True)
                        elif inner in ("gate", "router"):
                            module.register_forward_hook(self._output("router"))
        for module in {
            sys.modules[type(m).__module__] for m in model.modules() if "transformers" in type(m).__module__
        }:
            if hasattr(module, "eager_attention_forward"):
                self._watch_heads(module)

    def _enter(self, number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self.layer = number
            if number == 0:
                self.note("embedding", args[0] if args else kwargs["hidden_states"])

        return hook

    def _input(self, point: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self.note(point, args[0] if args else kwargs.get("hidden_states"))

        return hook

    def _output(self, point: str) -> Any:
        return lambda module, args, output: self.note(point, output)

    def _around(self, module: Any, name: str) -> None:
        module.register_forward_pre_hook(self._input(f"{name} input"), with_kwargs=True)
        module.register_forward_hook(self._output(f"{name} output"))

    def _watch_heads(self, module: Any) -> None:
        plain = module.eager_attention_forward

        def watched(owner: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            scaling = kwargs.get("scaling")
            if scaling is None:
                scaling = getattr(owner, "scaling", query.shape[-1] ** -0.5)
            # [batch, heads, positions, head_dim] -> [batch, positions, heads, head_dim]
            self.note("query", (query * scaling).transpose(1, 2))
            self.note("key", key.transpose(1, 2))
            self.note("value", value.transpose(1, 2))
            out = plain(owner, query, key, value, *args, **kwargs)
            self.note("heads", out)
            return out

        module.eager_attention_forward = watched


def decoder_layers(model: Any) -> list[Any]:
    """The layers of the text model: the longest list of modules that is no tower's."""
    lists = [
        list(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and not re.search("vision|visual|audio|experts", name)
    ]
    return max(lists, key=len)


def randomise(model: Any, seed: int) -> None:
    """Gives every parameter values that show.

    A fresh model would hide mistakes: its norms are all ones, its biases zero, its matrices so small that attention is
    nearly uniform. All are numbers of bfloat16, as published ones are: MaxText rounds tied embeddings to it for the
    logits, whatever its dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            parameter.copy_(parameter.bfloat16())
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("tid2eid"):  # hashed routing: which experts a token id goes to, each at most once
                experts = model.config.n_routed_experts
                rows = [torch.randperm(experts, generator=generator)[: buffer.shape[-1]] for _ in range(len(buffer))]
                buffer.copy_(torch.stack(rows))


def publish(directory: Path, renames: list[list[str]], transposed: str) -> None:
    """Gives the saved tensors the Hub's names and axes, where `save_pretrained` writes others."""

    def renamed(name: str) -> str:
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        return name

    def turned(name: str, tensor: Any) -> Any:
        return tensor.transpose(-1, -2).contiguous() if transposed and re.search(transposed, name) else tensor

    for file in directory.glob("*.safetensors"):
        tensors = {renamed(name): turned(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {renamed(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content), encoding="utf-8")


def made(job: dict[str, Any]) -> Any:
    """The model: random, or the first layers of real weights."""
    architecture = getattr(transformers, job["class"], None)
    if architecture is None:
        raise ValueError(f"transformers {transformers.__version__} has no class {job['class']}")
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if job["source"]:
        config = architecture.config_class.from_pretrained(job["source"])
        text = config.get_text_config()
        text.num_hidden_layers = job["layers"]
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: job["layers"]]
        return architecture.from_pretrained(job["source"], config=config, **options).eval()
    config = architecture.config_class(**job["config"], dtype="float32", attn_implementation="eager")
    torch.manual_seed(job["seed"])
    model = architecture(config).float().eval()
    randomise(model, job["seed"])
    return model


def run(job: dict[str, Any], directory: Path) -> None:
    model = made(job)
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(directory / "hf", max_shard_size=max(total // 3, 1) if total < 1e9 else "5GB")
    if job["rename"] or job["transpose"]:
        publish(directory / "hf", job["rename"], job["transpose"])
    tokens = np.random.default_rng(job["seed"]).integers(3, job["tokens"], (job["batch"], job["length"]))
    recorder = Recorder()
    recorder.watch(model)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    arrays = {"tokens": tokens, "logits": logits.float().numpy(), **recorder.arrays}
    np.savez(directory / "expected.npz", **arrays)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    (directory / "transformers.json").write_text(json.dumps(versions), encoding="utf-8")


def main() -> int:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    path = Path(sys.argv[1])
    try:
        run(json.loads(path.read_text(encoding="utf-8")), path.parent)
    except Exception as error:
        traceback.print_exc()
        (path.parent / "error.transformers").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

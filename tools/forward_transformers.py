"""Makes the tiny checkpoints of `forward.py` and states what the Hub's models compute with them.

    python forward_transformers.py CASES WORKDIR

Runs where torch and transformers are; imports nothing of this repository. CASES is the JSON list that `forward.py`
writes. For each case this leaves WORKDIR/<name>/hf, as `save_pretrained` writes it, and WORKDIR/<name>/expected.npz
with `tokens` and `logits`, or the file WORKDIR/<name>/error. Everything is float32, attention is `eager`: plain matrix
products and a softmax.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file


def configuration(architecture: Any, fields: dict[str, Any]) -> Any:
    return architecture.config_class(**fields, dtype="float32", attn_implementation="eager")


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

    def turned(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(-1, -2).contiguous() if transposed and re.search(transposed, name) else tensor

    for file in directory.glob("*.safetensors"):
        tensors = {renamed(name): turned(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"] = {renamed(name): file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content), encoding="utf-8")


def run(case: dict[str, Any], directory: Path) -> None:
    seed = zlib.crc32(case["name"].encode())
    torch.manual_seed(seed)
    architecture = getattr(transformers, case["architecture"])
    model = architecture(configuration(architecture, case["config"])).float().eval()
    randomise(model, seed)
    tokens = np.random.default_rng(seed).integers(3, case["tokens"], (case["batch"], case["length"]))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(directory / "hf", max_shard_size=total // 3)
    if case["rename"] or case["transpose"]:
        publish(directory / "hf", case["rename"], case["transpose"])
    np.savez(directory / "expected.npz", tokens=tokens, logits=logits.float().numpy())


def main() -> int:
    transformers.utils.logging.disable_progress_bar()
    cases, work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    for case in cases:
        directory = work / case["name"]
        directory.mkdir(parents=True, exist_ok=True)
        try:
            run(case, directory)
            print(f"{case['name']}: checkpoint made", file=sys.stderr)
        except Exception as error:  # one case must not take the others with it
            (directory / "error").write_text(f"transformers: {type(error).__name__}: {error}", encoding="utf-8")
            (directory / "transformers.log").write_text(traceback.format_exc(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

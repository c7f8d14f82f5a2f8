"""The way a script does it: every tensor in numpy, stacked and transposed in memory, then saved by Orbax. For `tools/bench.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import orbax.checkpoint as ocp
from safetensors import safe_open


def main() -> None:
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    layers = 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("model.layers."))

    def stacked(name: str, transpose: bool) -> np.ndarray:
        parts = [tensors[f"model.layers.{i}.{name}.weight"] for i in range(layers)]
        return np.stack([p.T if transpose else p for p in parts], axis=1)

    kernels = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    tree = {
        "embedding": tensors["model.embed_tokens.weight"],
        "logits": np.ascontiguousarray(tensors["lm_head.weight"].T),
        "norm": tensors["model.norm.weight"],
        **{n.replace(".", "_"): stacked(n, True) for n in kernels},
        **{n: stacked(n, False) for n in ("input_layernorm", "post_attention_layernorm")},
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(output.absolute() / "0", {"params": tree})


if __name__ == "__main__":
    main()

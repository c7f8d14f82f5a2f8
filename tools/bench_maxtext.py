"""MaxText's own converter on a generated checkpoint, for `bench.py`; runs where MaxText is and imports nothing of this repository.

    python bench_maxtext.py SOURCE OUTPUT

This is `maxtext.checkpoint_conversion.to_maxtext` with its default options (tensors loaded lazily, 16 simulated devices,
bfloat16), as its command line runs it, for the Llama of `make_checkpoint.py`. The converter knows sizes from its own
table of models and from MaxText's settings, so both are given those of SOURCE/config.json. Without torch the converter
reads tensors with numpy, as it does here if there is none; what torch would change was not measured. Nothing is asked
of a hub.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

MODEL = "llama3.1-8b"
DEVICES = 16  # the converter's default

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"


def settings(config: dict[str, Any], output: Path) -> list[str]:
    """MaxText's settings for the sizes of a Hub's config.json."""
    return [
        f"model_name={MODEL}",
        f"base_output_directory={output}",
        "override_model_config=true",
        f"base_emb_dim={config['hidden_size']}",
        f"base_num_query_heads={config['num_attention_heads']}",
        f"base_num_kv_heads={config['num_key_value_heads']}",
        f"base_mlp_dim={config['intermediate_size']}",
        f"base_num_decoder_layers={config['num_hidden_layers']}",
        f"head_dim={config['head_dim']}",
        f"vocab_size={config['vocab_size']}",
        "scan_layers=true",
        "hardware=cpu",
        "skip_jax_distributed_system=true",
    ]


def main() -> None:
    source, output = Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    import jax
    from maxtext.checkpoint_conversion import to_maxtext
    from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as the converter's own command line does
    to_maxtext.HF_MODEL_CONFIGS[MODEL].update(config)
    base = os.path.join(MAXTEXT_CONFIGS_DIR, "base.yml")
    to_maxtext.main(["to_maxtext", base, *settings(config, output)], hf_model_path=str(source))


if __name__ == "__main__":
    main()

"""Writes a random checkpoint of any size in the Hub's layout, for benchmarks and memory tests.

    python tools/make_checkpoint.py OUT --family llama --gigabytes 3

OUT receives `config.json`, `model-00001-of-0000N.safetensors`, … and `model.safetensors.index.json`, as
`save_pretrained` would have written them: the names of a `LlamaForCausalLM` or a `Qwen3MoeForCausalLM`, an
untied output layer, fewer key and value heads than query heads.

How the size is met: the widest model of the family that still has enough layers in the given bytes is chosen,
as many whole layers as fit beside a vocabulary of usual size are taken, and the vocabulary absorbs the rest.

Memory: all shapes are known before the first byte, so that each shard's header can be written first and the
data streamed after it. Values come from one block of normally distributed numbers (16 MB in bfloat16),
written in pieces, each from another place of the block: a repeat is too far from its original for a
compressor's window, and copying is all that a gigabyte costs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

GIGABYTE = 10**9
BLOCK_ELEMENTS = 1 << 23
STANDARD_DEVIATION = 0.02  # what transformers initialises with
USUAL_VOCABULARY = 128_000
VOCABULARY_SHARE = 0.2  # of the elements, at most: a small model has a small vocabulary
VOCABULARY_MULTIPLE = 64
DTYPES = {  # numpy's and torch's name -> numpy's type, safetensors' name
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float16": (np.dtype(np.float16), "F16"),
    "float32": (np.dtype(np.float32), "F32"),
}

Config = dict[str, Any]


@dataclass(frozen=True)
class Tensor:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))

    @property
    def is_norm(self) -> bool:
        """Whether it scales a normalised vector: such weights lie around one, not around zero."""
        return self.name.endswith("norm.weight")


@dataclass(frozen=True)
class Family:
    """An architecture: the widths it may have, widest first, and what a layer of it holds."""

    widths: tuple[Config, ...]
    fewest_layers: int
    mlp: Callable[[str, Config], Iterator[Tensor]]  # (prefix of the layer, config) -> its tensors after attention
    query_key_norm: bool


class BadRequest(Exception):
    """What was asked for cannot be written."""


def attention(prefix: str, config: Config, query_key_norm: bool) -> Iterator[Tensor]:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield Tensor(f"{prefix}.self_attn.q_proj.weight", (queries, hidden))
    yield Tensor(f"{prefix}.self_attn.k_proj.weight", (keys, hidden))
    yield Tensor(f"{prefix}.self_attn.v_proj.weight", (keys, hidden))
    yield Tensor(f"{prefix}.self_attn.o_proj.weight", (hidden, queries))
    if query_key_norm:
        yield Tensor(f"{prefix}.self_attn.q_norm.weight", (head,))
        yield Tensor(f"{prefix}.self_attn.k_norm.weight", (head,))


def gated(prefix: str, hidden: int, inner: int) -> Iterator[Tensor]:
    """The three matrices of a gated MLP."""
    yield Tensor(f"{prefix}.gate_proj.weight", (inner, hidden))
    yield Tensor(f"{prefix}.up_proj.weight", (inner, hidden))
    yield Tensor(f"{prefix}.down_proj.weight", (hidden, inner))


def dense_mlp(prefix: str, config: Config) -> Iterator[Tensor]:
    yield from gated(f"{prefix}.mlp", config["hidden_size"], config["intermediate_size"])


def expert_mlp(prefix: str, config: Config) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    yield Tensor(f"{prefix}.mlp.gate.weight", (config["num_experts"], hidden))
    for expert in range(config["num_experts"]):
        yield from gated(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])


def llama_width(hidden: int, head: int) -> Config:
    heads = hidden // head
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 // 2,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": head,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    }


def qwen3_moe_width(hidden: int, head: int, experts: int) -> Config:
    heads = hidden * 2 // head
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": hidden * 3,
        "moe_intermediate_size": hidden * 3 // 8,
        "num_experts": experts,
        "num_experts_per_tok": min(8, experts // 2),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 8),
        "head_dim": head,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    }


FAMILIES = {
    "llama": Family(
        widths=tuple(
            llama_width(hidden, head)
            for hidden, head in (
                *((4096, 128), (3072, 128), (2048, 128)),
                *((1024, 64), (512, 64), (256, 32), (128, 32), (64, 16)),  # for tests
            )
        ),
        fewest_layers=8,
        mlp=dense_mlp,
        query_key_norm=False,
    ),
    "qwen3_moe": Family(
        widths=tuple(
            qwen3_moe_width(hidden, head, experts)
            for hidden, head, experts in (
                *((2048, 128, 128), (2048, 128, 64), (2048, 128, 32)),
                *((1024, 64, 32), (512, 64, 16), (256, 32, 16), (128, 32, 8), (64, 16, 8)),  # for tests
            )
        ),
        fewest_layers=3,
        mlp=expert_mlp,
        query_key_norm=True,
    ),
}


def layer_tensors(family: Family, config: Config, layer: int) -> Iterator[Tensor]:
    prefix, hidden = f"model.layers.{layer}", config["hidden_size"]
    yield Tensor(f"{prefix}.input_layernorm.weight", (hidden,))
    yield from attention(prefix, config, family.query_key_norm)
    yield Tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,))
    yield from family.mlp(prefix, config)


def all_tensors(family: Family, config: Config) -> Iterator[Tensor]:
    """Every tensor of the model, in the order of its modules."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield Tensor("model.embed_tokens.weight", (vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        yield from layer_tensors(family, config, layer)
    yield Tensor("model.norm.weight", (hidden,))
    yield Tensor("lm_head.weight", (vocabulary, hidden))


def choose_config(family: Family, elements: int) -> Config:
    """The config of the widest model with about `elements` weights."""
    for width in family.widths:
        hidden = width["hidden_size"]
        layer = sum(tensor.elements for tensor in layer_tensors(family, width, 0))
        both_vocabularies = min(2 * hidden * USUAL_VOCABULARY, VOCABULARY_SHARE * elements)
        layers = int((elements - hidden - both_vocabularies) // layer)
        if layers >= family.fewest_layers:
            rows = (elements - hidden - layers * layer) / (2 * hidden)
            vocabulary = max(1, round(rows / VOCABULARY_MULTIPLE)) * VOCABULARY_MULTIPLE
            return {
                **width,
                "num_hidden_layers": layers,
                "vocab_size": vocabulary,
                "tie_word_embeddings": False,
            }
    raise BadRequest("The size is too small for this family: ask for more --gigabytes.")


def split_shards(tensors: Sequence[Tensor], limit: int, itemsize: int) -> list[list[Tensor]]:
    """Consecutive tensors that together stay below `limit` bytes; a larger tensor is a shard of its own."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size = tensor.elements * itemsize
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= size
    return shards


def header(tensors: Sequence[Tensor], type_name: str, itemsize: int) -> bytes:
    """A safetensors file up to its data: the length of the JSON, and the JSON padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.elements * itemsize
        entries[tensor.name] = {"dtype": type_name, "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Values:
    """Random bytes of weights, streamed out of one block."""

    def __init__(self, seed: int, dtype: np.dtype[Any]) -> None:
        self.random = np.random.default_rng(seed)
        noise = self.random.standard_normal(BLOCK_ELEMENTS, dtype=np.float32)
        noise *= STANDARD_DEVIATION
        self.dtype = dtype
        self.block = noise.astype(dtype)

    def write(self, tensor: Tensor, stream: BinaryIO) -> None:
        remaining = tensor.elements
        while remaining:
            begin = int(self.random.integers(BLOCK_ELEMENTS))
            piece = self.block[begin : begin + remaining]
            if tensor.is_norm:
                piece = (1 + piece.astype(np.float32)).astype(self.dtype)
            stream.write(piece.view(np.uint8).data)
            remaining -= len(piece)


def write_checkpoint(
    out: Path, family_name: str, gigabytes: float, shard_gigabytes: float, seed: int, dtype_name: str
) -> tuple[Config, int, int]:
    """Writes the checkpoint; its config, the number of shards, and the bytes of the tensors."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadRequest(f"{out} exists and is not an empty directory.")
    family = FAMILIES[family_name]
    dtype, type_name = DTYPES[dtype_name]
    config = choose_config(family, int(gigabytes * GIGABYTE / dtype.itemsize))
    config |= {"bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "torch_dtype": dtype_name}
    tensors = list(all_tensors(family, config))
    shards = split_shards(tensors, int(shard_gigabytes * GIGABYTE), dtype.itemsize)

    out.mkdir(parents=True, exist_ok=True)
    values = Values(seed, dtype)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        shard.sort(key=lambda tensor: tensor.name)  # as the safetensors library orders equal dtypes
        with open(out / name, "wb") as stream:
            stream.write(header(shard, type_name, dtype.itemsize))
            for tensor in shard:
                values.write(tensor, stream)
                weight_map[tensor.name] = name
    size = sum(tensor.elements for tensor in tensors) * dtype.itemsize
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
    write_json(out / "config.json", config)
    return config, len(shards), size


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_checkpoint.py",
        description="Write a random checkpoint of a given size in the Hub's layout.",
        epilog="A gigabyte is 10**9 bytes; the size is met within 5 percent. Equal arguments, equal bytes.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty directory")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama", help="default: llama")
    parser.add_argument("--gigabytes", type=positive, required=True, metavar="N", help="size of all tensors")
    parser.add_argument(
        "--shard-gigabytes", type=positive, default=1.0, metavar="N", help="most in one file (default: 1)"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random values (default: 0)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        config, shards, size = write_checkpoint(
            options.out,
            options.family,
            options.gigabytes,
            options.shard_gigabytes,
            options.seed,
            options.dtype,
        )
    except BadRequest as error:
        print(f"make_checkpoint.py: {error}", file=sys.stderr)
        return 1
    experts = f", {config['num_experts']} experts" if "num_experts" in config else ""
    print(f"{options.out}: {size / GIGABYTE:.3f} GB of {options.dtype} in {shards} shard{'s'[: shards != 1]}")
    print(
        f"{config['architectures'][0]}: {config['num_hidden_layers']} layers{experts}, hidden size "
        f"{config['hidden_size']}, vocabulary {config['vocab_size']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

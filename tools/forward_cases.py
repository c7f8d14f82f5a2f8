"""The cases of `forward.py`: for each, the same tiny model said twice, to transformers and to MaxText.

Sizes are small and, as far as the models allow, all different, so that no two axes can be confused unseen. What is not
a size (rotary bases and scalings, epsilons, activations, soft caps) is the published model's, or MaxText's where the
two differ; then a note says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    model: str  # ckptc's and MaxText's name
    architecture: str  # the class in transformers
    config: dict[str, Any]  # its configuration
    maxtext: list[str]  # MaxText's settings for the same sizes
    set: list[str] = field(default_factory=list)  # --set options of ckptc
    rename: list[tuple[str, str]] = field(default_factory=list)  # from what `save_pretrained` writes to the Hub's names
    transpose: str = ""  # a pattern of names, whose last two axes the Hub has the other way round
    layouts: tuple[str, ...] = ("scan", "unscan")
    tokens: int = 150  # token ids are below this
    batch: int = 2
    length: int = 32
    note: str = ""  # where the configuration is not the published one, so that both sides compute the same
    deviation: str = ""  # how MaxText's model is known to differ all the same, if it does


SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MAXTEXT = [
    "base_emb_dim=48",
    "base_mlp_dim=80",
    "base_num_decoder_layers=3",
    "base_num_query_heads=6",
    "base_num_kv_heads=2",
    "head_dim=20",
    "vocab_size=160",
]


def rope(theta: float, **others: Any) -> dict[str, Any]:
    return {"rope_theta": float(theta), "rope_type": "default", **others}


def yarn(theta: float, factor: float, **others: Any) -> dict[str, Any]:
    defaults = {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
    }
    return rope(theta, **{**defaults, **others})


def case(
    name: str,
    family: str,
    architecture: str,
    config: dict[str, Any],
    maxtext: list[str] | None = None,
    model: str = "",
    **others: Any,
) -> Case:
    """A case of the common sizes, where `config` and `maxtext` say no others. A wrapped text model brings its own."""
    config = config if "text_config" in config else {**SIZES, **config}
    return Case(name, family, model or name, architecture, config, [*MAXTEXT, *(maxtext or [])], **others)


# MaxText adds rows to the vocabulary of most models with tied embeddings, and scales those of Gemma by the root of the
# width: an exact number at 64.
TIED: dict[str, Any] = {"tie_word_embeddings": True, "vocab_size": 150}
PADDED = ["padded_vocab=160"]
GEMMA: dict[str, Any] = {
    **TIED,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA_MAXTEXT = ["base_emb_dim=64", "base_num_query_heads=4"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
QWEN = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_parameters": rope(1_000_000)}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
MOE_MAXTEXT = ["num_experts=4", "num_experts_per_tok=2", "base_moe_mlp_dim=28", "base_mlp_dim=28"]


def windows(pattern: str) -> list[str]:
    """`ssf` -> two layers of sliding attention and one of full attention."""
    return [{"s": "sliding_attention", "f": "full_attention", "l": "linear_attention"}[letter] for letter in pattern]


OLMO3_YARN = yarn(500_000, 8.0, original_max_position_embeddings=8192)
OLMO3 = {
    **LLAMA,
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 8,
    "num_key_value_heads": 6,
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": windows("sssfsssf"),
}
OLMO3_MAXTEXT = ["base_num_decoder_layers=8", "base_num_kv_heads=6", "head_dim=8", "sliding_window_size=8"]
DENSE = [
    case("llama2-7b", "llama2", "LlamaForCausalLM", {**LLAMA, "rope_parameters": rope(10_000)}),
    case("llama3-8b", "llama2", "LlamaForCausalLM", {**LLAMA, "rope_parameters": rope(500_000)}),
    case("llama3.1-8b", "llama3.1", "LlamaForCausalLM", {**LLAMA, "rope_parameters": rope(500_000, **LLAMA3)}),
    case(
        "llama3.3-70b",
        "llama2",
        "LlamaForCausalLM",
        {**LLAMA, "rope_parameters": rope(500_000, **LLAMA3)},
        deviation="MaxText scales rotary frequencies for models named llama3.1 only",
    ),
    # Therefore: the same with no scaling on either side, and the way the mapping recommends.
    case(
        "llama3.3-70b-unscaled",
        "llama2",
        "LlamaForCausalLM",
        {**LLAMA, "rope_parameters": rope(500_000)},
        model="llama3.3-70b",
        note="without Llama 3.1's scaling of rotary frequencies on either side",
    ),
    case(
        "llama3.3-70b-as-3.1",
        "llama3.1",
        "LlamaForCausalLM",
        {**LLAMA, "rope_parameters": rope(500_000, **LLAMA3)},
        model="llama3.1-70b-Instruct",
        note="Llama 3.3 as the mapping recommends it: by the name llama3.1-70b-Instruct",
    ),
    case(
        "mistral-7b",
        "mistral",
        "MistralForCausalLM",
        {**LLAMA, "rope_parameters": rope(1_000_000), "sliding_window": None},
        note="rotary base 1,000,000 and no sliding window, as of version 0.3: MaxText's configuration is for that",
    ),
    case(
        "gemma-2b",
        "gemma",
        "GemmaForCausalLM",
        {**GEMMA, "rope_parameters": rope(10_000)},
        GEMMA_MAXTEXT,
        set=PADDED,
    ),
    case(
        "gemma2-2b",
        "gemma2",
        "Gemma2ForCausalLM",
        {
            **GEMMA,
            "num_hidden_layers": 6,  # a layer of MaxText's is a pair of these
            "query_pre_attn_scalar": 20,
            "sliding_window": 8,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "rope_parameters": rope(10_000),
        },
        [*GEMMA_MAXTEXT, "sliding_window_size=8"],
        set=PADDED,
    ),
    case(
        "gemma3-4b",
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **SIZES,
                **GEMMA,
                "vocab_size": 160,
                "num_hidden_layers": 14,  # two cycles of six, and two left over
                "query_pre_attn_scalar": 20,
                "sliding_window": 8,
                "layer_types": windows("sssssfsssssfss"),
                "rope_parameters": {
                    "sliding_attention": rope(10_000),
                    "full_attention": rope(1_000_000, rope_type="linear", factor=8.0),
                },
            },
            "vision_config": {
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "image_size": 56,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
        [*GEMMA_MAXTEXT, "base_num_decoder_layers=14", "sliding_window_size=8"],
    ),
    case("qwen2.5-1.5b", "qwen2.5", "Qwen2ForCausalLM", {**QWEN, **TIED, "head_dim": 8}, ["head_dim=8"], set=PADDED),
    case("qwen2.5-7b", "qwen2.5", "Qwen2ForCausalLM", {**QWEN, "head_dim": 8}, ["head_dim=8"]),
    case("qwen3-0.6b", "qwen3", "Qwen3ForCausalLM", {**QWEN, **TIED}, set=PADDED),
    case("qwen3-8b", "qwen3", "Qwen3ForCausalLM", QWEN),
    case(
        "olmo3-7b",
        "olmo3",
        "Olmo3ForCausalLM",
        {**OLMO3, "rope_parameters": {"sliding_attention": OLMO3_YARN, "full_attention": OLMO3_YARN}},
        OLMO3_MAXTEXT,
        note="with YaRN in layers of sliding attention too, as in MaxText",
    ),
    case(
        "olmo3-7b-hub",
        "olmo3",
        "Olmo3ForCausalLM",
        {**OLMO3, "rope_parameters": {"sliding_attention": rope(500_000), "full_attention": OLMO3_YARN}},
        OLMO3_MAXTEXT,
        "olmo3-7b",
        deviation="MaxText has YaRN in every layer, transformers 5 only in those of full attention",
    ),
]

SPARSE = [
    case(
        "mixtral-8x7b",
        "mixtral",
        "MixtralForCausalLM",
        {
            **LLAMA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "rope_parameters": rope(1_000_000),
        },
        ["num_experts=4", "num_experts_per_tok=2", "base_moe_mlp_dim=80"],
    ),
    case(
        "qwen3-30b-a3b",
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        {**QWEN, **MOE, "norm_topk_prob": True, "rope_parameters": rope(10_000_000)},
        MOE_MAXTEXT,
    ),
    case(
        "gpt-oss-20b",
        "gpt-oss",
        "GptOssForCausalLM",
        {
            **LLAMA,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "intermediate_size": 28,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": windows("sfsf"),
            "rope_parameters": yarn(150_000, 32.0, truncate=False),
        },
        [*MOE_MAXTEXT, "head_dim=16", "base_num_decoder_layers=4", "sliding_window_size=8"],
    ),
]

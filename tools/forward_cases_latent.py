"""Cases of `forward.py`: DeepSeek's models and their kin, whose attention is latent or compressed."""

from __future__ import annotations

from typing import Any

from forward_cases import LLAMA, MOE_MAXTEXT, Case, case, yarn

LATENT: dict[str, Any] = {
    **LLAMA,
    "rms_norm_eps": 1e-6,
    "num_hidden_layers": 5,
    "num_key_value_heads": 6,
    "head_dim": 8,
    "moe_intermediate_size": 28,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "max_position_embeddings": 163840,
}
LATENT_MAXTEXT = [
    "base_num_decoder_layers=5",
    "base_num_kv_heads=6",
    "base_moe_mlp_dim=28",
    "num_experts=4",
    "num_experts_per_tok=2",
    "kv_lora_rank=20",
    "qk_nope_head_dim=12",
    "qk_rope_head_dim=8",
    "v_head_dim=14",
]
DEEPSEEK3 = {
    **LATENT,
    "q_lora_rank": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 2.5,
}
DEEPSEEK3_MAXTEXT = [*LATENT_MAXTEXT, "q_lora_rank=24", "first_num_dense_layers=2"]
DEEPSEEK4: dict[str, Any] = {
    **LLAMA,
    "hidden_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 12,
    "o_lora_rank": 6,
    "o_groups": 2,
    "index_head_dim": 10,
    "index_n_heads": 16,
    "index_topk": 4,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4],
    "num_hash_layers": 3,
    "intermediate_size": 28,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
    "sliding_window": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1048576,
}
DEEPSEEK4_MAXTEXT = [
    *MOE_MAXTEXT,
    "base_emb_dim=32",
    "base_num_decoder_layers=7",
    "base_num_query_heads=4",
    "base_num_kv_heads=1",
    "head_dim=16",
    "qk_rope_head_dim=8",
    "q_lora_rank=12",
    "o_lora_rank=6",
    "o_groups=2",
    "indexer_head_dim=10",
    "indexer_n_heads=16",
    "indexer_topk=4",
    "compress_ratios=[0,0,4,128,4,128,4]",
    "first_num_hash_layers=3",
    "sliding_window_size=8",
]


def deepseek2(name: str, q_lora_rank: int | None, scaling: float) -> Case:
    config = {
        **LATENT,
        "q_lora_rank": q_lora_rank,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": scaling,
        "topk_method": "greedy",
        "rope_parameters": yarn(10_000, 40.0, mscale=0.707, mscale_all_dim=0.707),
    }
    maxtext = [*LATENT_MAXTEXT, f"q_lora_rank={q_lora_rank or 0}", "first_num_dense_layers=1"]
    return case(name, "deepseek2", "DeepseekV2ForCausalLM", config, maxtext)


def deepseek32(name: str, topk: int, **others: str) -> Case:
    config = {
        **DEEPSEEK3,
        "index_topk": topk,
        "index_head_dim": 10,
        "index_n_heads": 16,  # with few, none may fire for several keys: a tie, which the two sides break differently
        "rope_parameters": yarn(10_000, 40.0, mscale=1.0, mscale_all_dim=1.0),
    }
    maxtext = [*DEEPSEEK3_MAXTEXT, f"indexer_topk={topk}", "indexer_head_dim=10", "indexer_n_heads=16"]
    return case(name, "deepseek3", "DeepseekV32ForCausalLM", config, maxtext, "deepseek3.2-671b", **others)


def deepseek4(name: str, parameters: dict[str, Any] | None, **others: str) -> Case:
    return case(
        name,
        "deepseek4",
        "DeepseekV4ForCausalLM",
        {**DEEPSEEK4, "rope_parameters": parameters},
        DEEPSEEK4_MAXTEXT,
        "deepseek4-284b",
        rename=[
            (r"^model\.embed_tokens", "embed"),
            (r"^model\.hc_head\.hc_", "hc_head_"),
            (r"^model\.", ""),
            (r"\.attn\.norm\.", ".attn.kv_norm."),
        ],
        length=256,  # a few of the longer windows that are compressed
        **others,
    )


LATENTS = [
    deepseek2("deepseek2-16b", None, 1.0),
    deepseek2("deepseek2-236b", 24, 16.0),
    case(
        "deepseek3-671b",
        "deepseek3",
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK3, "rope_parameters": yarn(10_000, 40.0, mscale=1.0, mscale_all_dim=1.0)},
        DEEPSEEK3_MAXTEXT,
    ),
    case(
        "deepseek3-671b-groups",
        "deepseek3",
        "DeepseekV3ForCausalLM",
        {
            **DEEPSEEK3,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": yarn(10_000, 40.0, mscale=1.0, mscale_all_dim=1.0),
        },
        [*DEEPSEEK3_MAXTEXT, "num_experts=8", "n_routing_groups=4", "topk_routing_group=2"],
        "deepseek3-671b",
        note="routing by groups of experts, as published: MaxText's configuration leaves it to its user to set",
    ),
    case(
        "kimi-k2-1t",
        "deepseek3",
        "DeepseekV3ForCausalLM",
        {
            **DEEPSEEK3,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.827,
            "rope_parameters": yarn(50_000, 32.0, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
        },
        [*DEEPSEEK3_MAXTEXT, "first_num_dense_layers=1"],
    ),
    deepseek32("deepseek3.2-671b", 8),
    deepseek32("deepseek3.2-671b-all", 32),
    deepseek4(
        "deepseek4-284b",
        None,
        note="without YaRN in compressed attention: MaxText has none there",
    ),
    deepseek4(
        "deepseek4-284b-hub",
        yarn(10_000, 16.0, original_max_position_embeddings=65536),
        deviation="MaxText has no YaRN in compressed attention",
    ),
]

"""More cases of `forward.py`: latent attention, hybrid stacks, and the text models inside multimodal ones."""

from __future__ import annotations

from typing import Any

from forward_cases import (
    GEMMA,
    GEMMA_MAXTEXT,
    LLAMA,
    LLAMA3,
    MOE,
    MOE_MAXTEXT,
    QWEN,
    SIZES,
    Case,
    case,
    rope,
    windows,
    yarn,
)

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
        "index_n_heads": 16,  # with few, no head may fire for several keys: a tie, which the two sides break differently
        "rope_parameters": yarn(10_000, 40.0, mscale=1.0, mscale_all_dim=1.0),
    }
    maxtext = [*DEEPSEEK3_MAXTEXT, f"indexer_topk={topk}", "indexer_head_dim=10", "indexer_n_heads=16"]
    return case(name, "deepseek3", "DeepseekV32ForCausalLM", config, maxtext, "deepseek3.2-671b", **others)


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
]

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
LATENTS += [
    case(
        "deepseek4-284b",
        "deepseek4",
        "DeepseekV4ForCausalLM",
        {**DEEPSEEK4, "rope_parameters": None},
        DEEPSEEK4_MAXTEXT,
        rename=[
            (r"^model\.embed_tokens", "embed"),
            (r"^model\.hc_head\.hc_", "hc_head_"),
            (r"^model\.", ""),
            (r"\.attn\.norm\.", ".attn.kv_norm."),
        ],
        length=256,  # a few of the longer windows that are compressed
        note="without YaRN in compressed attention: MaxText's configuration has none",
    ),
]

SCOUT: dict[str, Any] = {
    **SIZES,
    **LLAMA,
    "intermediate_size": 28,
    "intermediate_size_mlp": 80,
    "num_hidden_layers": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8,
}
LLAMA4_VISION = {
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 24,
    "projector_input_dim": 24,
    "projector_output_dim": 24,
}
LLAMA4_MAXTEXT = [
    "base_num_decoder_layers=8",
    "base_moe_mlp_dim=28",
    "num_experts=4",
    "num_experts_per_tok=1",
    "chunk_attn_window_size=8",
]
LLAMA4 = [
    case(
        "llama4-17b-16e",
        "llama4",
        "Llama4ForConditionalGeneration",
        {
            "text_config": {
                **SCOUT,
                "interleave_moe_layer_step": 1,
                "use_qk_norm": True,
                "rope_parameters": rope(500_000, **LLAMA3),
            },
            "vision_config": LLAMA4_VISION,
        },
        [*LLAMA4_MAXTEXT, "base_mlp_dim=28"],
    ),
    case(
        "llama4-17b-128e",
        "llama4",
        "Llama4ForConditionalGeneration",
        {
            "text_config": {
                **SCOUT,
                "interleave_moe_layer_step": 2,
                "use_qk_norm": False,
                "rope_parameters": rope(500_000),
            },
            "vision_config": LLAMA4_VISION,
        },
        LLAMA4_MAXTEXT,
    ),
]

QWEN_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 3,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "out_hidden_size": 48,
}
MROPE = rope(5_000_000, mrope_interleaved=True, mrope_section=[4, 2, 2])
VL_TEXT: dict[str, Any] = {**SIZES, **QWEN, "head_dim": 16, "rope_parameters": MROPE}
VL_VISION = {"vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]}}
VL_MAXTEXT = ["head_dim=16", "mrope_section=[4,2,2]"]
GATED_DELTA = {
    "num_hidden_layers": 8,
    "shared_expert_intermediate_size": 28,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": windows("lllflllf"),
}
GATED_DELTA_MAXTEXT = [
    *MOE_MAXTEXT,
    "base_num_decoder_layers=8",
    "gdn_conv_kernel_dim=4",
    "gdn_key_head_dim=6",
    "gdn_value_head_dim=10",
    "gdn_num_key_heads=2",
    "gdn_num_value_heads=4",
]
QWENS = [
    case(
        "qwen3-next-80b-a3b",
        "qwen3-next",
        "Qwen3NextForCausalLM",
        {
            **QWEN,
            **MOE,
            **GATED_DELTA,
            "head_dim": 16,
            "norm_topk_prob": True,
            "rope_parameters": rope(10_000_000, partial_rotary_factor=0.25),
        },
        [*GATED_DELTA_MAXTEXT, "head_dim=16"],
    ),
    case(
        "qwen3.5-35b-a3b",
        "qwen3.5",
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": {
                **SIZES,
                **QWEN,
                **MOE,
                **GATED_DELTA,
                "head_dim": 24,
                "rope_parameters": rope(
                    10_000_000,
                    partial_rotary_factor=0.25,
                    mrope_interleaved=True,
                    mrope_section=[1, 1, 1],
                ),
            },
            "vision_config": QWEN_VISION,
            "tie_word_embeddings": False,
        },
        [*GATED_DELTA_MAXTEXT, "head_dim=24", "mrope_section=[1,1,1]"],
    ),
    case(
        "qwen3-vl-2b",
        "qwen3-vl",
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**VL_TEXT, "tie_word_embeddings": True}, **VL_VISION, "tie_word_embeddings": True},
        VL_MAXTEXT,
        layouts=("unscan",),
    ),
    case(
        "qwen3-vl-30b-a3b",
        "qwen3-vl",
        "Qwen3VLMoeForConditionalGeneration",
        {"text_config": {**VL_TEXT, **MOE}, **VL_VISION, "tie_word_embeddings": False},
        [*VL_MAXTEXT, *MOE_MAXTEXT],
        transpose=r"mlp\.experts\.",  # transformers 5 keeps them as matrices of other models, and saves them so
        layouts=("unscan",),
    ),
    case(
        "weaver-mini",
        "weaver",
        "Qwen3VLForConditionalGeneration",
        {"text_config": VL_TEXT, **VL_VISION, "tie_word_embeddings": False},
        VL_MAXTEXT,
        rename=[
            (r"^model\.(language_model|visual)\.", ""),
            (r"\.([qkv])_proj\.", r".to_\1."),
            (r"\.o_proj\.", ".to_out."),
            (r"\.([qk])_norm\.", r".norm_\1."),
        ],
        layouts=("unscan",),
        note="transformers has no Weaver class: this is Qwen 3 VL's under Weaver's names",
    ),
    case(
        "qwen3-omni-30b-a3b",
        "qwen3-omni",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "text_config": {**VL_TEXT, **MOE, "rope_parameters": {**MROPE, "rope_theta": 1_000_000.0}},
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
            "audio_config": {
                "d_model": 20,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 36,
                "num_mel_bins": 16,
                "downsample_hidden_size": 12,
                "output_dim": 48,
            },
        },
        [*VL_MAXTEXT, *MOE_MAXTEXT, "use_audio=false"],
        layouts=("unscan",),
        note="the thinker alone",
    ),
]

GEMMA4: dict[str, Any] = {
    **SIZES,
    **GEMMA,
    "vocab_size": 160,
    "num_hidden_layers": 12,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 8,
    "layer_types": windows("sssssfsssssf"),
    "vocab_size_per_layer_input": 160,
    "rope_parameters": {
        "sliding_attention": rope(10_000),
        "full_attention": rope(1_000_000, rope_type="proportional", partial_rotary_factor=0.25),
    },
}
GEMMA4_OTHERS: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 16,
    },
    "audio_config": None,
}
GEMMA4_MAXTEXT = [
    *GEMMA_MAXTEXT,
    "base_num_decoder_layers=12",
    "head_dim=8",
    "global_head_dim=16",
    "sliding_window_size=8",
]
GEMMA4S = [
    case(
        "gemma4-31b",
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {"text_config": GEMMA4, **GEMMA4_OTHERS},
        [*GEMMA4_MAXTEXT, "global_num_kv_heads=1"],
    ),
    case(
        "gemma4-26b",
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {
                **GEMMA4,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 28,
            },
            **GEMMA4_OTHERS,
        },
        [*GEMMA4_MAXTEXT, "global_num_kv_heads=1", "num_experts=4", "num_experts_per_tok=2", "base_moe_mlp_dim=28"],
    ),
    case(
        "gemma4-e2b",
        "gemma4-small",
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {
                **GEMMA4,
                "num_hidden_layers": 10,
                "num_key_value_heads": 1,
                "num_global_key_value_heads": None,
                "attention_k_eq_v": False,
                "hidden_size_per_layer_input": 12,
                "num_kv_shared_layers": 5,
                "use_double_wide_mlp": True,
                "layer_types": windows("ssssfssssf"),
            },
            **GEMMA4_OTHERS,
        },
        [
            *GEMMA4_MAXTEXT,
            "base_num_decoder_layers=10",
            "base_num_kv_heads=1",
            "num_kv_shared_layers=5",
            "hidden_size_per_layer_input=12",
            "vocab_size_per_layer_input=160",
        ],
        layouts=("unscan",),
    ),
]

WIDE = [*LATENTS, *LLAMA4, *QWENS, *GEMMA4S]

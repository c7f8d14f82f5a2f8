"""Cases of `forward.py`: hybrid stacks, and the text models inside multimodal ones."""

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
    case,
    rope,
    windows,
)

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
        note="rounding shows in the chunked delta rule: transformers differs by as much from its own recurrent one",
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
GEMMA4_SMALL: dict[str, Any] = {
    **GEMMA4,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 12,
}
GEMMA4_SMALL_MAXTEXT = [*GEMMA4_MAXTEXT, "hidden_size_per_layer_input=12", "vocab_size_per_layer_input=160"]
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
                **GEMMA4_SMALL,
                "num_hidden_layers": 10,
                "num_key_value_heads": 1,
                "num_kv_shared_layers": 5,
                "use_double_wide_mlp": True,
                "layer_types": windows("ssssfssssf"),
            },
            **GEMMA4_OTHERS,
        },
        [*GEMMA4_SMALL_MAXTEXT, "base_num_decoder_layers=10", "base_num_kv_heads=1", "num_kv_shared_layers=5"],
        layouts=("unscan",),
    ),
    case(
        "gemma4-e4b",
        "gemma4-small",
        "Gemma4ForConditionalGeneration",
        {"text_config": {**GEMMA4_SMALL, "num_kv_shared_layers": 6}, **GEMMA4_OTHERS},
        [*GEMMA4_SMALL_MAXTEXT, "num_kv_shared_layers=6"],
        layouts=("unscan",),
    ),
]

WRAPPED = [*LLAMA4, *QWENS, *GEMMA4S]

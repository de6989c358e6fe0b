"""Small configs of towers around a decoder, where a class has several: their sizes, and counts that differ from its."""

from __future__ import annotations

from typing import Any

SMALL_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
SMALL_TALKER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_OMNI: dict[str, Any] = {
    "thinker_config": {
        "vision_config": {**SMALL_VISION, "deepstack_visual_indexes": [0]},
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": 64,
            "downsample_hidden_size": 8,
            "num_hidden_layers": 1,
        },
    },
    "talker_config": {
        "text_config": {**SMALL_TALKER, "num_local_experts": 5, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
        | {"shared_expert_intermediate_size": 16},
        "code_predictor_config": {**SMALL_TALKER, "num_code_groups": 4},
        "thinker_hidden_size": 64,
        "spatial_merge_size": 2,
        "num_code_groups": 4,
    },
    "code2wav_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "codebook_size": 16,
        "decoder_dim": 32,
        "num_quantizers": 4,
    },
}

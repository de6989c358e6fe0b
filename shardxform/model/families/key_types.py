"""What transformers takes as values of config keys that several families share, by what the keys are about.

Beside `base.TYPES`, which all families take; a test compares each family with its config class.
"""

from __future__ import annotations

from typing import Final

__all__ = ["INDEXER", "LATENT", "LINEAR", "MULTIMODAL", "ROUTED", "STREAMS", "TOWER", "VIDEO"]

INDEXER: Final = {"index_head_dim": "int", "index_n_heads": "int", "index_topk": "int"}
"""An indexer that chooses what a token attends to."""

LATENT: Final = {"kv_lora_rank": "int", "qk_nope_head_dim": "int", "qk_rope_head_dim": "int"}
"""Latent attention."""

LINEAR: Final = {
    "linear_conv_kernel_dim": "int",
    "linear_key_head_dim": "int",
    "linear_num_key_heads": "int",
    "linear_num_value_heads": "int",
    "linear_value_head_dim": "int",
}
"""Gated delta-net layers."""

ROUTED: Final = {
    "n_group": "int",
    "n_routed_experts": "int",
    "n_shared_experts": "int",
    "norm_topk_prob": "bool",
    "routed_scaling_factor": "float",
    "topk_group": "int",
}
"""Experts in groups, as DeepSeek has them."""

STREAMS: Final = {"hc_eps": "float", "hc_mult": "int", "hc_sinkhorn_iters": "int", "swiglu_limit": "float"}
"""Several residual streams."""

TOWER: Final = {
    "hidden_act": "str",
    "hidden_size": "int",
    "initializer_range": "float",
    "intermediate_size": "int",
    "rope_parameters": "object or null",
}
"""A vision tower, in its own config."""

VIDEO: Final = {
    **TOWER,
    "depth": "int",
    "in_channels": "int",
    "num_heads": "int",
    "out_hidden_size": "int",
    "patch_size": "int or list of int",
    "spatial_merge_size": "int",
    "temporal_patch_size": "int or list of int",
}
"""A tower of Qwen's kind, which takes patches of several frames together."""

MULTIMODAL: Final = {
    "image_token_id": "int",
    "text_config": "object or null",
    "tie_word_embeddings": "bool",
    "vision_config": "object or null",
}
"""The top level of a config that nests those of text and vision."""

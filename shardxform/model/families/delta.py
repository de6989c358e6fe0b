"""What families of Kimi delta attention and latent attention share."""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import TYPES, Condition, Config, tied, untied

__all__ = ["LATENT_SYMBOLS", "LATENT_TYPES", "UNREAD", "delta_conditions"]

UNREAD: Final = "transformers does not put the convolutions of a quantized checkpoint together"
"""Its loader for compressed-tensors fails over it, and that of auto-round leaves them at random values."""
LATENT_SYMBOLS: Final = {
    "F": "intermediate_size",
    "H": "hidden_size",
    "I": "moe_intermediate_size",
    "KA": "kv_lora_rank",
    "N": "qk_nope_head_dim",
    "NS": "num_shared_experts",
    "Q": "num_attention_heads",
    "QA": "q_lora_rank",
    "R": "qk_rope_head_dim",
    "V": "vocab_size",
    "VD": "v_head_dim",
}
LATENT_TYPES: Final = {
    **TYPES,
    "intermediate_size": "int",
    "kv_lora_rank": "int",
    "layer_types": "list of str or null",
    "mlp_layer_types": "list of str or null",
    "num_experts": "int",
    "num_key_value_heads": "int or null",
    "num_shared_experts": "int",
    "pretraining_tp": "int or null",
    "qk_nope_head_dim": "int",
    "qk_rope_head_dim": "int",
    "routed_scaling_factor": "float",
}


def delta_conditions(is_latent: Condition, is_moe: Condition) -> dict[str, Condition]:
    """Name what is asked of a block of delta attention and latent attention, of experts and dense ones."""

    def has_query_rank(config: Config, layer: int) -> bool:
        return is_latent(config, layer) and config.get("q_lora_rank") is not None

    return {
        "delta": lambda config, layer: not is_latent(config, layer),
        "dense": lambda config, layer: not is_moe(config, layer),
        "full query": lambda config, layer: is_latent(config, layer) and not has_query_rank(config, layer),
        "latent": is_latent,
        "latent bias": lambda config, layer: is_latent(config, layer) and bool(config.get("attention_bias")),
        "moe": is_moe,
        "query rank": has_query_rank,
        "query rank bias": lambda config, layer: has_query_rank(config, layer) and bool(config.get("attention_bias")),
        "tied": tied,
        "untied": untied,
    }

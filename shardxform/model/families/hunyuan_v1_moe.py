"""Hunyuan-A13B: grouped-query attention with norms of heads, a shared MLP, a softmax router, no dense layer.

Names and shapes from transformers' `hunyuan_v1_moe`. Releases give experts per token, and widths, as lists of one entry
per layer, all the same.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    NORMS,
    Config,
    Family,
    Template,
    Wrapper,
    conditions,
    experts,
    merged,
    mlp,
    size,
    types,
)

__all__ = ["FAMILY"]


def _first(config: Config, key: str, default: int) -> int:
    """A size that may be absent, or a list of the same for every layer."""
    value = config.get(key)
    return default if value is None else size({key: value[0] if isinstance(value, list) else value}, key)


def _width(config: Config) -> int:
    return _first(config, "moe_intermediate_size", size(config, "intermediate_size"))


def _shared_width(config: Config) -> int:
    return size(config, "intermediate_size") * _first(config, "num_shared_expert", 1)


FAMILY: Final = Family(
    name="hunyuan_v1_moe",
    wrappers=(Wrapper("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    top_k_key="moe_topk",
    listed_counts=True,
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *ATTENTION,
        Template("self_attn.query_layernorm.weight", "D", "norms"),
        Template("self_attn.key_layernorm.weight", "D", "norms"),
        Template("mlp.gate.wg.weight", "E,H", "router"),
        *experts(),
        *mlp("mlp.shared_mlp", "S", "shared experts"),
    ),
    symbols={**HEADS, "I": _width, "S": _shared_width},
    types=types(
        "moe_intermediate_size",
        "num_experts_per_tok",
        eod_token_id="int or null",  # noqa: S106
        head_dim="int or null",
        intermediate_size="int",
        moe_topk="int or list of int",
        num_experts="int",
        num_key_value_heads="int or null",
        pretraining_tp="int",
        sep_token_id="int or null",  # noqa: S106
    ),
    conditions=conditions(),
    keep_16bit=("mlp.gate.wg",),
    merged=merged("mlp.shared_mlp"),
)

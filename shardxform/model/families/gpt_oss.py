"""gpt-oss: experts stacked and transposed, gate and up projection interleaved, biases everywhere, attention sinks.

Names and shapes of its 16-bit form, from transformers' `gpt_oss`; the release itself stores experts in MXFP4.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    NORMS,
    ExpertLayout,
    Family,
    Template,
    Wrapper,
    conditions,
    experts,
    merged,
    types,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(transposed=True, gate="interleaved", bias=True)

FAMILY: Final = Family(
    name="gpt_oss",
    wrappers=(Wrapper("GptOssForCausalLM", "gpt_oss", None, "model."),),
    count_keys=("num_local_experts", "num_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *ATTENTION,
        Template("self_attn.sinks", "Q", "attention"),
        Template("mlp.router.weight", "E,H", "router"),
        Template("mlp.router.bias", "E", "router"),
        *experts(layout=_EXPERTS),
    ),
    experts=_EXPERTS,
    symbols={**HEADS, "KV": "num_key_value_heads", "D": "head_dim", "I": "intermediate_size"},
    types=types(
        "moe_intermediate_size",
        head_dim="int",
        intermediate_size="int",
        layer_types="list of str or null",
        num_local_experts="int",
        router_aux_loss_coef="float",
        sliding_window="int or null",
        swiglu_alpha="float",
        swiglu_limit="float",
    ),
    conditions={**conditions(), "attention bias": lambda config, _layer: bool(config.get("attention_bias", True))},
    keep_16bit=("mlp.router",),
    formats=("auto-round",),  # whose loader alone takes experts one by one, with their biases
    merged=merged(),
)

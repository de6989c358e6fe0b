"""gpt-oss: experts stacked and transposed, gate and up projection interleaved, biases everywhere, attention sinks.

Names and shapes of its 16-bit form, from transformers' `gpt_oss`; the release itself stores experts in MXFP4.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    NORMS,
    TYPES,
    ExpertLayout,
    Family,
    Template,
    Wrapper,
    experts,
    tied,
    untied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(transposed=True, gate="interleaved", bias=True)

_ATTENTION: Final = tuple(
    Template(f"self_attn.{name}", shape, "attention")
    for name, shape in (
        ("q_proj.weight", "Q*D,H"),
        ("k_proj.weight", "KV*D,H"),
        ("v_proj.weight", "KV*D,H"),
        ("o_proj.weight", "H,Q*D"),
        ("sinks", "Q"),
    )
)
_BIASES: Final = tuple(
    Template(f"self_attn.{name}.bias", shape, "attention", "attention bias")
    for name, shape in (("q_proj", "Q*D"), ("k_proj", "KV*D"), ("v_proj", "KV*D"), ("o_proj", "H"))
)

FAMILY: Final = Family(
    name="gpt_oss",
    wrappers=(Wrapper("GptOssForCausalLM", "gpt_oss", None, "model."),),
    count_keys=("num_local_experts", "num_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *_ATTENTION,
        *_BIASES,
        Template("mlp.router.weight", "E,H", "router"),
        Template("mlp.router.bias", "E", "router"),
        *experts(layout=_EXPERTS),
    ),
    experts=_EXPERTS,
    symbols={
        "D": "head_dim",
        "H": "hidden_size",
        "I": "intermediate_size",
        "KV": "num_key_value_heads",
        "Q": "num_attention_heads",
        "V": "vocab_size",
    },
    types={
        **{key: value for key, value in TYPES.items() if key != "moe_intermediate_size"},
        "head_dim": "int",
        "intermediate_size": "int",
        "layer_types": "list of str or null",
        "num_local_experts": "int",
        "router_aux_loss_coef": "float",
        "sliding_window": "int or null",
        "swiglu_alpha": "float",
        "swiglu_limit": "float",
    },
    conditions={
        "attention bias": lambda config, _layer: bool(config.get("attention_bias", True)),
        "tied": tied,
        "untied": untied,
    },
    keep_16bit=("mlp.router",),
    formats=("auto-round",),  # whose loader alone takes experts one by one, with their biases
    merged={"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
)

"""Granite-MoE: stacks called `input_linear` and `output_linear`, softmax over the experts that were chosen.

Names and shapes from releases of Granite 3 and transformers' `granitemoe`, whose modules have other names. The entries
of `granitemoeshared` and `granitemoehybrid` are made of this one.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    NORMS,
    TYPES,
    Config,
    ExpertLayout,
    Family,
    Template,
    Wrapper,
    experts,
    size,
    tied,
    untied,
)

__all__ = ["FAMILY", "SHARED_MLP", "attention"]

_EXPERTS: Final = ExpertLayout(
    home="block_sparse_moe.experts", stacks=("input_linear", "output_linear"), stack_home="block_sparse_moe"
)

SHARED_MLP: Final = (
    Template("shared_mlp.input_linear.weight", "2*S,H", "shared experts", "shared"),
    Template("shared_mlp.output_linear.weight", "H,S", "shared experts", "shared"),
)


def attention(when: str = "") -> tuple[Template, ...]:
    """Grouped-query attention in the blocks that `when` names; with biases in those that it names with " bias"."""
    biased = f"{when} bias".lstrip()
    return (
        Template("self_attn.q_proj.weight", "H,H", "attention", when),
        Template("self_attn.k_proj.weight", "KV*D,H", "attention", when),
        Template("self_attn.v_proj.weight", "KV*D,H", "attention", when),
        Template("self_attn.o_proj.weight", "H,H", "attention", when),
        *(Template(f"self_attn.{name}_proj.bias", "H", "attention", biased) for name in "qo"),
        *(Template(f"self_attn.{name}_proj.bias", "KV*D", "attention", biased) for name in "kv"),
    )


def _heads(config: Config) -> int:
    key = "num_attention_heads" if config.get("num_key_value_heads") is None else "num_key_value_heads"
    return size(config, key)


def _head_dim(config: Config) -> int:
    return size(config, "hidden_size") // size(config, "num_attention_heads")


FAMILY: Final = Family(
    name="granitemoe",
    wrappers=(Wrapper("GraniteMoeForCausalLM", "granitemoe", None, "model."),),
    count_keys=("num_local_experts",),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *attention(),
        Template("block_sparse_moe.router.layer.weight", "E,H", "router"),
        *experts(layout=_EXPERTS),
    ),
    experts=_EXPERTS,
    renames=(
        ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
        ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
        ("block_sparse_moe.router.layer.", "block_sparse_moe.router."),
    ),
    symbols={"D": _head_dim, "H": "hidden_size", "I": "intermediate_size", "KV": _heads, "V": "vocab_size"},
    types={
        **{key: value for key, value in TYPES.items() if key != "moe_intermediate_size"},
        "attention_dropout": "float or int or null",
        "attention_multiplier": "float or int or null",
        "embedding_multiplier": "float or int or null",
        "intermediate_size": "int",
        "logits_scaling": "float or int or null",
        "num_experts_per_tok": "int or null",
        "num_key_value_heads": "int or null",
        "num_local_experts": "int or null",
        "output_router_logits": "bool or null",
        "residual_multiplier": "float or int or null",
        "router_aux_loss_coef": "float or null",
    },
    conditions={
        "bias": lambda config, _layer: bool(config.get("attention_bias")),
        "tied": tied,
        "untied": untied,
    },
    keep_16bit=("block_sparse_moe.router.layer",),
    formats=("auto-round",),  # the loader of compressed-tensors has no names for experts one by one
    fused_release=True,
    merged={"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
)

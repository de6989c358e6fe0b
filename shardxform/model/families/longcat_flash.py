"""LongCat-Flash: two attentions and two dense MLPs a block, experts beside them, and some that hand on their input.

Names and shapes from the release of LongCat-Flash-Chat and transformers' `longcat_flash`. The router's last rows, of
`zero_expert_num` experts without weights, stay when experts go. MTP layers hold no experts and are copied.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    TYPES,
    Config,
    ExpertLayout,
    Family,
    Template,
    Wrapper,
    experts,
    mlp,
    size,
    tied,
    untied,
)
from shardxform.model.families.key_types import LATENT

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(stacks=())
_OTHERS: Final = ("moe_intermediate_size", "num_experts_per_tok", "num_hidden_layers")


def _zeros(config: Config) -> int:
    return size(config, "zero_expert_num") if config.get("zero_expert_num") else 0


def _half(at: int) -> tuple[Template, ...]:
    attention = f"self_attn.{at}"
    return (
        Template(f"input_layernorm.{at}.weight", "H", "norms"),
        Template(f"post_attention_layernorm.{at}.weight", "H", "norms"),
        Template(f"{attention}.q_a_proj.weight", "QA,H", "attention"),
        Template(f"{attention}.q_a_layernorm.weight", "QA", "norms"),
        Template(f"{attention}.q_b_proj.weight", "Q*N+Q*R,QA", "attention"),
        Template(f"{attention}.kv_a_proj_with_mqa.weight", "KA+R,H", "attention"),
        Template(f"{attention}.kv_a_layernorm.weight", "KA", "norms"),
        Template(f"{attention}.kv_b_proj.weight", "Q*N+Q*VD,KA", "attention"),
        Template(f"{attention}.o_proj.weight", "H,Q*VD", "attention"),
        *mlp(f"mlps.{at}", "F", "dense mlp"),
    )


FAMILY: Final = Family(
    name="longcat_flash",
    wrappers=(Wrapper("LongcatFlashForCausalLM", "longcat_flash", None, "model."),),
    count_keys=("n_routed_experts", "num_local_experts"),
    top_k_key="moe_topk",
    layers="num_layers",
    root=EMBEDDINGS,
    block=(
        *_half(0),
        *_half(1),
        Template("mlp.router.classifier.weight", "E+Z,H", "router"),
        Template("mlp.router.e_score_correction_bias", "E+Z", "router"),
        *experts(layout=_EXPERTS),
    ),
    experts=_EXPERTS,
    towers=(Template("model.mtp.*", "?", "mtp", optional=True),),
    symbols={
        "F": "ffn_hidden_size",
        "H": "hidden_size",
        "I": "expert_ffn_hidden_size",
        "KA": "kv_lora_rank",
        "N": "qk_nope_head_dim",
        "Q": "num_attention_heads",
        "QA": "q_lora_rank",
        "R": "qk_rope_head_dim",
        "V": "vocab_size",
        "VD": "v_head_dim",
        "Z": _zeros,
    },
    types={
        **{key: value for key, value in TYPES.items() if key not in _OTHERS},
        **LATENT,
        "expert_ffn_hidden_size": "int",
        "ffn_hidden_size": "int",
        "head_dim": "int",
        "moe_topk": "int",
        "n_routed_experts": "int",
        "num_key_value_heads": "int or null",
        "num_layers": "int",
        "q_lora_rank": "int",
        "qk_head_dim": "int or null",
        "routed_scaling_factor": "float",
        "v_head_dim": "int",
        "zero_expert_num": "int",
    },
    conditions={"tied": tied, "untied": untied},
    keep_16bit=("mlp.router.classifier", "self_attn.*.kv_b_proj"),
    merged={
        f"self_attn.{at}.fused_qkv_a_proj": (f"self_attn.{at}.q_a_proj", f"self_attn.{at}.kv_a_proj_with_mqa")
        for at in (0, 1)
    }
    | {f"mlps.{at}.gate_up_proj": (f"mlps.{at}.gate_proj", f"mlps.{at}.up_proj") for at in (0, 1)},
    formats=("compressed-tensors",),  # transformers leaves experts of the others at random, and refuses any release
    not_run="its router also chooses experts that hand on their input as it is, and its experts are no module to run",
)

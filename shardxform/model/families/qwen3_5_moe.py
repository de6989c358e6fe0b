"""Qwen3.5-MoE and Qwen3.6-MoE: gated delta-net and full attention, fused experts, a vision tower, one MTP layer.

Names and shapes from the release of Qwen3.5-35B-A3B and transformers' `qwen3_5_moe`.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    EMBEDDINGS,
    GROUPED_ATTENTION,
    NORMS,
    TYPES,
    Config,
    Family,
    Mtp,
    Template,
    Wrapper,
    experts,
    mlp,
    size,
    tied,
    untied,
)
from shardxform.model.families.key_types import LINEAR, MULTIMODAL, VIDEO

__all__ = ["FAMILY"]


def _kind(config: Config, layer: int) -> str:
    types = config.get("layer_types")
    if types is None:
        interval = config.get("full_attention_interval", 4)
        return "linear_attention" if (layer + 1) % interval else "full_attention"
    if not isinstance(types, list) or (layer >= 0 and types[layer] not in ("linear_attention", "full_attention")):
        raise ValueError(f"layer_types: expected linear_attention or full_attention for layer {layer}")
    return str(types[layer])


def _query_rows(config: Config) -> int:
    gates = 2 if config.get("attn_output_gate", True) else 1  # each query head carries an output gate
    return gates * size(config, "num_attention_heads") * size(config, "head_dim")


def _first_full_attention(config: Config) -> int:
    layers = size(config, "num_hidden_layers")
    return next((layer for layer in range(layers) if _kind(config, layer) == "full_attention"), layers - 1)


_LINEAR_ATTENTION: Final = tuple(
    Template(f"linear_attn.{name}", shape, "linear attention", "linear attention")
    for name, shape in (
        ("in_proj_qkv.weight", "2*LK*DK+LV*DV,H"),
        ("in_proj_z.weight", "LV*DV,H"),
        ("in_proj_a.weight", "LV,H"),
        ("in_proj_b.weight", "LV,H"),
        ("out_proj.weight", "H,LV*DV"),
        ("conv1d.weight", "2*LK*DK+LV*DV,1,C"),
        ("A_log", "LV"),
        ("dt_bias", "LV"),
        ("norm.weight", "DV"),
    )
)

_VISION: Final = tuple(
    Template(f"model.visual.{name}", shape, "vision")
    for name, shape in (
        ("blocks.{b}.attn.proj.weight", "VH,VH"),
        ("blocks.{b}.attn.proj.bias", "VH"),
        ("blocks.{b}.attn.qkv.weight", "3*VH,VH"),
        ("blocks.{b}.attn.qkv.bias", "3*VH"),
        ("blocks.{b}.mlp.linear_fc1.weight", "VI,VH"),
        ("blocks.{b}.mlp.linear_fc1.bias", "VI"),
        ("blocks.{b}.mlp.linear_fc2.weight", "VH,VI"),
        ("blocks.{b}.mlp.linear_fc2.bias", "VH"),
        ("blocks.{b}.norm1.weight", "VH"),
        ("blocks.{b}.norm1.bias", "VH"),
        ("blocks.{b}.norm2.weight", "VH"),
        ("blocks.{b}.norm2.bias", "VH"),
        ("merger.linear_fc1.weight", "M*M*VH,M*M*VH"),
        ("merger.linear_fc1.bias", "M*M*VH"),
        ("merger.linear_fc2.weight", "VO,M*M*VH"),
        ("merger.linear_fc2.bias", "VO"),
        ("merger.norm.weight", "VH"),
        ("merger.norm.bias", "VH"),
        ("patch_embed.proj.weight", "?"),
        ("patch_embed.proj.bias", "VH"),
        ("pos_embed.weight", "VP,VH"),
    )
)

FAMILY: Final = Family(
    name="qwen3_5_moe",
    wrappers=(
        Wrapper(
            "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", "text_config", "model.language_model.", vision=True
        ),
        Wrapper("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", None, "model."),
    ),
    count_keys=("num_experts",),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *_LINEAR_ATTENTION,
        Template("self_attn.q_proj.weight", "QR,H", "attention", "attention"),
        *GROUPED_ATTENTION,
        Template("mlp.gate.weight", "E,H", "router"),
        *experts(),
        *mlp("mlp.shared_expert", "S", "shared experts"),
        Template("mlp.shared_expert_gate.weight", "1,H", "shared experts"),
    ),
    mtp=Mtp(
        count_key="mtp_num_hidden_layers",
        prefix="mtp.layers.{l}.",
        follows_blocks=False,
        like=_first_full_attention,
        inputs=(
            "mtp.pre_fc_norm_embedding.weight",
            "mtp.pre_fc_norm_hidden.weight",
            "mtp.fc.weight",
            "mtp.norm.weight",
        ),
        root=(
            Template("mtp.fc.weight", "H,2*H", "mtp"),
            Template("mtp.norm.weight", "H", "mtp"),
            Template("mtp.pre_fc_norm_embedding.weight", "H", "mtp"),
            Template("mtp.pre_fc_norm_hidden.weight", "H", "mtp"),
        ),
    ),
    vision=_VISION,
    vision_prefix="model.visual.",
    vision_sidecars=("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    symbols={
        "C": "linear_conv_kernel_dim",
        "D": "head_dim",
        "DK": "linear_key_head_dim",
        "DV": "linear_value_head_dim",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KV": "num_key_value_heads",
        "LK": "linear_num_key_heads",
        "LV": "linear_num_value_heads",
        "Q": "num_attention_heads",
        "QR": _query_rows,
        "S": "shared_expert_intermediate_size",
        "V": "vocab_size",
    },
    vision_symbols={
        "M": "spatial_merge_size",
        "VH": "hidden_size",
        "VI": "intermediate_size",
        "VO": "out_hidden_size",
        "VP": "num_position_embeddings",
    },
    types={
        **TYPES,
        **LINEAR,
        "head_dim": "int",
        "layer_types": "list of str or null",
        "num_experts": "int",
        "router_aux_loss_coef": "float",
        "shared_expert_intermediate_size": "int",
    },
    vision_types={
        **VIDEO,
        "num_position_embeddings": "int",
    },
    wrapper_types={
        **MULTIMODAL,
        "video_token_id": "int",
        "vision_end_token_id": "int",
        "vision_start_token_id": "int",
    },
    conditions={
        "attention": lambda config, layer: _kind(config, layer) == "full_attention",
        "attention bias": lambda config, layer: (
            bool(config.get("attention_bias")) and _kind(config, layer) == "full_attention"
        ),
        "linear attention": lambda config, layer: _kind(config, layer) == "linear_attention",
        "tied": tied,
        "untied": untied,
    },
    keep_16bit=("mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    merged={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "linear_attn.in_proj_qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        "linear_attn.in_proj_ba": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
        "mlp.shared_expert.gate_up_proj": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    },
    fused_release=True,
    bfloat16_only=True,
)

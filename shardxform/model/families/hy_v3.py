"""Hy3: grouped-query attention with norms of heads, a shared MLP, a sigmoid router with a bias, an MTP layer.

Names and shapes from the release and vLLM's `hy_v3_mtp`; transformers' `hy_v3` calls router, bias and shared MLP
otherwise.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    ATTENTION,
    EMBEDDINGS,
    HEADS,
    NORMS,
    QK_NORMS,
    Config,
    Family,
    Mtp,
    Role,
    Template,
    Wrapper,
    conditions,
    experts,
    is_sparse,
    merged,
    mlp,
    size,
    types,
)

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    return is_sparse(config, layer, dense=1)


def _biases(prefix: str, width: str, role: Role, when: str) -> tuple[Template, ...]:
    rows = (("gate_proj", width), ("up_proj", width), ("down_proj", "H"))
    return tuple(Template(f"{prefix}.{name}.bias", shape, role, when) for name, shape in rows)


FAMILY: Final = Family(
    name="hy_v3",
    wrappers=(Wrapper("HYV3ForCausalLM", "hy_v3", None, "model."),),
    count_keys=("num_experts", "num_local_experts"),
    root=EMBEDDINGS,
    block=(
        *NORMS,
        *ATTENTION,
        *QK_NORMS,
        Template("mlp.router.gate.weight", "E,H", "router", "moe"),
        Template("mlp.expert_bias", "E", "router", "moe"),
        *experts("moe"),
        *mlp("mlp.shared_mlp", "NS*I", "shared experts", "moe"),
        *mlp("mlp", "F", "dense mlp", "dense"),
        *_biases("mlp.shared_mlp", "NS*I", "shared experts", "shared bias"),
        *_biases("mlp", "F", "dense mlp", "dense bias"),
    ),
    renames=(
        ("mlp.router.gate.", "mlp.gate."),
        ("mlp.expert_bias", "mlp.e_score_correction_bias"),
        ("mlp.shared_mlp.", "mlp.shared_experts."),
    ),
    mtp=Mtp(
        count_key="num_nextn_predict_layers",
        prefix="{decoder}layers.{l}.",
        follows_blocks=True,
        like=lambda config: size(config, "num_hidden_layers"),
        inputs=(
            "{decoder}layers.{l}.enorm.weight",
            "{decoder}layers.{l}.hnorm.weight",
            "{decoder}layers.{l}.eh_proj.weight",
            "{decoder}layers.{l}.final_layernorm.weight",
        ),
        layer=(
            Template("enorm.weight", "H", "mtp"),
            Template("hnorm.weight", "H", "mtp"),
            Template("eh_proj.weight", "H,2*H", "mtp"),
            Template("final_layernorm.weight", "H", "mtp"),
            Template("embed_tokens.weight", "V,H", "mtp", optional=True),  # the model's own are taken
            Template("shared_head.weight", "V,H", "mtp", optional=True),
        ),
    ),
    symbols={**HEADS, "F": "intermediate_size", "I": "moe_intermediate_size", "NS": "num_shared_experts"},
    types=types(
        attention_dropout="float",
        enable_moe_fp32_combine="bool",
        head_dim="int",
        intermediate_size="int",
        mlp_bias="bool",
        mlp_layer_types="list of str or null",
        num_experts="int or null",
        num_experts_per_tok="int or null",
        num_shared_experts="int or null",
        router_scaling_factor="float",
    ),
    conditions={
        **conditions(_is_moe),
        "dense bias": lambda config, layer: bool(config.get("mlp_bias")) and not _is_moe(config, layer),
        "shared bias": lambda config, layer: bool(config.get("mlp_bias")) and _is_moe(config, layer),
    },
    moe="moe",
    keep_16bit=("mlp.router.gate",),
    merged=merged("mlp", "mlp.shared_mlp"),
)

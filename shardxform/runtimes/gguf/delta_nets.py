"""Families of llama.cpp with gated delta nets among their blocks: Qwen3.5-MoE, Qwen3-Next, Kimi-Linear."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Final

from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.architecture import Architecture, Kind, Part, stacks
from shardxform.runtimes.gguf.common_keys import (
    CORRECTED,
    SILU,
    UNBIASED,
    UNTIED,
    add_common,
    add_gating,
    add_sections,
    multiplier,
    refuse_large_epsilon,
    refuse_one_kind,
    refuse_values,
    rotated_channels,
    shared_experts,
)
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.gguf.latent_attention import latent_parts
from shardxform.runtimes.gguf.transforms import Order, Run, Transform
from shardxform.runtimes.rotation import rope_of

__all__ = ["DELTA_NETS"]


# -- Qwen3.5-MoE, Qwen3-Next -------------------------------------------------------------------------------------------


def _delta_net_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Keys of gated delta-net layers among others of full attention."""
    size, writer = architecture.size, recorder.writer
    add_common(architecture, recorder)
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_expert_shared_feed_forward_length(size("shared_expert_intermediate_size"))
    writer.add_ssm_conv_kernel(size("linear_conv_kernel_dim"))
    writer.add_ssm_state_size(size("linear_key_head_dim"))
    writer.add_ssm_group_count(size("linear_num_key_heads"))
    writer.add_ssm_time_step_rank(size("linear_num_value_heads"))
    writer.add_ssm_inner_size(size("linear_value_head_dim") * size("linear_num_value_heads"))
    kinds = architecture.config.get("layer_types")
    if kinds is not None:  # else llama.cpp tells them by the interval
        recurrent = [each == "linear_attention" for each in kinds] + [False] * architecture.nextn
        writer.add_array(f"{architecture.name}.attention.recurrent_layers", recurrent)
    writer.add_full_attention_interval(architecture.config.get("full_attention_interval", 4))
    partial = rope_of(architecture.config).get("partial_rotary_factor", 0.25)
    writer.add_rope_dimension_count(rotated_channels(architecture, partial))
    if architecture.nextn:
        writer.add_nextn_predict_layers(architecture.nextn)


def _qwen3_5_keys(architecture: Architecture, recorder: Recorder) -> None:
    _delta_net_keys(architecture, recorder)
    rope = rope_of(architecture.config)
    if "mrope_section" not in rope:
        add_sections(architecture, recorder, rope)


def _delta_net_check(architecture: Architecture) -> None:
    wanted = {**SILU, **UNBIASED, "norm_topk_prob": (True,), "attn_output_gate": (True,)}
    refuse_values(architecture, wanted)
    refuse_large_epsilon(architecture)
    refuse_one_kind(architecture, "linear attention")
    keys, values = (architecture.size(f"linear_{each}_head_dim") for each in ("key", "value"))
    if keys != values:
        raise SchemeError(
            f"config.json: linear_key_head_dim is {keys} and linear_value_head_dim {values}; llama.cpp runs one number"
        )


def _tiled(architecture: Architecture, width: int, before: int = 0) -> Order:
    """Rows or columns of value heads, `width` each after `before` others, from grouped by key head to tiled."""
    keys, values = architecture.size("linear_num_key_heads"), architecture.size("linear_num_value_heads")
    heads = Run(before, (keys, values // keys, width), (1, 0, 2))
    return Order((Run(0, (before,)), heads) if before else (heads,))


def _delta_net_transform(name: str) -> Transform | None:
    """What is done to a tensor of Qwen3-Next beside its projections."""
    if name.endswith("linear_attn.A_log"):
        return Transform(value="minus exp")
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return Transform(value="one more")
    return None


def _qwen3_5_parts(architecture: Architecture, name: str) -> tuple[Part, ...]:
    """Value heads are tiled over key heads, as ggml broadcasts them."""
    size = architecture.size
    transform = _delta_net_transform(name)
    if "linear_attn." not in name or size("linear_num_key_heads") == size("linear_num_value_heads"):
        return (Part(name, transform),)
    inner = name.partition("linear_attn.")[2]
    width, before = size("linear_value_head_dim"), 2 * size("linear_num_key_heads") * size("linear_key_head_dim")
    if inner in ("in_proj_qkv.weight", "conv1d.weight"):
        transform = Transform(rows=_tiled(architecture, width, before))
    elif inner == "in_proj_z.weight":
        transform = Transform(rows=_tiled(architecture, width))
    elif inner in ("in_proj_a.weight", "in_proj_b.weight", "dt_proj.bias"):
        transform = Transform(rows=_tiled(architecture, 1))
    elif inner == "A_log":
        transform = Transform(rows=_tiled(architecture, 1), value="minus exp")
    elif inner == "out_proj.weight":
        transform = Transform(columns=_tiled(architecture, width))
    return (Part(name, transform),)


_QWEN3_5_MOE: Final = Kind(
    name="qwen35moe",
    maps=("QWEN35MOE",),
    spelled={"linear_attn.dt_bias": "linear_attn.dt_proj.bias"},
    parts=_qwen3_5_parts,
    mtp="nextn",
    keys=_qwen3_5_keys,
    check=_delta_net_check,
)


def _qwen3_next_parts(architecture: Architecture, name: str) -> tuple[Part, ...]:
    """Queries, keys, values and gates stand by key head: those of all heads are brought together, gates apart."""
    block, _, inner = name.partition(".linear_attn.")
    if inner != "in_proj_qkvz.weight":
        return (Part(name, _delta_net_transform(name)),)
    size = architecture.size
    heads, width = size("linear_num_key_heads"), size("linear_key_head_dim")
    values = size("linear_num_value_heads") // heads * size("linear_value_head_dim")
    bounds = (0, width, 2 * width, 2 * width + values, 2 * (width + values))
    runs = [Run(0, (heads, bounds[-1]), (), ((0, heads), (start, stop))) for start, stop in itertools.pairwise(bounds)]
    block = block.replace("model.layers.", "blk.")
    joined = Part(f"{block}.attn_qkv.weight", Transform(rows=Order(tuple(runs[:3]))))
    return (joined, Part(f"{block}.attn_gate.weight", Transform(rows=Order(tuple(runs[3:])))))


_QWEN3_NEXT: Final = Kind(
    name="qwen3next",
    maps=("QWEN3NEXT",),
    spelled={"linear_attn.dt_bias": "linear_attn.dt_proj.bias"},
    parts=_qwen3_next_parts,
    mtp="nextn",
    keys=_delta_net_keys,
    check=_delta_net_check,
)


# -- Kimi-Linear -------------------------------------------------------------------------------------------------------


def _kimi_keys(architecture: Architecture, recorder: Recorder) -> None:
    """A block without heads of keys is one of delta attention; nothing is rotated, though a part of a head is apart."""
    size, writer, config = architecture.size, recorder.writer, architecture.config
    heads = [int(each) for each in architecture.which("latent")]
    over: dict[str, Any] = {"num_key_value_heads": heads, "head_dim": None, "n_group": None}
    if config.get("max_position_embeddings") is None:
        over["max_position_embeddings"] = size("model_max_length")
    add_common(architecture, recorder, rotated=False, latent=True, **over)
    writer.add_vocab_size(size("vocab_size"))
    writer.add_ssm_conv_kernel(architecture.sized("C"))
    writer.add_kda_head_dim(architecture.sized("LD"))
    if config.get("q_lora_rank") is not None:
        writer.add_q_lora_rank(size("q_lora_rank"))
    writer.add_kv_lora_rank(size("kv_lora_rank"))
    writer.add_rope_dimension_count(size("qk_rope_head_dim"))
    writer.add_key_length(size("kv_lora_rank") + size("qk_rope_head_dim"))
    writer.add_key_length_mla(size("qk_nope_head_dim") + size("qk_rope_head_dim"))
    writer.add_value_length_mla(size("v_head_dim"))
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_expert_shared_count(shared_experts(architecture, "num_shared_experts"))
    writer.add_leading_dense_block_count(architecture.leading_dense)
    writer.add_expert_weights_scale(multiplier(config, "routed_scaling_factor"))
    add_gating(writer, "SIGMOID")


def _kimi_check(architecture: Architecture) -> None:
    wanted: dict[str, tuple[object, ...]] = {"moe_renormalize": (True,), "moe_router_activation_func": ("sigmoid",)}
    wanted |= {"mla_use_nope": (True,), "num_expert_group": (1, None)}
    wanted |= {"norm_topk_prob": (True, None), "n_group": (1, None)}  # as transformers calls them too
    refuse_values(architecture, {**SILU, **UNBIASED, **UNTIED, **wanted})
    refuse_large_epsilon(architecture)
    heads = architecture.sized("LQ")
    if heads != architecture.size("num_attention_heads"):
        raise SchemeError(
            f"config.json: delta attention has {heads} heads and num_attention_heads is"
            f" {architecture.size('num_attention_heads')}; llama.cpp runs one number"
        )
    refuse_one_kind(architecture, "latent")


def _kimi_parts(architecture: Architecture, name: str) -> tuple[Part, ...]:
    """Convolutions and decay rates have the dimensions that llama.cpp broadcasts them by."""
    if name.endswith("_conv1d.weight"):
        channels = architecture.sized("LQ") * architecture.sized("LD")
        return (Part(name, leading=(1, channels)),)
    if name.endswith("self_attn.A_log"):
        return (Part(name, Transform(value="minus exp"), leading=(1, 1), seen=(architecture.sized("LQ"), 1)),)
    return latent_parts(architecture, name)


_KIMI_LINEAR: Final = Kind(
    name="kimi-linear",
    maps=("KIMI_LINEAR",),
    spelled={
        **CORRECTED,
        "self_attn.dt_bias": "self_attn.dt_proj.bias",
        **{f"block_sparse_moe.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    },
    experts=stacks("blk.{l}.ffn_{}_exps", gate=0, down=2, up=1),
    parts=_kimi_parts,
    leads_dense=True,
    keys=_kimi_keys,
    check=_kimi_check,
)


DELTA_NETS: Final[Mapping[str, Kind]] = {
    "kimi_linear": _KIMI_LINEAR,
    "qwen3_5_moe": _QWEN3_5_MOE,
    "qwen3_next": _QWEN3_NEXT,
}
"""What each family becomes, by its name."""

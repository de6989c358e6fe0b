"""The families that llama.cpp runs: how each becomes one of its architectures, as its own converter does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from shardxform.errors import SchemeError
from shardxform.model.layout import Layout
from shardxform.runtimes.gguf.architecture import Architecture, Kind, Part
from shardxform.runtimes.gguf.keys import Recorder, rope_of
from shardxform.runtimes.gguf.transforms import Order, Run, Transform

__all__ = ["KINDS", "architecture_of"]


# -- keys of all -------------------------------------------------------------------------------------------------------

_COUNTS: Final = (
    ("max_position_embeddings", "context_length"),
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "head_count"),
    ("num_key_value_heads", "head_count_kv"),
)


def _common(architecture: Architecture, recorder: Recorder, **over: Any) -> None:  # noqa: ANN401
    """Keys that every text model has; `over` are keys of the config that llama.cpp wants to be another."""
    config, writer = {**architecture.config, **over}, recorder.writer
    writer.add_block_count(architecture.blocks)
    for key, name in _COUNTS:
        if config.get(key) is not None:
            getattr(writer, f"add_{name}")(config[key])
    rope = rope_of(config)
    full = rope.get("full_attention", rope)
    _scaling(writer, full)
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0, 0, 0, 0][:4])
    if full.get("rope_theta") is None:
        raise SchemeError("config.json: rope_theta is missing")
    writer.add_rope_freq_base(full["rope_theta"])
    if (sliding := rope.get("sliding_attention", {}).get("rope_theta")) is not None:
        writer.add_rope_freq_base_swa(sliding)
    writer.add_layer_norm_rms_eps(_needed(config, "rms_norm_eps"))
    writer.add_expert_count(architecture.layout.num_experts)
    writer.add_expert_used_count(architecture.layout.top_k)
    if config.get("n_group") is not None:
        writer.add_expert_group_count(config["n_group"])
    if config.get("topk_group") is not None:
        writer.add_expert_group_used_count(config["topk_group"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _needed(config: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401
    """A value that must be there.

    Raises:
        SchemeError: it is not.

    """
    if config.get(key) is None:
        raise SchemeError(f"config.json: {key} is missing")
    return config[key]


def _scaling(writer: Any, rope: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Keys of the scaling of positions.

    Raises:
        SchemeError: a kind that llama.cpp's converter does not carry over.

    """
    kind = rope.get("rope_type") or "default"
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(_scaling_type(kind))
        writer.add_rope_scaling_factor(_needed(rope, "factor"))
    elif kind not in ("default", "proportional", "llama3"):  # the last two are tensors of factors
        raise SchemeError(f"config.json: rope_type {kind!r}; of llama.cpp's converter come default, linear and yarn")
    if kind != "yarn":
        return
    writer.add_rope_scaling_orig_ctx_len(_needed(rope, "original_max_position_embeddings"))
    for key, name in (
        ("extrapolation_factor", "ext_factor"),
        ("attention_factor", "attn_factor"),
        ("beta_fast", "beta_fast"),
        ("beta_slow", "beta_slow"),
    ):
        if rope.get(key) is not None:
            getattr(writer, f"add_rope_scaling_yarn_{name}")(rope[key])


def _scaling_type(kind: str) -> Any:  # noqa: ANN401
    from gguf import RopeScalingType

    return RopeScalingType[kind.upper()]


# -- what llama.cpp takes for granted ----------------------------------------------------------------------------------


def _refuse_other(architecture: Architecture, wanted: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse values that llama.cpp would not run as they are meant: it has no key for them.

    Raises:
        SchemeError: names the first.

    """
    for key, allowed in wanted.items():
        found = architecture.config.get(key, allowed[0])
        if found not in allowed:
            expected = " or ".join(repr(each) for each in allowed)
            raise SchemeError(
                f"config.json: {key} is {found!r}, which llama.cpp would run as {allowed[0]!r}; expected {expected}"
            )


_SILU: Final = {"hidden_act": ("silu", "swish")}


# -- Qwen3-MoE ---------------------------------------------------------------------------------------------------------


def _qwen3_moe_keys(architecture: Architecture, recorder: Recorder) -> None:
    _common(architecture, recorder)
    recorder.writer.add_expert_feed_forward_length(architecture.size("moe_intermediate_size"))


def _qwen3_moe_check(architecture: Architecture) -> None:
    _refuse_other(architecture, {**_SILU, "norm_topk_prob": (True,), "use_sliding_window": (False, None)})
    if "norm_topk_prob" not in architecture.config:
        raise SchemeError("config.json: norm_topk_prob is missing, so false, which llama.cpp would run as true")


_QWEN3_MOE: Final = Kind(name="qwen3moe", maps=("QWEN3MOE",), keys=_qwen3_moe_keys, check=_qwen3_moe_check)


# -- Qwen3.5-MoE, Qwen3-Next -------------------------------------------------------------------------------------------


def _delta_net_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Keys of gated delta-net layers among others of full attention."""
    size, writer = architecture.size, recorder.writer
    _common(architecture, recorder)
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_expert_shared_feed_forward_length(size("shared_expert_intermediate_size"))
    writer.add_ssm_conv_kernel(size("linear_conv_kernel_dim"))
    writer.add_ssm_state_size(size("linear_key_head_dim"))
    writer.add_ssm_group_count(size("linear_num_key_heads"))
    writer.add_ssm_time_step_rank(size("linear_num_value_heads"))
    writer.add_ssm_inner_size(size("linear_value_head_dim") * size("linear_num_value_heads"))
    writer.add_full_attention_interval(architecture.config.get("full_attention_interval", 4))
    partial = rope_of(architecture.config).get("partial_rotary_factor", 0.25)
    writer.add_rope_dimension_count(int(_head_dim(architecture) * partial))
    if architecture.nextn:
        writer.add_nextn_predict_layers(architecture.nextn)


def _qwen3_5_keys(architecture: Architecture, recorder: Recorder) -> None:
    _delta_net_keys(architecture, recorder)
    if "mrope_section" not in rope_of(architecture.config):
        recorder.writer.add_rope_dimension_sections([11, 11, 10, 0])


def _head_dim(architecture: Architecture) -> int:
    if architecture.config.get("head_dim") is not None:
        return architecture.size("head_dim")
    return architecture.size("hidden_size") // architecture.size("num_attention_heads")


def _delta_net_check(architecture: Architecture) -> None:
    """Layers of full attention must be every so many: llama.cpp counts them so."""
    _refuse_other(architecture, {**_SILU, "norm_topk_prob": (True,), "attn_output_gate": (True,)})
    interval = architecture.config.get("full_attention_interval", 4)
    kinds = architecture.config.get("layer_types")
    for layer, kind in enumerate(kinds or ()):
        if (kind == "full_attention") != ((layer + 1) % interval == 0):
            raise SchemeError(
                f"config.json: layer_types[{layer}] is {kind}, but full_attention_interval is {interval}, by which"
                " llama.cpp tells them apart"
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


KINDS: Final[Mapping[str, Kind]] = {
    "qwen3_5_moe": _QWEN3_5_MOE,
    "qwen3_moe": _QWEN3_MOE,
}
"""What each family becomes, by its name."""


def architecture_of(layout: Layout) -> Architecture:
    """See a checkpoint, or a view of one, as llama.cpp does; its vision tower is left out.

    Raises:
        SchemeError: llama.cpp does not run the family, or it is not one of those that are written.

    """
    kind = KINDS.get(layout.family.name)
    if kind is None:
        raise SchemeError(
            f"family {layout.family.name} is not written as GGUF; those that are: {', '.join(sorted(KINDS))}"
        )
    return Architecture(kind, layout)

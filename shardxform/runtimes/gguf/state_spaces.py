"""Families of llama.cpp some of whose blocks hand on a state instead of attending: Mamba's, and short convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
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
    needed,
    refuse_one_kind,
    refuse_other_heads,
    refuse_values,
    sigmoid_weights,
)
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.gguf.plain_attention import (
    GRANITE,
    W_EXPERTS,
    granite_check,
    granite_keys,
    granite_parts,
    neighbours,
)
from shardxform.runtimes.gguf.transforms import Transform

__all__ = ["STATES"]


def _heads_of_keys(architecture: Architecture, count: int) -> list[int]:
    """`count` in blocks of attention, and none in others, by which llama.cpp tells them."""
    return [count * each for each in architecture.which("attention")]


def _refuse_clamped_steps(architecture: Architecture) -> None:
    """Refuse bounds of a state's time steps.

    Raises:
        SchemeError: they are not 0 and infinity.

    """
    limit = architecture.config.get("time_step_limit")
    if limit is not None and (not isinstance(limit, list) or limit[:1] != [0] or not _is_infinite(limit[-1])):
        raise SchemeError(f"config.json: time_step_limit is {limit!r}, which llama.cpp has no key for: leave it out")


def _is_infinite(value: object) -> bool:
    """Whether it is infinity, or what transformers writes for it."""
    return value == float("inf") or value == {"__float__": "Infinity"}


def _mamba_part(name: str, heads: int, groups: int, width: int) -> Part:
    """A tensor of a Mamba block: what there is one of for each head is a column, norms have a row for each group."""
    inner = name.rpartition(".layers.")[2].partition(".")[2].partition(".")[2]
    if inner == "A_log":
        return Part(name, Transform(value="minus exp"), seen=(heads, 1))
    if inner == "D":
        return Part(name, seen=(heads, 1))
    return Part(name, seen=(groups, width // groups)) if inner == "norm.weight" else Part(name)


_UNROTATED_CONTEXT: Final = 1 << 20
"""Tokens of a context where nothing tells positions apart, as llama.cpp's converter has it."""


# -- Nemotron-H --------------------------------------------------------------------------------------------------------


def _nemotron_keys(architecture: Architecture, recorder: Recorder) -> None:
    """A block has a state, attention or experts; by widths of 0 llama.cpp tells which."""
    size, writer, config = architecture.size, recorder.writer, architecture.config
    width = size("moe_intermediate_size")
    add_common(
        architecture,
        recorder,
        rotated=False,
        num_key_value_heads=_heads_of_keys(architecture, size("num_key_value_heads")),
        intermediate_size=[width * each for each in architecture.which("moe")],
        rms_norm_eps=needed(config, "layer_norm_epsilon"),
        max_position_embeddings=_UNROTATED_CONTEXT,
    )
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(size("vocab_size"))
    writer.add_rope_dimension_count(size("head_dim"))
    writer.add_ssm_conv_kernel(size("conv_kernel"))
    writer.add_ssm_state_size(size("ssm_state_size"))
    writer.add_ssm_group_count(size("n_groups"))
    writer.add_ssm_inner_size(size("mamba_num_heads") * size("mamba_head_dim"))
    writer.add_ssm_time_step_rank(size("mamba_num_heads"))
    writer.add_rope_scaling_finetuned(False)
    writer.add_expert_feed_forward_length(width)
    writer.add_expert_shared_feed_forward_length(size("moe_shared_expert_intermediate_size"))
    writer.add_expert_shared_count(size("n_shared_experts"))
    sigmoid_weights(writer, config)
    if not config["norm_topk_prob"]:
        writer.add_expert_weights_norm(False)
    if config.get("moe_latent_size") is not None:
        writer.add_moe_latent_size(size("moe_latent_size"))


def _nemotron_check(architecture: Architecture) -> None:
    wanted: dict[str, tuple[Any, ...]] = {
        **UNBIASED,
        **UNTIED,  # transformers' class ties nothing, whatever the config says
        **dict.fromkeys(("use_bias", "mlp_bias", "mamba_proj_bias"), (False, None)),
        "use_conv_bias": (True,),
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu", "swish"),
        "sliding_window": (None,),
    }
    refuse_values(architecture, wanted)
    _refuse_clamped_steps(architecture)
    if _smallest_step(architecture) > _SMALL_STEP:
        raise SchemeError(
            f"config.json: time_step_min is {_smallest_step(architecture)}, which llama.cpp has no key for: expected at"
            f" most {_SMALL_STEP}"
        )
    if any(architecture.which("mlp")):
        raise SchemeError(
            "config.json: some layers are dense MLPs; llama.cpp's nemotron_h_moe has experts in all that are"
        )


_SMALL_STEP: Final = 0.001


def _smallest_step(architecture: Architecture) -> float:
    """What transformers' class takes shorter steps for; the releases' own code has no such bound, nor llama.cpp."""
    config = architecture.config
    return float(config.get("mamba_dt_min", config.get("time_step_min", _SMALL_STEP)))


def _nemotron_notes(architecture: Architecture) -> Iterator[str]:
    if smallest := _smallest_step(architecture):
        yield (
            f"transformers takes time steps of states that are below time_step_min for it, {smallest}; llama.cpp has no"
            " key for that, and takes them as they are: where there are such, their logits differ a little"
        )


def _nemotron_parts(architecture: Architecture, name: str) -> tuple[Part, ...]:
    size = architecture.size
    if ".mixer." not in name:
        return (Part(name),)
    heads = size("mamba_num_heads")
    part = _mamba_part(name, heads, size("n_groups"), heads * size("mamba_head_dim"))
    return (part,) if part != Part(name) else neighbours(architecture, name)


_NEMOTRON_H: Final = Kind(
    name="nemotron_h_moe",
    maps=("NEMOTRON_H_MOE",),
    decoder="backbone.",
    spelled={**CORRECTED, "mixer.dt_bias": "mixer.dt.bias"},
    experts=stacks("model.layers.{l}.mlp.experts.{}_proj", down=1, up=0),
    parts=_nemotron_parts,
    notes=_nemotron_notes,
    scattered=True,
    keys=_nemotron_keys,
    check=_nemotron_check,
)


# -- Granite 4 ---------------------------------------------------------------------------------------------------------


def _granite_hybrid_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Positions are rotated where the config says so; in releases nothing tells them apart but states."""
    size, writer, config = architecture.size, recorder.writer, architecture.config
    rotated = config.get("position_embedding_type") == "rope"
    over = {} if rotated else {"max_position_embeddings": _UNROTATED_CONTEXT}
    shared = config.get("num_key_value_heads") or size("num_attention_heads")
    heads = _heads_of_keys(architecture, shared)
    granite_keys(architecture, recorder, rotated=rotated, num_key_value_heads=heads, **over)
    writer.add_ssm_conv_kernel(size("mamba_d_conv"))
    writer.add_ssm_state_size(size("mamba_d_state"))
    writer.add_ssm_group_count(size("mamba_n_groups"))
    writer.add_ssm_inner_size(2 * size("hidden_size"))
    writer.add_ssm_time_step_rank(size("mamba_n_heads"))
    writer.add_rope_scaling_finetuned(rotated)


def _granite_hybrid_check(architecture: Architecture) -> None:
    """Channels of states are twice the hidden ones, and some blocks have them: others llama.cpp calls granitemoe."""
    granite_check(architecture)
    wanted = {"mamba_expand": (2,), "mamba_conv_bias": (True,), "mamba_proj_bias": (False, None)}
    refuse_values(architecture, {**wanted, "position_embedding_type": ("nope", None, "rope")})
    _refuse_clamped_steps(architecture)
    if not any(architecture.which("mamba")):
        raise SchemeError("config.json: no layer has a state; llama.cpp's granitehybrid has some that do")


def _granite_hybrid_parts(architecture: Architecture, name: str) -> tuple[Part, ...]:
    size = architecture.size
    if ".mamba." in name:
        return (_mamba_part(name, size("mamba_n_heads"), size("mamba_n_groups"), 2 * size("hidden_size")),)
    return granite_parts(architecture, name)


_GRANITE_HYBRID: Final = replace(
    GRANITE,
    name="granitehybrid",
    maps=("GRANITE_HYBRID",),
    spelled={"mamba.dt_bias": "mamba.dt_proj.bias"},
    parts=_granite_hybrid_parts,
    keys=_granite_hybrid_keys,
    check=_granite_hybrid_check,
)


# -- LFM2-MoE ----------------------------------------------------------------------------------------------------------


def _lfm2_keys(architecture: Architecture, recorder: Recorder) -> None:
    """A block without heads of keys is a short convolution."""
    size, writer = architecture.size, recorder.writer
    heads = _heads_of_keys(architecture, size("num_key_value_heads"))
    epsilon = needed(architecture.config, "norm_eps")
    add_common(architecture, recorder, num_key_value_heads=heads, rms_norm_eps=epsilon)
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_leading_dense_block_count(architecture.leading_dense)
    add_gating(writer, "SIGMOID")
    writer.add_vocab_size(size("vocab_size"))
    writer.add_shortconv_l_cache(size("conv_L_cache"))


def _lfm2_check(architecture: Architecture) -> None:
    wanted: dict[str, tuple[Any, ...]] = {"conv_bias": (False, None), "norm_topk_prob": (True,)}
    wanted |= {"routed_scaling_factor": (1.0, 1), "use_expert_bias": (True,)}
    refuse_values(architecture, wanted)
    refuse_one_kind(architecture, "attention")


_LFM2: Final = Kind(
    name="lfm2moe",
    maps=("LFM2MOE",),
    spelled={"expert_bias": "expert_bias.bias"},
    experts=W_EXPERTS,
    leads_dense=True,
    keys=_lfm2_keys,
    check=_lfm2_check,
)


# -- Jamba -------------------------------------------------------------------------------------------------------------


def _jamba_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Nothing is rotated: blocks of states tell positions apart."""
    size, writer = architecture.size, recorder.writer
    heads = _heads_of_keys(architecture, size("num_key_value_heads"))
    add_common(architecture, recorder, rotated=False, num_key_value_heads=heads)
    writer.add_ssm_conv_kernel(size("mamba_d_conv"))
    writer.add_ssm_inner_size(2 * size("hidden_size"))
    writer.add_ssm_state_size(size("mamba_d_state"))
    writer.add_ssm_time_step_rank(architecture.sized("R"))


def _jamba_check(architecture: Architecture) -> None:
    wanted = {"mamba_expand": (2,), "mamba_conv_bias": (True,), "mamba_proj_bias": (False, None)}
    refuse_values(architecture, {**SILU, **wanted, "sliding_window": (None,)})
    refuse_other_heads(architecture)


def _jamba_parts(_: Architecture, name: str) -> tuple[Part, ...]:
    return (Part(name, Transform(value="minus exp") if name.endswith("mamba.A_log") else None),)


_JAMBA: Final = Kind(
    name="jamba",
    maps=("JAMBA",),
    parts=_jamba_parts,
    scattered=True,
    keys=_jamba_keys,
    check=_jamba_check,
    tokenizer="llama",
)


STATES: Final[Mapping[str, Kind]] = {
    "granitemoehybrid": _GRANITE_HYBRID,
    "jamba": _JAMBA,
    "lfm2_moe": _LFM2,
    "nemotron_h": _NEMOTRON_H,
}
"""What each family becomes, by its name."""

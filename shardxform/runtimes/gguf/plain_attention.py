"""Families of llama.cpp whose blocks are alike: heads of keys and values, all of whose tokens are attended to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.architecture import Architecture, Kind, Part, stacks
from shardxform.runtimes.gguf.common_keys import (
    CORRECTED,
    OF_GLM,
    SILU,
    SPLITS_OF_GLM,
    UNBIASED,
    UNTIED,
    add_common,
    add_gating,
    add_normalized_sigmoid,
    add_sections,
    head_channels,
    multiplier,
    needed,
    refuse_other_heads,
    refuse_shared_keys,
    refuse_values,
    rotated_channels,
    shared_experts,
    sigmoid_weights,
    usual,
)
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.gguf.transforms import Order, Run, Transform
from shardxform.runtimes.rotation import rope_of

__all__ = ["GRANITE", "PLAIN", "W_EXPERTS", "granite_check", "granite_keys", "granite_parts", "neighbours"]


# -- Qwen3-MoE ---------------------------------------------------------------------------------------------------------


def _qwen3_moe_keys(architecture: Architecture, recorder: Recorder) -> None:
    add_common(architecture, recorder)
    recorder.writer.add_expert_feed_forward_length(architecture.size("moe_intermediate_size"))


def _qwen3_moe_check(architecture: Architecture) -> None:
    wanted = {**SILU, **UNBIASED, "norm_topk_prob": (True,), "use_sliding_window": (False, None)}
    refuse_values(architecture, wanted)
    if "norm_topk_prob" not in architecture.config:
        raise SchemeError("config.json: norm_topk_prob is missing, so false, which llama.cpp would run as true")


_QWEN3_MOE: Final = Kind(name="qwen3moe", maps=("QWEN3MOE",), keys=_qwen3_moe_keys, check=_qwen3_moe_check)


# -- GLM-4.5 -----------------------------------------------------------------------------------------------------------


def _glm4_moe_keys(architecture: Architecture, recorder: Recorder, rotated: float = 0.5) -> None:
    """Add the keys; `rotated` is the part of a head that is rotated where the config does not say."""
    size, writer, config = architecture.size, recorder.writer, architecture.config
    add_common(architecture, recorder)
    part = rope_of(config).get("partial_rotary_factor", rotated)
    writer.add_rope_dimension_count(rotated_channels(architecture, part))
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_expert_shared_count(shared_experts(architecture))
    writer.add_leading_dense_block_count(architecture.leading_dense)
    sigmoid_weights(writer, config)
    if not config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(False)
    if architecture.nextn:
        writer.add_nextn_predict_layers(architecture.nextn)


def _glm4_moe_check(architecture: Architecture) -> None:
    refuse_values(architecture, {**SILU, "scoring_func": ("sigmoid",)})


_GLM4_MOE: Final = Kind(
    name="glm4moe",
    maps=("GLM4_MOE",),
    spelled=CORRECTED,
    leads_dense=True,
    mtp="nextn",
    keys=_glm4_moe_keys,
    check=_glm4_moe_check,
    specials=OF_GLM,
    splits=SPLITS_OF_GLM,
)


_GLM4V_MOE: Final = replace(_GLM4_MOE, mtp="dropped")

_SOLAR_OPEN: Final = replace(
    _GLM4_MOE,
    keys=lambda architecture, recorder: _glm4_moe_keys(architecture, recorder, rotated=1.0),
    specials={"bos": "<|startoftext|>", "eos": "<|endoftext|>", "eot": "<|endoftext|>", "unk": "<unk>"},
    splits={},
)


# -- MiniMax-M2 --------------------------------------------------------------------------------------------------------


def _minimax_m2_keys(architecture: Architecture, recorder: Recorder) -> None:
    writer, config = recorder.writer, architecture.config
    add_common(architecture, recorder)
    writer.add_expert_feed_forward_length(architecture.size("intermediate_size"))
    partial = rope_of(config).get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(config.get("rotary_dim") or rotated_channels(architecture, partial))
    add_gating(writer, "SIGMOID")


def _minimax_m2_check(architecture: Architecture) -> None:
    wanted = {**SILU, "scoring_func": ("sigmoid",), "use_qk_norm": (True,), "qk_norm_type": ("per_layer",)}
    wanted["tie_word_embeddings"] = (False, None)
    refuse_values(architecture, wanted)


_MINIMAX_M2: Final = Kind(
    name="minimax-m2",
    maps=("MINIMAXM2",),
    spelled=CORRECTED,
    experts=stacks("model.layers.{l}.block_sparse_moe.experts.{}", w1=0, w2=2, w3=1),
    splits={"gpt-4o": "minimax-m2"},
    keys=_minimax_m2_keys,
    check=_minimax_m2_check,
)


# -- Mixtral -----------------------------------------------------------------------------------------------------------


def _mixtral_keys(architecture: Architecture, recorder: Recorder) -> None:
    add_common(architecture, recorder)
    recorder.writer.add_vocab_size(architecture.size("vocab_size"))
    recorder.writer.add_rope_dimension_count(rotated_channels(architecture))


def _mixtral_check(architecture: Architecture) -> None:
    refuse_values(architecture, {**SILU, "sliding_window": (None,)})


def neighbours(architecture: Architecture, name: str) -> tuple[Part, ...]:
    """Have halves of the heads of queries and keys take turns: llama.cpp rotates neighbours of these architectures."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = heads.get(name.rpartition(".")[0].rpartition(".")[2])
    if key is None:
        return (Part(name),)
    half = rotated_channels(architecture) // 2
    return (Part(name, Transform(rows=Order((Run(0, (architecture.size(key), 2, half), (0, 2, 1)),)))),)


W_EXPERTS: Final = stacks("layers.{l}.feed_forward.experts.{}", w1=0, w2=2, w3=1)
"""Tensors of experts that are called so in the map, and the projection that each is made of."""

_MIXTRAL: Final = Kind(
    name="llama",
    maps=("LLAMA",),
    experts=W_EXPERTS,
    parts=neighbours,
    keys=_mixtral_keys,
    check=_mixtral_check,
    tokenizer="llama",
)


def _qwen3_vl_moe_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Beside Qwen3-MoE's, how many blocks take in more of an image: what enters is so much wider."""
    _qwen3_moe_keys(architecture, recorder)
    rope = rope_of(architecture.config)
    if "mrope_section" not in rope:
        add_sections(architecture, recorder, {"mrope_section": [24, 20, 20], **rope})
    vision = architecture.layout.config.get("vision_config") or {}
    recorder.writer.add_num_deepstack_layers(len(vision.get("deepstack_visual_indexes") or ()))


def _qwen3_vl_moe_check(architecture: Architecture) -> None:
    refuse_values(architecture, {**SILU, **UNBIASED, "norm_topk_prob": (True,)})


_QWEN3_VL_MOE: Final = Kind(name="qwen3vlmoe", maps=("QWEN3VLMOE",), keys=_qwen3_vl_moe_keys, check=_qwen3_vl_moe_check)

_QWEN3_OMNI_MOE: Final = replace(_QWEN3_VL_MOE, specials={"bos": "<|im_end|>", "eos": "<|im_end|>"})


# -- Qwen2-MoE, OLMoE --------------------------------------------------------------------------------------------------


def _qwen2_moe_keys(architecture: Architecture, recorder: Recorder) -> None:
    add_common(architecture, recorder)
    recorder.writer.add_expert_feed_forward_length(architecture.size("moe_intermediate_size"))
    recorder.writer.add_expert_shared_feed_forward_length(architecture.size("shared_expert_intermediate_size"))


def _qwen2_moe_check(architecture: Architecture) -> None:
    refuse_values(architecture, {**SILU, **UNTIED, **_UNWEIGHED, "use_sliding_window": (False, None)})


_UNWEIGHED: Final = {"norm_topk_prob": (False, None)}

_QWEN2_MOE: Final = Kind(name="qwen2moe", maps=("QWEN2MOE",), keys=_qwen2_moe_keys, check=_qwen2_moe_check)


def _olmoe_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Releases leave out what transformers' class has of itself."""
    add_common(architecture, recorder, **usual(architecture, rms_norm_eps=1e-5, rope_theta=10000.0))


def _olmoe_check(architecture: Architecture) -> None:
    refuse_values(architecture, {**SILU, **UNBIASED, **UNTIED, **_UNWEIGHED, "clip_qkv": (None,)})
    refuse_shared_keys(architecture)


_OLMOE: Final = Kind(name="olmoe", maps=("OLMOE",), keys=_olmoe_keys, check=_olmoe_check)


# -- dots.llm1 ---------------------------------------------------------------------------------------------------------


def _dots1_keys(architecture: Architecture, recorder: Recorder) -> None:
    writer = recorder.writer
    add_common(architecture, recorder)
    writer.add_expert_feed_forward_length(architecture.size("moe_intermediate_size"))
    writer.add_leading_dense_block_count(architecture.leading_dense)
    writer.add_expert_shared_count(shared_experts(architecture))
    sigmoid_weights(writer, architecture.config)
    if not architecture.config["norm_topk_prob"]:
        writer.add_expert_weights_norm(False)


def _dots1_check(architecture: Architecture) -> None:
    """Windows are those of the last blocks, from `max_window_layers` on, where `layer_types` does not say."""
    refuse_values(architecture, {**SILU, **UNBIASED, **UNTIED, "scoring_func": ("sigmoid",)})
    refuse_shared_keys(architecture)
    config = architecture.config
    kinds = config.get("layer_types")
    windowed = kinds is None and config.get("sliding_window") and config.get("max_window_layers", 62) is not None
    if any(each != "full_attention" for each in kinds or ()) or (
        windowed and config.get("max_window_layers", 62) < architecture.layout.num_layers
    ):
        raise SchemeError("config.json: some layers attend to a window; llama.cpp's dots1 has none that do")


_DOTS1: Final = Kind(
    name="dots1", maps=("DOTS1",), spelled=CORRECTED, leads_dense=True, keys=_dots1_keys, check=_dots1_check
)


# -- Hunyuan-A13B ------------------------------------------------------------------------------------------------------


def _hunyuan_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Every expert, and the shared one, is as wide as the dense layers of other models are."""
    writer, shared = recorder.writer, architecture.sized("S")
    add_common(architecture, recorder, **_stretched(architecture))
    writer.add_expert_shared_feed_forward_length(shared)
    writer.add_expert_feed_forward_length(architecture.sized("I"))
    writer.add_expert_shared_count(shared // architecture.size("intermediate_size"))


def _stretched(architecture: Architecture) -> dict[str, Any]:
    """The base of rotation that a release's `alpha` stands for, as transformers' class works it out once."""
    rope = rope_of(architecture.config)
    if rope.get("rope_type") != "dynamic" or not rope.get("alpha"):
        return {}
    width = head_channels(architecture)
    base = needed(rope, "rope_theta") * rope["alpha"] ** (width / (width - 2))
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}, "rope_scaling": None, "rope_theta": None}


def _hunyuan_check(architecture: Architecture) -> None:
    refuse_values(architecture, {**SILU, **UNBIASED, "use_qk_norm": (True,), "use_cla": (False, None)})
    width = architecture.sized("I")
    if width != architecture.size("intermediate_size"):
        raise SchemeError(
            f"config.json: moe_intermediate_size is {width} and intermediate_size"
            f" {architecture.size('intermediate_size')}; llama.cpp's hunyuan-moe runs one number"
        )


_HUNYUAN: Final = Kind(
    name="hunyuan-moe",
    maps=("HUNYUAN_MOE",),
    keys=_hunyuan_keys,
    check=_hunyuan_check,
)


# -- Hy3 ---------------------------------------------------------------------------------------------------------------


def _hy_v3_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Which blocks are dense llama.cpp tells by their tensors; MTP layers are left out."""
    size, writer = architecture.size, recorder.writer
    add_common(architecture, recorder)
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_expert_shared_feed_forward_length(size("moe_intermediate_size") * size("num_shared_experts"))
    add_normalized_sigmoid(writer, architecture.config, "router_scaling_factor")


def _hy_v3_check(architecture: Architecture) -> None:
    ways = ("qk_norm", "route_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias")
    refuse_values(architecture, {**SILU, **UNBIASED, "mlp_bias": (False, None), **dict.fromkeys(ways, (True,))})


_HY_V3: Final = Kind(
    name="hy_v3", maps=("HUNYUAN_MOE", "AFMOE"), leads_dense=True, keys=_hy_v3_keys, check=_hy_v3_check
)


# -- ERNIE-4.5 ---------------------------------------------------------------------------------------------------------


def _ernie_keys(architecture: Architecture, recorder: Recorder) -> None:
    """All shared experts of a block are one: as wide as they are together."""
    size, writer = architecture.size, recorder.writer
    add_common(architecture, recorder, **usual(architecture, rms_norm_eps=1e-5, rope_theta=500000.0))
    writer.add_interleave_moe_layer_step(architecture.config.get("moe_layer_interval", 1))
    writer.add_leading_dense_block_count(architecture.leading_dense)
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    if "moe_num_shared_experts" not in architecture.config:
        raise SchemeError("config.json: moe_num_shared_experts is missing, of which transformers has some of its own")
    if (shared := architecture.config["moe_num_shared_experts"]) is not None:
        writer.add_expert_shared_count(shared)
        writer.add_expert_shared_feed_forward_length(shared * size("moe_intermediate_size"))


def _ernie_check(architecture: Architecture) -> None:
    refuse_values(
        architecture, {**SILU, "use_bias": (False, None), "moe_layer_interval": (1,), "moe_norm_min": (1e-12,)}
    )


_ERNIE4_5: Final = Kind(
    name="ernie4_5-moe",
    maps=("ERNIE4_5_MOE",),
    spelled=CORRECTED,
    leads_dense=True,
    keys=_ernie_keys,
    check=_ernie_check,
    tokenizer="llama",
)


# -- Granite-MoE -------------------------------------------------------------------------------------------------------


def granite_keys(architecture: Architecture, recorder: Recorder, *, rotated: bool = True, **over: Any) -> None:  # noqa: ANN401
    """Add what states, scores and logits are multiplied by; the width of an expert is that of dense layers."""
    writer, config = recorder.writer, architecture.config
    over = {**usual(architecture, rms_norm_eps=1e-6), **over}
    add_common(architecture, recorder, rotated=rotated, head_dim=None, **over)
    writer.add_vocab_size(architecture.size("vocab_size"))
    writer.add_rope_dimension_count(architecture.size("hidden_size") // architecture.size("num_attention_heads"))
    for key, add in _MULTIPLIERS.items():
        getattr(writer, add)(config.get(key, 1.0))
    if config.get("shared_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(architecture.size("shared_intermediate_size"))


_MULTIPLIERS: Final = {
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
}
"""Numbers of a config, and the method of the package's writer that adds each."""


def granite_check(architecture: Architecture) -> None:
    """Refuse numbers of 0, by which llama.cpp means that there is none."""
    refuse_values(architecture, {**SILU})
    refuse_other_heads(architecture)
    for key in _MULTIPLIERS:
        multiplier({key: 1.0, **architecture.config}, key)


def granite_parts(architecture: Architecture, name: str) -> tuple[Part, ...]:
    """Part the halves of the shared experts' first projection, and turn heads as Mixtral's."""
    if not name.endswith("shared_mlp.input_linear.weight"):
        return neighbours(architecture, name)
    half, block = architecture.size("shared_intermediate_size"), name.split(".")[2]
    return tuple(
        Part(f"blk.{block}.ffn_{each}_shexp.weight", Transform(rows=Order((Run(at * half, (half,)),))))
        for at, each in enumerate(("gate", "up"))
    )


GRANITE: Final = Kind(
    name="granitemoe",
    maps=("GRANITE_MOE",),
    experts=stacks("model.layers.{l}.mlp.experts.{}_proj", gate=0, up=1, down=2),
    parts=granite_parts,
    keys=granite_keys,
    check=granite_check,
)


PLAIN: Final[Mapping[str, Kind]] = {
    "dots1": _DOTS1,
    "ernie4_5_moe": _ERNIE4_5,
    "glm4_moe": _GLM4_MOE,
    "glm4v_moe": _GLM4V_MOE,
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "hunyuan_v1_moe": _HUNYUAN,
    "hy_v3": _HY_V3,
    "minimax_m2": _MINIMAX_M2,
    "mixtral": _MIXTRAL,
    "olmoe": _OLMOE,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_omni_moe": _QWEN3_OMNI_MOE,
    "qwen3_vl_moe": _QWEN3_VL_MOE,
    "solar_open": _SOLAR_OPEN,
}
"""What each family becomes, by its name."""

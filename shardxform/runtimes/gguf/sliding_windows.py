"""Families of llama.cpp some of whose blocks attend to a window of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.architecture import Architecture, Kind, Named, Part, stacks
from shardxform.runtimes.gguf.common_keys import (
    CORRECTED,
    SILU,
    UNBIASED,
    UNTIED,
    add_common,
    add_gating,
    add_normalized_sigmoid,
    head_channels,
    multiplier,
    needed,
    refuse_scaled_rotation,
    refuse_values,
    rotated_channels,
    shared_experts,
    sigmoid_weights,
)
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.gguf.slabs import UNNORMED_EXPERTS
from shardxform.runtimes.rotation import rope_of

__all__ = ["SLIDING"]


# -- gpt-oss -----------------------------------------------------------------------------------------------------------


def _gpt_oss_keys(architecture: Architecture, recorder: Recorder) -> None:
    add_common(architecture, recorder)
    recorder.writer.add_sliding_window(architecture.size("sliding_window"))
    recorder.writer.add_expert_feed_forward_length(architecture.size("intermediate_size"))


def _gpt_oss_check(architecture: Architecture) -> None:
    """Every second layer attends to a window, the first of them is one, and the activation has its own limits."""
    wanted = {**SILU, "swiglu_limit": (7.0, 7), "swiglu_alpha": (1.702,), "attention_bias": (True,)}
    refuse_values(architecture, {**wanted, "tie_word_embeddings": (False, None)})
    if rope_of(architecture.config).get("rope_type") is None:
        raise SchemeError("config.json: rope_scaling is missing, for which transformers has numbers of its own")
    for layer, kind in enumerate(architecture.config.get("layer_types") or ()):
        if (kind == "sliding_attention") != (layer % 2 == 0):
            raise SchemeError(
                f"config.json: layer_types[{layer}] is {kind}, but llama.cpp lets every second layer, from the"
                " first on, attend to a window"
            )


_GPT_OSS: Final = Kind(
    name="gpt-oss",
    maps=("GPT_OSS",),
    spelled={"self_attn.sinks": "self_attn.sinks.weight"},
    keys=_gpt_oss_keys,
    check=_gpt_oss_check,
)


# -- Gemma 4 -----------------------------------------------------------------------------------------------------------


def _gemma4_keys(architecture: Architecture, recorder: Recorder) -> None:
    size, writer, config = architecture.size, recorder.writer, architecture.config
    add_common(architecture, recorder, head_dim=None, num_key_value_heads=None)
    writer.add_final_logit_softcapping(config.get("final_logit_softcapping") or 0.0)  # without the key it caps at 30
    writer.add_sliding_window(size("sliding_window"))
    sliding, own, full = architecture.which("sliding"), size("num_key_value_heads"), architecture.sized("FK")
    writer.add_head_count_kv([own if each else full for each in sliding] if full != own else own)
    writer.add_shared_kv_layers(config.get("num_kv_shared_layers") or 0)
    writer.add_embedding_length_per_layer_input(config.get("hidden_size_per_layer_input") or 0)
    writer.add_sliding_window_pattern(sliding)
    width = architecture.sized("FD")
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_key_length_swa(size("head_dim"))
    writer.add_value_length_swa(size("head_dim"))
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_rope_dimension_count(width)
    writer.add_rope_dimension_count_swa(size("head_dim"))


def _gemma4_check(architecture: Architecture) -> None:
    wanted = {
        **UNBIASED,
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (None, "vision"),
    }
    refuse_values(architecture, wanted)
    rope = rope_of(architecture.config)
    kinds = [rope.get(f"{each}_attention", {}).get("rope_type") for each in ("full", "sliding")]
    if kinds != ["proportional", "default"]:
        raise SchemeError(
            f"config.json: rope_type of full and of sliding attention are {kinds}; expected proportional, default"
        )


def _gemma4_made(architecture: Architecture) -> Iterator[Named]:
    """Factors of the frequencies of full attention: those beyond the part that is rotated are divided away."""
    rope = needed(rope_of(architecture.config), "full_attention")
    half = architecture.sized("FD") // 2
    rotated = int(2 * half * needed(rope, "partial_rotary_factor") / 2)
    yield Named("rope_freqs.weight", (half,), (), wide=True, values=(1.0,) * rotated + (1e30,) * (half - rotated))


def _gemma4_parts(_: Architecture, name: str) -> tuple[Part, ...]:
    block, _dot, inner = name.partition(".router.")
    scales = {"scale": "ffn_gate_inp.scale", "per_expert_scale": "ffn_down_exps.scale"}
    return (Part(f"{block.replace('model.layers.', 'blk.')}.{scales[inner]}" if inner in scales else name),)


_GEMMA4: Final = Kind(
    name="gemma4",
    maps=("GEMMA4",),
    spelled={"layer_scalar": "layer_scalar.weight"},
    experts=stacks("model.layers.{l}.experts.{}_proj", down=2, gate_up=(0, 1)),
    parts=_gemma4_parts,
    made=_gemma4_made,
    keys=_gemma4_keys,
    check=_gemma4_check,
    tokenizer="gemma4",
)


# -- Trinity, K-EXAONE, Mellum -----------------------------------------------------------------------------------------


def _add_windows(architecture: Architecture, recorder: Recorder) -> None:
    """Add how many tokens a window has, and which blocks attend to one.

    Raises:
        SchemeError: `layer_types` has other kinds, or none of windows, at which llama.cpp aborts; or it is missing.

    """
    kinds, sliding = needed(architecture.config, "layer_types"), "sliding_attention"
    if not isinstance(kinds, list) or sliding not in kinds or not {sliding, "full_attention"}.issuperset(kinds):
        raise SchemeError(f"config.json: layer_types is {kinds!r}; expected {sliding} and, maybe, full_attention")
    recorder.writer.add_sliding_window(architecture.size("sliding_window"))
    recorder.writer.add_sliding_window_pattern([each == sliding for each in kinds])


def _afmoe_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Blocks of windows alone are rotated."""
    writer, config, size = recorder.writer, architecture.config, architecture.size
    add_common(architecture, recorder)
    writer.add_vocab_size(size("vocab_size"))
    writer.add_rope_dimension_count(rotated_channels(architecture))
    writer.add_expert_shared_count(shared_experts(architecture, "num_shared_experts"))
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_leading_dense_block_count(architecture.leading_dense)
    add_normalized_sigmoid(writer, config, "route_scale")
    writer.add_sliding_window(size("sliding_window"))


def _afmoe_check(architecture: Architecture) -> None:
    """Embeddings are multiplied by the root of their width, and every fourth block is not rotated, always."""
    wanted = {**SILU, **UNBIASED, "mup_enabled": (True,), "route_norm": (True,), "score_func": ("sigmoid",)}
    wanted["n_group"] = (1, None)
    refuse_values(architecture, wanted)
    if not architecture.config.get("mup_enabled"):
        raise SchemeError("config.json: mup_enabled is missing, so false, which llama.cpp would run as true")
    every, kinds = architecture.config.get("global_attn_every_n_layers", 4), architecture.config.get("layer_types")
    if kinds is None and every == 4:
        return
    for layer, kind in enumerate(kinds or ()):
        if (kind == "sliding_attention") != ((layer + 1) % 4 > 0):
            raise SchemeError(
                f"config.json: layer_types[{layer}] is {kind}, but llama.cpp's afmoe lets every fourth layer attend to"
                " all, and none beside"
            )
    if kinds is None:
        raise SchemeError(f"config.json: global_attn_every_n_layers is {every}; llama.cpp's afmoe runs 4")


_AFMOE: Final = Kind(
    name="afmoe",
    maps=("AFMOE",),
    spelled={"expert_bias": "expert_bias.bias"},
    leads_dense=True,
    keys=_afmoe_keys,
    check=_afmoe_check,
)


def _exaone_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Blocks of windows alone are rotated; MTP layers are left out."""
    writer, size = recorder.writer, architecture.size
    add_common(architecture, recorder)
    writer.add_vocab_size(size("vocab_size"))
    _add_windows(architecture, recorder)
    shared = shared_experts(architecture, "num_shared_experts")
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_expert_shared_count(shared)
    writer.add_expert_shared_feed_forward_length(shared * size("moe_intermediate_size"))
    sigmoid_weights(writer, architecture.config)
    if not architecture.config["norm_topk_prob"]:
        writer.add_expert_weights_norm(False)
    writer.add_leading_dense_block_count(architecture.leading_dense)
    writer.add_rope_scaling_type(recorder.gguf.RopeScalingType.NONE)


def _exaone_check(architecture: Architecture) -> None:
    refuse_values(architecture, {**SILU, **UNTIED, "scoring_func": ("sigmoid",)})
    refuse_scaled_rotation(architecture)


_EXAONE_MOE: Final = Kind(
    name="exaone-moe",
    maps=("EXAONE_MOE",),
    spelled=CORRECTED,
    leads_dense=True,
    keys=_exaone_keys,
    check=_exaone_check,
)


def _mellum_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Blocks of windows are rotated by the same base, and never scaled."""
    add_common(architecture, recorder)
    recorder.writer.add_expert_feed_forward_length(architecture.size("moe_intermediate_size"))
    if "sliding_attention" in needed(architecture.config, "layer_types"):
        _add_windows(architecture, recorder)


def _mellum_check(architecture: Architecture) -> None:
    wanted = {**SILU, **UNBIASED, **UNTIED, "norm_topk_prob": (True,), "use_sliding_window": (True, None)}
    refuse_values(architecture, wanted)
    rope = rope_of(architecture.config)
    full, sliding = (rope.get(f"{each}_attention") or {} for each in ("full", "sliding"))
    if sliding.get("rope_type", "default") != "default" or sliding.get("rope_theta") != full.get("rope_theta"):
        raise SchemeError(
            f"config.json: rope_parameters of sliding_attention are {sliding}; llama.cpp's mellum rotates these blocks"
            " by the base of the others, unscaled"
        )


_MELLUM: Final = Kind(name="mellum", maps=("QWEN3MOE",), leads_dense=False, keys=_mellum_keys, check=_mellum_check)


# -- Llama 4 -----------------------------------------------------------------------------------------------------------


def _llama4_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Every fourth block attends to all and is not rotated, the others to chunks; how, llama.cpp takes for granted."""
    writer, size, rope = recorder.writer, architecture.size, rope_of(architecture.config)
    over: dict[str, Any] = {"intermediate_size": size("intermediate_size_mlp")}
    if rope.get("rope_type") == "llama3":  # by factors, see `_llama4_made`
        over |= {"rope_parameters": {"rope_theta": rope.get("rope_theta")}, "rope_scaling": None, "rope_theta": None}
    add_common(architecture, recorder, **over)
    writer.add_vocab_size(size("vocab_size"))
    writer.add_rope_dimension_count(rotated_channels(architecture))
    writer.add_interleave_moe_layer_step(architecture.config.get("interleave_moe_layer_step", 1))
    writer.add_expert_feed_forward_length(size("intermediate_size"))


def _llama4_made(architecture: Architecture) -> Iterator[Named]:
    """Factors by which wavelengths are stretched: all that are long, none that are short, and those between in part."""
    rope = rope_of(architecture.config)
    if rope.get("rope_type") != "llama3":
        return
    width, base = head_channels(architecture), needed(rope, "rope_theta")
    factor, low, high = (needed(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = needed(rope, "original_max_position_embeddings")
    factors = []
    for at in range(0, width, 2):
        turns = context / (2 * math.pi * base ** (at / width))
        part = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - part) / factor + part))
    yield Named("rope_freqs.weight", (width // 2,), (), wide=True, values=tuple(factors))


_OF_LLAMA_4: Final[Mapping[str, tuple[object, ...]]] = {
    "attention_chunk_size": (8192,),
    "attn_scale": (0.1,),
    "attn_temperature_tuning": (True, 4),
    "floor_scale": (8192,),
}


def _llama4_check(architecture: Architecture) -> None:
    """Refuse other chunks and temperatures; and norms of queries and keys, which llama.cpp tells by 128 experts."""
    config, layers = architecture.config, range(architecture.layout.num_layers)
    refuse_values(architecture, {**SILU, **UNBIASED, **_OF_LLAMA_4})
    if config.get("use_qk_norm", True) == (architecture.layout.num_experts == UNNORMED_EXPERTS):
        raise SchemeError(
            f"config.json: use_qk_norm is {config.get('use_qk_norm', True)} and there are"
            f" {architecture.layout.num_experts} experts; llama.cpp leaves these norms out where there are"
            f" {UNNORMED_EXPERTS}, and there alone"
        )
    every = config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [int((layer + 1) % every > 0) for layer in layers]
    kinds = config.get("layer_types") or ["chunked_attention" if each else "full_attention" for each in rotated]
    for layer in layers:
        local = (layer + 1) % 4 > 0
        if bool(rotated[layer]) != local or (kinds[layer] == "chunked_attention") != local:
            raise SchemeError(
                f"config.json: layer {layer} is {kinds[layer]}{'' if rotated[layer] else ', not rotated'}; llama.cpp's"
                " llama4 has every fourth attend to all, not rotated, and the others to chunks"
            )
    step = config.get("interleave_moe_layer_step", 1)
    if [layer for layer in layers if (layer + 1) % step == 0] != list(architecture.layout.moe_layers):
        raise SchemeError(f"config.json: moe_layers is {config.get('moe_layers')!r}; expected every {step}. layer")


_LLAMA4: Final = Kind(
    name="llama4",
    maps=("LLAMA4",),
    experts=stacks("blk.{l}.ffn_{}_exps", down=2, gate=0, up=1),
    made=_llama4_made,
    scattered=True,
    keys=_llama4_keys,
    check=_llama4_check,
)


# -- Laguna, Command A+, MiMo-V2-Flash ---------------------------------------------------------------------------------


def _laguna_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Blocks differ in how many heads they have, and those of windows in how much of a head is rotated."""
    size, writer, config = architecture.size, recorder.writer, architecture.config
    heads = config.get("num_attention_heads_per_layer") or [size("num_attention_heads")] * architecture.blocks
    add_common(architecture, recorder, num_attention_heads=heads)
    writer.add_vocab_size(size("vocab_size"))
    if "sliding_attention" in needed(config, "layer_types"):
        _add_windows(architecture, recorder)
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_expert_shared_feed_forward_length(size("shared_expert_intermediate_size"))
    add_normalized_sigmoid(writer, config, "moe_routed_scaling_factor")
    writer.add_leading_dense_block_count(architecture.leading_dense)
    rope = rope_of(config)
    for kind, ending in (("full", ""), ("sliding", "_swa")):
        part = rope[f"{kind}_attention"].get("partial_rotary_factor", 1.0)
        getattr(writer, f"add_rope_dimension_count{ending}")(rotated_channels(architecture, part))


def _laguna_check(architecture: Architecture) -> None:
    wanted: dict[str, tuple[object, ...]] = {"moe_router_logit_softcapping": (0.0, 0, None)}
    wanted |= {"moe_apply_router_weight_on_input": (False, None), "gating": (True, "per-head", "per-element")}
    refuse_values(architecture, {**SILU, **UNBIASED, **UNTIED, **wanted})
    rope = rope_of(architecture.config)
    full, sliding = (rope.get(f"{each}_attention") for each in ("full", "sliding"))
    if full is None or sliding is None or sliding.get("rope_type", "default") != "default":
        raise SchemeError(
            "config.json: rope_parameters: expected full_attention, and sliding_attention of rope_type default;"
            " llama.cpp scales no positions of windows"
        )
    if needed(architecture.config, "layer_types")[0] != "full_attention":
        raise SchemeError(
            f"config.json: layer_types[0] is {architecture.config['layer_types'][0]}; llama.cpp takes the width that is"
            " rotated in full_attention from the first block"
        )


_LAGUNA: Final = Kind(
    name="laguna",
    maps=("QWEN3MOE", "QWEN2MOE", "AFMOE"),
    spelled={
        "mlp.experts.e_score_correction_bias": "mlp.gate.e_score_correction.bias",
        "self_attn.g_proj.weight": "self_attn.gate_proj.weight",
    },
    leads_dense=True,
    keys=_laguna_keys,
    check=_laguna_check,
    specials={"eot": "</assistant>"},
)


def _cohere2_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Of a softmax the scores of those that are chosen are normalized, whatever the config says."""
    size, writer, config = architecture.size, recorder.writer, architecture.config
    dense = config.get("prefix_dense_intermediate_size") or size("intermediate_size")
    add_common(architecture, recorder, intermediate_size=dense, rms_norm_eps=multiplier(config, "rms_norm_eps"))
    if config.get("layer_norm_eps") is not None:
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_logit_scale(multiplier({"logit_scale": 0.0625, **config}, "logit_scale"))
    _add_windows(architecture, recorder)
    writer.add_vocab_size(size("vocab_size"))
    writer.add_expert_feed_forward_length(size("intermediate_size"))
    writer.add_leading_dense_block_count(architecture.leading_dense)
    function = config.get("expert_selection_fn", "softmax")
    add_gating(writer, function.upper())
    writer.add_expert_weights_norm(function == "softmax" or bool(config.get("norm_topk_prob", True)))
    if shared := config.get("num_shared_experts", 0):
        writer.add_expert_shared_count(shared)
        writer.add_expert_shared_feed_forward_length(shared * size("intermediate_size"))
    writer.add_rope_dimension_count(rotated_channels(architecture))
    writer.add_rope_scaling_type(recorder.gguf.RopeScalingType.NONE)


def _cohere2_check(architecture: Architecture) -> None:
    """Refuse other ways; a config without rms_norm_eps means norms that take the mean away, which llama.cpp has not."""
    wanted: dict[str, tuple[object, ...]] = {
        "shared_expert_combination_strategy": ("average",),
        "use_qk_norm": (False,),
    }
    wanted |= {"expert_selection_fn": ("softmax", "sigmoid"), "use_parallel_block": (True,)}
    refuse_values(architecture, {**SILU, **UNBIASED, **wanted})
    refuse_scaled_rotation(architecture)
    if architecture.leading_dense and architecture.config.get("prefix_dense_sliding_window_pattern", 1) != 1:
        raise SchemeError(
            "config.json: prefix_dense_sliding_window_pattern is"
            f" {architecture.config['prefix_dense_sliding_window_pattern']!r}; llama.cpp rotates all dense blocks"
        )


_COHERE2_MOE: Final = Kind(
    name="cohere2moe",
    maps=("COHERE2", "DEEPSEEK2"),
    leads_dense=True,
    keys=_cohere2_keys,
    check=_cohere2_check,
)


def _mimo_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Blocks of windows have keys of their own count, a base of their own, and a sink; MTP layers are left out."""
    size, writer, config = architecture.size, recorder.writer, architecture.config
    windows, keys = architecture.which("sliding"), architecture.layout.family.layer_symbols["KV"]
    heads = [keys(config, layer) for layer in range(len(windows))]
    rope = rope_of(config)
    full, epsilon = rope.get("full_attention", rope), config.get("rms_norm_eps", config.get("layernorm_epsilon", 1e-5))
    add_common(architecture, recorder, num_key_value_heads=heads, rms_norm_eps=epsilon, head_dim=None)
    if "sliding_attention" not in rope:
        writer.add_rope_freq_base_swa(needed(config, "swa_rope_theta"))
    writer.add_key_length(size("head_dim"))
    writer.add_value_length(size("v_head_dim"))
    beside = config.get("sliding_window_size")  # tokens before each; the window has that one too
    writer.add_sliding_window(size("sliding_window") if beside is None else size("sliding_window_size") + 1)
    writer.add_sliding_window_pattern([int(each) for each in windows])
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_rope_dimension_count(rotated_channels(architecture, full.get("partial_rotary_factor", 0.334)))
    add_gating(writer, "SIGMOID")
    values = {"attention_value_scale": 0.707, **config}
    if values["attention_value_scale"] is not None:
        scale = float(multiplier(values, "attention_value_scale"))
        writer.add_float32(f"{architecture.name}.attention.value_scale", scale)


_MIMO_ROTATION: Final = {"rope_theta": 5000000.0, "swa_rope_theta": 10000.0, "partial_rotary_factor": 0.334}
"""What transformers' class takes where there are no `rope_parameters`, and so does the release."""


def _mimo_check(architecture: Architecture) -> None:
    config, rope = architecture.config, rope_of(architecture.config)
    wanted: dict[str, tuple[object, ...]] = {"scoring_func": ("sigmoid",), "norm_topk_prob": (True,)}
    wanted |= {"routed_scaling_factor": (1.0, 1, None), "n_shared_experts": (None, 0)}
    wanted |= {"add_swa_attention_sink_bias": (True,), "add_full_attention_sink_bias": (False,)}
    refuse_values(architecture, {**SILU, **UNBIASED, **UNTIED, **wanted})
    if not any(architecture.which("sliding")):
        raise SchemeError("config.json: no layer attends to a window; llama.cpp's mimo2 runs models where some do")
    for key, other in (("swa_head_dim", "head_dim"), ("swa_v_head_dim", "v_head_dim")):
        if config.get(key) not in (None, config.get(other)):
            raise SchemeError(
                f"config.json: {key} is {config[key]!r} and {other} {config.get(other)!r}; llama.cpp has one"
            )
    if rope.keys() <= _MIMO_ROTATION.keys():  # all that the class reads is rope_parameters
        for key, usual in _MIMO_ROTATION.items():
            if config.get(key, usual) != usual:
                raise SchemeError(
                    f"config.json: {key} is {config[key]!r}, for which transformers takes {usual}: say it in"
                    " rope_parameters"
                )
    if config.get("swa_num_attention_heads") not in (None, config.get("num_attention_heads")):
        raise SchemeError("config.json: swa_num_attention_heads and num_attention_heads differ; llama.cpp has one")
    kinds = [rope.get(f"{each}_attention", rope) for each in ("full", "sliding")]
    parts = {each.get("partial_rotary_factor", 0.334) for each in kinds}
    if len(parts) > 1 or any(each.get("rope_type", "default") != "default" for each in kinds):
        raise SchemeError(f"config.json: rope_parameters are {rope}; llama.cpp's mimo2 rotates one part, unscaled")


_MIMO: Final = Kind(
    name="mimo2",
    maps=("MIMO2",),
    spelled={**CORRECTED, "attention_sink_bias": "attention_sink_bias.weight"},
    leads_dense=True,
    keys=_mimo_keys,
    check=_mimo_check,
)


SLIDING: Final[Mapping[str, Kind]] = {
    "afmoe": _AFMOE,
    "cohere2_moe": _COHERE2_MOE,
    "exaone_moe": _EXAONE_MOE,
    "gemma4": _GEMMA4,
    "gpt_oss": _GPT_OSS,
    "laguna": _LAGUNA,
    "llama4": _LLAMA4,
    "mellum": _MELLUM,
    "mimo_v2_flash": _MIMO,
}
"""What each family becomes, by its name."""

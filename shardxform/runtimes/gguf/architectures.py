"""The families that llama.cpp runs: how each becomes one of its architectures, as its own converter does it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Final

from shardxform.errors import SchemeError
from shardxform.formats.encoding import Cut
from shardxform.model.layout import Layout
from shardxform.runtimes.gguf.architecture import Architecture, Kind, Named, Part
from shardxform.runtimes.gguf.common_keys import (
    SILU,
    UNBIASED,
    add_common,
    add_sections,
    head_channels,
    needed,
    refuse_values,
)
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.gguf.transforms import Order, Run, Transform
from shardxform.runtimes.rotation import rope_of

__all__ = ["KINDS", "architecture_of"]


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
    writer.add_rope_dimension_count(int(head_channels(architecture) * partial))
    if architecture.nextn:
        writer.add_nextn_predict_layers(architecture.nextn)


def _qwen3_5_keys(architecture: Architecture, recorder: Recorder) -> None:
    _delta_net_keys(architecture, recorder)
    rope = rope_of(architecture.config)
    if "mrope_section" not in rope:
        add_sections(architecture, recorder, rope)


_SMALL: Final = 1e-5


def _refuse_large_epsilon(architecture: Architecture) -> None:
    """Refuse what llama.cpp adds in norms that have no key of their own, where it is no longer next to nothing.

    Transformers' classes add 1e-6 in some of them, whatever the config says: norms of latent queries and keys, and of a
    delta net's.

    Raises:
        SchemeError: it is more than ten times that.

    """
    found = needed(architecture.config, "rms_norm_eps")
    if not isinstance(found, int | float) or found > _SMALL:
        raise SchemeError(
            f"config.json: rms_norm_eps is {found!r}; some norms have 1e-6 in transformers, and llama.cpp runs all by"
            f" this: expected at most {_SMALL}"
        )


def _delta_net_check(architecture: Architecture) -> None:
    wanted = {**SILU, **UNBIASED, "norm_topk_prob": (True,), "attn_output_gate": (True,)}
    refuse_values(architecture, wanted)
    _refuse_large_epsilon(architecture)
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


# -- latent attention: DeepSeek-V3, Kimi-K2, DeepSeek-V3.2, GLM-4.7-Flash ----------------------------------------------


def _latent_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Keys of latent attention, which llama.cpp runs as attention of all heads over one head of latent keys."""
    size, writer, config = architecture.size, recorder.writer, architecture.config
    add_common(architecture, recorder, latent=True, num_key_value_heads=1, head_dim=None)
    writer.add_leading_dense_block_count(architecture.leading_dense)
    writer.add_vocab_size(size("vocab_size"))
    if config.get("q_lora_rank") is not None:
        writer.add_q_lora_rank(size("q_lora_rank"))
    writer.add_kv_lora_rank(size("kv_lora_rank"))
    writer.add_key_length(size("kv_lora_rank") + size("qk_rope_head_dim"))
    writer.add_value_length(size("kv_lora_rank"))
    writer.add_key_length_mla(size("qk_nope_head_dim") + size("qk_rope_head_dim"))
    writer.add_value_length_mla(size("v_head_dim"))
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_expert_shared_count(_shared_experts(architecture))
    _weights(writer, config)
    writer.add_rope_dimension_count(size("qk_rope_head_dim"))
    if (scale := rope_of(config).get("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * scale)
    if architecture.nextn:
        writer.add_nextn_predict_layers(architecture.nextn)


def _weights(writer: Any, config: Mapping[str, Any]) -> None:  # noqa: ANN401
    """How experts are scored and weighed by a sigmoid: the family's own way, whether the config says so or not.

    Raises:
        SchemeError: a number is missing, for which transformers' classes and llama.cpp have others.

    """
    writer.add_expert_weights_scale(needed(config, "routed_scaling_factor"))
    if needed(config, "norm_topk_prob"):
        writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(_gating("SIGMOID"))


def _shared_experts(architecture: Architecture) -> int:
    """How many there are in a block.

    Raises:
        SchemeError: none, but llama.cpp loads no model of these without.

    """
    count = architecture.size("n_shared_experts")
    if not count:
        raise SchemeError("config.json: n_shared_experts is 0; llama.cpp runs models that have some")
    return count


def _gating(name: str) -> Any:  # noqa: ANN401
    from gguf import ExpertGatingFuncType

    return ExpertGatingFuncType[name]


_SIGMOID: Final = {**SILU, "scoring_func": ("sigmoid",), "moe_layer_freq": (1,), "rope_interleave": (True,)}


def _latent_check(architecture: Architecture) -> None:
    """Refuse what llama.cpp does not run as it is meant, scales of latent attention among it."""
    refuse_values(architecture, {**_SIGMOID, **UNBIASED})
    _refuse_large_epsilon(architecture)
    rope = rope_of(architecture.config)
    kind = rope.get("rope_type") or "default"
    if kind == "yarn":
        one, other = rope.get("mscale"), rope.get("mscale_all_dim")
        if one != other or not one or rope.get("attention_factor") not in (None, 1):
            raise SchemeError(
                f"config.json: mscale is {one!r}, mscale_all_dim {other!r} and attention_factor"
                f" {rope.get('attention_factor')!r}; of latent attention llama.cpp runs YaRN where the first two are"
                " one number and the third is not there"
            )
    elif kind == "linear":
        raise SchemeError("config.json: rope_type 'linear'; of latent attention llama.cpp runs default and yarn")
    if architecture.config.get("q_lora_rank") is None and architecture.layout.num_layers not in _WHOLE_QUERIES:
        raise SchemeError(
            "config.json: q_lora_rank is missing; llama.cpp does without it in models of 26 or 27 layers only"
        )


_WHOLE_QUERIES: Final = (26, 27)
"""Numbers of layers by which llama.cpp tells models whose queries are made in one step."""


def _latent_parts(architecture: Architecture, name: str) -> tuple[Part, ...]:
    """Keys and values of all heads, [heads, nope + v, rank] in one: keys turned, [heads, rank, nope], and values."""
    if not name.endswith("self_attn.kv_b_proj.weight"):
        return (Part(name),)
    size = architecture.size
    heads, keys, values = size("num_attention_heads"), size("qk_nope_head_dim"), size("v_head_dim")
    cuts = tuple(Cut(head * (keys + values), keys) for head in range(heads))
    rows = Order((Run(0, (heads, keys + values), (), ((0, heads), (keys, keys + values))),))
    stem = name.removesuffix("kv_b_proj.weight")
    return (
        Part(f"{stem}k_b_proj.weight", Transform(transposed=True), cuts, (heads,)),
        Part(f"{stem}v_b_proj.weight", Transform(rows=rows), (), (heads,)),
    )


_CORRECTED: Final = {"e_score_correction_bias": "e_score_correction.bias"}

_DEEPSEEK_V3: Final = Kind(
    name="deepseek2",
    maps=("DEEPSEEK2",),
    spelled=_CORRECTED,
    leads_dense=True,
    parts=_latent_parts,
    keys=_latent_keys,
    check=_latent_check,
)


def _deepseek_v32_keys(architecture: Architecture, recorder: Recorder) -> None:
    _latent_keys(architecture, recorder)
    recorder.writer.add_indexer_head_count(architecture.size("index_n_heads"))
    recorder.writer.add_indexer_key_length(architecture.size("index_head_dim"))
    recorder.writer.add_indexer_top_k(architecture.size("index_topk"))


def _deepseek_v32_check(architecture: Architecture) -> None:
    """What the indexer compares is turned by a Hadamard matrix first, of a power of two; llama.cpp aborts at others."""
    _latent_check(architecture)
    rope = rope_of(architecture.config)
    if rope.get("rope_type") == "yarn" and rope["mscale_all_dim"] != 1:
        raise SchemeError(f"config.json: mscale_all_dim is {rope['mscale_all_dim']!r}; of these llama.cpp runs 1")
    width = architecture.size("index_head_dim")
    if width < _SMALLEST_TURN or width & (width - 1):
        raise SchemeError(
            f"config.json: index_head_dim is {width}; llama.cpp runs powers of two from {_SMALLEST_TURN} on"
        )


_SMALLEST_TURN: Final = 64

_DEEPSEEK_V32: Final = Kind(
    name="deepseek32",
    maps=("DEEPSEEK2", "GLM_DSA"),
    spelled=_CORRECTED,
    leads_dense=True,
    parts=_latent_parts,
    mtp="nextn",
    keys=_deepseek_v32_keys,
    check=_deepseek_v32_check,
    adds_bos=True,
)

_OF_GLM: Final = {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}

_SPLITS_OF_GLM: Final = {"llama-bpe": "glm4", "smaug-bpe": "chatglm-bpe"}

_GLM4_MOE_LITE: Final = Kind(
    name="deepseek2",
    maps=("DEEPSEEK2",),
    spelled=_CORRECTED,
    leads_dense=True,
    parts=_latent_parts,
    mtp="nextn",
    keys=_latent_keys,
    check=_latent_check,
    specials=_OF_GLM,
    splits=_SPLITS_OF_GLM,
)


# -- GLM-4.5 -----------------------------------------------------------------------------------------------------------


def _glm4_moe_keys(architecture: Architecture, recorder: Recorder) -> None:
    size, writer, config = architecture.size, recorder.writer, architecture.config
    add_common(architecture, recorder)
    writer.add_rope_dimension_count(
        int(head_channels(architecture) * rope_of(config).get("partial_rotary_factor", 0.5))
    )
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_expert_shared_count(_shared_experts(architecture))
    writer.add_leading_dense_block_count(architecture.leading_dense)
    _weights(writer, config)
    if not config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(False)
    if architecture.nextn:
        writer.add_nextn_predict_layers(architecture.nextn)


def _glm4_moe_check(architecture: Architecture) -> None:
    refuse_values(architecture, {**SILU, "scoring_func": ("sigmoid",)})


_GLM4_MOE: Final = Kind(
    name="glm4moe",
    maps=("GLM4_MOE",),
    spelled=_CORRECTED,
    leads_dense=True,
    mtp="nextn",
    keys=_glm4_moe_keys,
    check=_glm4_moe_check,
    specials=_OF_GLM,
    splits=_SPLITS_OF_GLM,
)


# -- MiniMax-M2 --------------------------------------------------------------------------------------------------------


def _minimax_m2_keys(architecture: Architecture, recorder: Recorder) -> None:
    writer, config = recorder.writer, architecture.config
    add_common(architecture, recorder)
    writer.add_expert_feed_forward_length(architecture.size("intermediate_size"))
    partial = rope_of(config).get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(config.get("rotary_dim") or int(head_channels(architecture) * partial))
    writer.add_expert_gating_func(_gating("SIGMOID"))


def _minimax_m2_check(architecture: Architecture) -> None:
    wanted = {**SILU, "scoring_func": ("sigmoid",), "use_qk_norm": (True,), "qk_norm_type": ("per_layer",)}
    wanted["tie_word_embeddings"] = (False, None)
    refuse_values(architecture, wanted)


_MINIMAX_M2: Final = Kind(
    name="minimax-m2",
    maps=("MINIMAXM2",),
    spelled=_CORRECTED,
    experts=tuple(
        (f"model.layers.{{l}}.block_sparse_moe.experts.{name}", held)
        for name, held in (("w1", (0,)), ("w2", (2,)), ("w3", (1,)))
    ),
    splits={"gpt-4o": "minimax-m2"},
    keys=_minimax_m2_keys,
    check=_minimax_m2_check,
)


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


def _of_full(architecture: Architecture, symbol: str) -> int:
    """A size of layers with full attention, as the family works it out."""
    found = architecture.layout.family.symbols[symbol]
    assert callable(found)
    return found(architecture.config)


def _sliding(architecture: Architecture) -> list[bool]:
    """Which layers attend to a window."""
    holds = architecture.layout.family.holds
    return [holds("sliding", architecture.config, layer) for layer in range(architecture.layout.num_layers)]


def _gemma4_keys(architecture: Architecture, recorder: Recorder) -> None:
    size, writer, config = architecture.size, recorder.writer, architecture.config
    add_common(architecture, recorder, head_dim=None, num_key_value_heads=None)
    writer.add_final_logit_softcapping(config.get("final_logit_softcapping") or 0.0)  # without the key it caps at 30
    writer.add_sliding_window(size("sliding_window"))
    sliding, own, full = _sliding(architecture), size("num_key_value_heads"), _of_full(architecture, "FK")
    writer.add_head_count_kv([own if each else full for each in sliding] if full != own else own)
    writer.add_shared_kv_layers(config.get("num_kv_shared_layers") or 0)
    writer.add_embedding_length_per_layer_input(config.get("hidden_size_per_layer_input") or 0)
    writer.add_sliding_window_pattern(sliding)
    width = _of_full(architecture, "FD")
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
    rope = rope_of(architecture.config)["full_attention"]
    half = _of_full(architecture, "FD") // 2
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
    experts=(("model.layers.{l}.experts.down_proj", (2,)), ("model.layers.{l}.experts.gate_up_proj", (0, 1))),
    parts=_gemma4_parts,
    made=_gemma4_made,
    keys=_gemma4_keys,
    check=_gemma4_check,
    tokenizer="gemma4",
)


# -- Mixtral -----------------------------------------------------------------------------------------------------------


def _mixtral_keys(architecture: Architecture, recorder: Recorder) -> None:
    add_common(architecture, recorder)
    recorder.writer.add_vocab_size(architecture.size("vocab_size"))
    recorder.writer.add_rope_dimension_count(head_channels(architecture))


def _mixtral_check(architecture: Architecture) -> None:
    refuse_values(architecture, {**SILU, "sliding_window": (None,)})


def _mixtral_parts(architecture: Architecture, name: str) -> tuple[Part, ...]:
    """Halves of the heads of queries and keys take turns, as llama.cpp rotates neighbours of this architecture."""
    heads = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
    key = heads.get(name.rpartition("self_attn.")[2])
    if key is None:
        return (Part(name),)
    half = head_channels(architecture) // 2
    return (Part(name, Transform(rows=Order((Run(0, (architecture.size(key), 2, half), (0, 2, 1)),)))),)


_MIXTRAL: Final = Kind(
    name="llama",
    maps=("LLAMA",),
    experts=tuple(
        (f"layers.{{l}}.feed_forward.experts.{name}", held) for name, held in (("w1", (0,)), ("w2", (2,)), ("w3", (1,)))
    ),
    parts=_mixtral_parts,
    keys=_mixtral_keys,
    check=_mixtral_check,
    tokenizer="llama",
)


KINDS: Final[Mapping[str, Kind]] = {
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V32,
    "gemma4": _GEMMA4,
    "glm4_moe": _GLM4_MOE,
    "glm4_moe_lite": _GLM4_MOE_LITE,
    "gpt_oss": _GPT_OSS,
    "minimax_m2": _MINIMAX_M2,
    "mixtral": _MIXTRAL,
    "qwen3_5_moe": _QWEN3_5_MOE,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_next": _QWEN3_NEXT,
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

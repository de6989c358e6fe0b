"""Families of llama.cpp whose keys and values are one latent vector: DeepSeek's and their kin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from shardxform.errors import SchemeError
from shardxform.formats.encoding import Cut
from shardxform.runtimes.gguf.architecture import Architecture, Kind, Part, stacks
from shardxform.runtimes.gguf.common_keys import (
    CORRECTED,
    OF_GLM,
    SILU,
    SPLITS_OF_GLM,
    UNBIASED,
    add_common,
    add_gating,
    multiplier,
    needed,
    refuse_large_epsilon,
    refuse_values,
    shared_experts,
    sigmoid_weights,
)
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.gguf.transforms import Order, Run, Transform
from shardxform.runtimes.rotation import rope_of

__all__ = ["LATENT", "latent_parts"]


# -- latent attention: DeepSeek-V3, Kimi-K2, DeepSeek-V3.2, GLM-4.7-Flash ----------------------------------------------


def _latent_keys(
    architecture: Architecture,
    recorder: Recorder,
    weights: Callable[[Any, Mapping[str, Any]], None] = sigmoid_weights,
    **over: Any,  # noqa: ANN401
) -> None:
    """Keys of latent attention, which llama.cpp runs as attention of all heads over one head of latent keys."""
    size, writer, config = architecture.size, recorder.writer, architecture.config
    add_common(architecture, recorder, latent=True, num_key_value_heads=1, head_dim=None, **over)
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
    writer.add_expert_shared_count(shared_experts(architecture))
    weights(writer, config)
    writer.add_rope_dimension_count(size("qk_rope_head_dim"))
    if (scale := rope_of(config).get("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * scale)
    if architecture.nextn:
        writer.add_nextn_predict_layers(architecture.nextn)


_SIGMOID: Final = {**SILU, "scoring_func": ("sigmoid",), "moe_layer_freq": (1,), "rope_interleave": (True,)}


def _latent_check(architecture: Architecture, wanted: Mapping[str, tuple[object, ...]] = _SIGMOID) -> None:
    """Refuse what llama.cpp does not run as it is meant, scales of latent attention among it."""
    refuse_values(architecture, {**wanted, **UNBIASED})
    refuse_large_epsilon(architecture)
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
    _refuse_other_queries(architecture)


def _refuse_other_queries(architecture: Architecture) -> None:
    """Refuse queries that llama.cpp looks for in another way: it tells by counts whether they are made in one step.

    Raises:
        SchemeError: `q_lora_rank` is there, or is missing, where it expects the other.

    """
    layers, found = architecture.layout.num_layers, architecture.config.get("q_lora_rank")
    whole = layers in _WHOLE_QUERIES or (layers, architecture.config.get("vocab_size")) == _KANANA_2
    if architecture.name in _RANKED:
        whole = False
    if (found is None) != whole:
        raise SchemeError(
            f"config.json: q_lora_rank is {found!r}, of {layers} layers; llama.cpp's {architecture.name} has"
            f" {'none' if whole else 'one'} then"
        )


_WHOLE_QUERIES: Final = (26, 27)
"""Numbers of layers by which llama.cpp tells models whose queries are made in one step."""

_KANANA_2: Final = (48, 128256)
"""Layers and tokens of one more."""

_RANKED: Final = ("deepseek32", "glm-dsa")
"""Architectures none of whose models makes them so."""


def latent_parts(architecture: Architecture, name: str) -> tuple[Part, ...]:
    """Part keys and values of all heads, [heads, nope + v, rank]: keys turned, [heads, rank, nope], and values."""
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


def _softmax_weights(writer: Any, config: Mapping[str, Any]) -> None:  # noqa: ANN401
    writer.add_expert_weights_scale(multiplier(config, "routed_scaling_factor"))
    add_gating(writer, "SOFTMAX")


def _deepseek_v2_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Groups count for nothing where the router is greedy, but llama.cpp looks at them wherever there are several."""
    several = (architecture.config.get("n_group") or 1) > 1
    over = {"n_group": None, "topk_group": None} if several else {}
    _latent_keys(architecture, recorder, _softmax_weights, **over)


_SOFTMAX: Final = {**SILU, "scoring_func": ("softmax",), "moe_layer_freq": (1,), "norm_topk_prob": (False, None)}


def _deepseek_v2_check(architecture: Architecture) -> None:
    """Groups are told apart by the best expert of each, in llama.cpp by the best two."""
    _latent_check(architecture, _SOFTMAX)
    config = architecture.config
    if config.get("topk_method", "greedy") != "greedy" and (config.get("n_group") or 1) > 1:
        raise SchemeError(
            f"config.json: topk_method is {config['topk_method']!r} of {config['n_group']} groups, of which llama.cpp"
            " would take others: expected greedy, or one group"
        )


_DEEPSEEK_V2: Final = Kind(
    name="deepseek2",
    maps=("DEEPSEEK2",),
    leads_dense=True,
    parts=latent_parts,
    keys=_deepseek_v2_keys,
    check=_deepseek_v2_check,
)

_DEEPSEEK_V3: Final = Kind(
    name="deepseek2",
    maps=("DEEPSEEK2",),
    spelled=CORRECTED,
    leads_dense=True,
    parts=latent_parts,
    keys=_latent_keys,
    check=_latent_check,
)


def _deepseek_v32_keys(architecture: Architecture, recorder: Recorder) -> None:
    _latent_keys(architecture, recorder)
    recorder.writer.add_indexer_head_count(architecture.size("index_n_heads"))
    recorder.writer.add_indexer_key_length(architecture.size("index_head_dim"))
    recorder.writer.add_indexer_top_k(multiplier(architecture.config, "index_topk"))


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
    spelled=CORRECTED,
    leads_dense=True,
    parts=latent_parts,
    mtp="nextn",
    keys=_deepseek_v32_keys,
    check=_deepseek_v32_check,
    adds_bos=True,
)

_GLM4_MOE_LITE: Final = Kind(
    name="deepseek2",
    maps=("DEEPSEEK2",),
    spelled=CORRECTED,
    leads_dense=True,
    parts=latent_parts,
    mtp="nextn",
    keys=_latent_keys,
    check=_latent_check,
    specials=OF_GLM,
    splits=SPLITS_OF_GLM,
)


# -- GLM-5 -------------------------------------------------------------------------------------------------------------


def _glm_moe_dsa_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Blocks without an indexer of their own are listed, those of MTP layers not."""
    _deepseek_v32_keys(architecture, recorder)
    recorder.writer.add_array(f"{architecture.name}.attention.indexer.types", architecture.which("indexer"))


def _glm_moe_dsa_check(architecture: Architecture) -> None:
    _deepseek_v32_check(architecture)
    refuse_values(architecture, {"indexer_rope_interleave": (True,)})


_GLM_MOE_DSA: Final = replace(
    _DEEPSEEK_V32,
    name="glm-dsa",
    maps=("GLM_DSA",),
    keys=_glm_moe_dsa_keys,
    check=_glm_moe_dsa_check,
    adds_bos=False,
    specials=OF_GLM,
    splits=SPLITS_OF_GLM,
)


# -- Mistral-Small-4 ---------------------------------------------------------------------------------------------------


def _mistral4_weights(writer: Any, config: Mapping[str, Any]) -> None:  # noqa: ANN401
    _softmax_weights(writer, config)
    writer.add_expert_weights_norm(bool(needed(config, "norm_topk_prob")))


def _mistral4_keys(architecture: Architecture, recorder: Recorder) -> None:
    """Queries far on are multiplied by more, which llama.cpp's converter leaves out."""
    _latent_keys(architecture, recorder, _mistral4_weights)
    rope = rope_of(architecture.config)
    if (beta := rope.get("llama_4_scaling_beta")) is not None:
        recorder.writer.add_float32(f"{architecture.name}.attention.temperature_scale", beta)
        length = needed(rope, "original_max_position_embeddings")
        recorder.writer.add_uint32(f"{architecture.name}.attention.temperature_length", length)


def _mistral4_check(architecture: Architecture) -> None:
    _latent_check(architecture, {**_SOFTMAX, "norm_topk_prob": (True, False), "rope_interleave": (True,)})


_MISTRAL4: Final = replace(
    _DEEPSEEK_V2,
    name="mistral4",
    maps=("MISTRAL4",),
    experts=stacks("blk.{l}.ffn_{}_exps", down=2, gate_up=(0, 1)),
    keys=_mistral4_keys,
    check=_mistral4_check,
)


LATENT: Final[Mapping[str, Kind]] = {
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V32,
    "glm4_moe_lite": _GLM4_MOE_LITE,
    "glm_moe_dsa": _GLM_MOE_DSA,
    "kimi_k25": _DEEPSEEK_V3,
    "mistral4": _MISTRAL4,
}
"""What each family becomes, by its name."""

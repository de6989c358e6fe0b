"""Families of llama.cpp whose blocks are alike: heads of keys and values, all of whose tokens are attended to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.architecture import Architecture, Kind, Part
from shardxform.runtimes.gguf.common_keys import (
    CORRECTED,
    OF_GLM,
    SILU,
    SPLITS_OF_GLM,
    UNBIASED,
    add_common,
    add_gating,
    head_channels,
    refuse_values,
    shared_experts,
    sigmoid_weights,
)
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.gguf.transforms import Order, Run, Transform
from shardxform.runtimes.rotation import rope_of

__all__ = ["PLAIN"]


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


def _glm4_moe_keys(architecture: Architecture, recorder: Recorder) -> None:
    size, writer, config = architecture.size, recorder.writer, architecture.config
    add_common(architecture, recorder)
    writer.add_rope_dimension_count(
        int(head_channels(architecture) * rope_of(config).get("partial_rotary_factor", 0.5))
    )
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


# -- MiniMax-M2 --------------------------------------------------------------------------------------------------------


def _minimax_m2_keys(architecture: Architecture, recorder: Recorder) -> None:
    writer, config = recorder.writer, architecture.config
    add_common(architecture, recorder)
    writer.add_expert_feed_forward_length(architecture.size("intermediate_size"))
    partial = rope_of(config).get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(config.get("rotary_dim") or int(head_channels(architecture) * partial))
    add_gating(writer, "SIGMOID")


def _minimax_m2_check(architecture: Architecture) -> None:
    wanted = {**SILU, "scoring_func": ("sigmoid",), "use_qk_norm": (True,), "qk_norm_type": ("per_layer",)}
    wanted["tie_word_embeddings"] = (False, None)
    refuse_values(architecture, wanted)


_MINIMAX_M2: Final = Kind(
    name="minimax-m2",
    maps=("MINIMAXM2",),
    spelled=CORRECTED,
    experts=tuple(
        (f"model.layers.{{l}}.block_sparse_moe.experts.{name}", held)
        for name, held in (("w1", (0,)), ("w2", (2,)), ("w3", (1,)))
    ),
    splits={"gpt-4o": "minimax-m2"},
    keys=_minimax_m2_keys,
    check=_minimax_m2_check,
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


PLAIN: Final[Mapping[str, Kind]] = {
    "glm4_moe": _GLM4_MOE,
    "minimax_m2": _MINIMAX_M2,
    "mixtral": _MIXTRAL,
    "qwen3_moe": _QWEN3_MOE,
}
"""What each family becomes, by its name."""

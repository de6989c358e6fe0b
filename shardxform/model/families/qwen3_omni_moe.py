"""Qwen3-Omni: Qwen3-MoE as the thinker, which is pruned; the talker has experts of its own, which stay.

Names and shapes from the release of Qwen3-Omni-30B-A3B and transformers' `qwen3_omni_moe`.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families import qwen3_moe
from shardxform.model.families.base import TYPES, Family, Template, Wrapper

__all__ = ["FAMILY"]

_LIKE: Final = qwen3_moe.FAMILY
_PARTS: Final = ("thinker.visual.*", "thinker.audio_tower.*", "talker.*", "code2wav.*")

FAMILY: Final = Family(
    name="qwen3_omni_moe",
    wrappers=(
        Wrapper(
            "Qwen3OmniMoeForConditionalGeneration",
            "qwen3_omni_moe",
            "thinker_config.text_config",
            "thinker.model.",
            head="thinker.lm_head",
        ),
    ),
    count_keys=_LIKE.count_keys,
    other_counts=tuple(f"talker_config.text_config.{key}" for key in _LIKE.count_keys),
    root=_LIKE.root,
    block=_LIKE.block,
    towers=tuple(Template(name, "?", "vision", optional=True) for name in _PARTS),
    symbols=_LIKE.symbols,
    types={
        **{key: value for key, value in TYPES.items() if key != "tie_word_embeddings"},
        "decoder_sparse_step": "int",
        "intermediate_size": "int",
        "mlp_only_layers": "list of int or null",
        "norm_topk_prob": "bool",
        "num_experts": "int",
        "router_aux_loss_coef": "float",
        "sliding_window": "int or null",
    },
    wrapper_types={
        "assistant_token_id": "int",
        "code2wav_config": "object or null",
        "enable_audio_output": "bool",
        "im_end_token_id": "int",
        "im_start_token_id": "int",
        "initializer_range": "float or null",
        "system_token_id": "int",
        "talker_config": "object or null",
        "thinker_config": "object or null",
        "tts_bos_token_id": "int",
        "tts_eos_token_id": "int",
        "tts_pad_token_id": "int",
        "user_token_id": "int",
    },
    conditions=_LIKE.conditions,
    moe="moe",
    keep_16bit=_LIKE.keep_16bit,
    merged=_LIKE.merged,
    formats=(),
    unread="transformers leaves experts of the thinker at random values",
    not_run="transformers has no class of its decoder alone",
)

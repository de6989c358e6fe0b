"""Changes to the config of a small model, of which a runtime must make what transformers does, or be refused it.

Most are keys that a runtime may not read: activations, windows, how positions are rotated, how experts are weighed.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from strategies import ALL

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "truncate": True}
ROTATIONS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": YARN,
    "yarn and its magnitude": {**YARN, "attention_factor": 1.5},
    "yarn and its range": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn and one scale": {**YARN, "mscale": 0.7},
    "yarn and both scales": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "another base": {"rope_type": "default", "rope_theta": 500.0},
    "dynamic and its alpha": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    "half of the channels": {"rope_type": "default", "partial_rotary_factor": 0.5},
}
OTHERS: dict[str, Any] = {
    "attention_bias": True,
    "attention_chunk_size": 8,
    "attention_multiplier": 0.0,
    "attn_temperature_tuning": False,
    "clip_qkv": 0.05,
    "decoder_sparse_step": 2,
    "expert_selection_fn": "softmax",
    "first_k_dense_replace": 0,
    "floor_scale": 8,
    "gating": "per-element",
    "head_dim": 32,
    "hidden_act": "gelu",
    "hidden_activation": "relu",
    "index_topk": 12,
    "layer_types": ["full_attention", "sliding_attention"],
    "logits_scaling": 3.0,
    "mamba_hidden_act": "gelu",
    "mamba_proj_bias": True,
    "max_window_layers": 1,
    "mlp_bias": True,
    "moe_router_logit_softcapping": 5.0,
    "mlp_hidden_act": "silu",
    "moe_layer_interval": 2,
    "moe_norm_min": 0.5,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_key_value_heads": 1,
    "q_lora_rank": None,
    "qkv_bias": False,
    "attention_value_scale": None,
    "logit_scale": 0.3,
    "rms_norm_eps": 0.01,
    "rope_interleave": False,
    "routed_scaling_factor": 7.0,
    "scoring_func": "softmax",
    "shared_expert_combination_strategy": "sum",
    "sliding_window": 4,
    "time_step_limit": [0.0, 0.5],
    "topk_method": "group_limited_greedy",
    "tie_word_embeddings": True,
    "use_bias": True,
    "use_conv_bias": False,
    "use_qk_norm": False,
    "use_sliding_window": True,
}
MISSING = ("norm_topk_prob", "routed_scaling_factor", "rope_interleave", "tie_word_embeddings", "use_qk_norm")


def changes(families: Iterable[str], by_day: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Families and names of changes: a few, or all where SHARDXFORM_TESTS=all."""
    kinds = [f"rotated: {each}" for each in ROTATIONS] + ["as older releases say it", *OTHERS]
    kinds += [f"missing: {each}" for each in MISSING]
    return [(family, kind) for kind in kinds for family in families] if ALL else list(by_day)


def changed(family: str, kind: str, over: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """What is other in the model that `over` makes; keys of its config.json that are set, and that are left out.

    The test is skipped where the family has no such key.
    """
    import any_moe
    from transformers import AutoConfig

    config = any_moe.tiny_config(family, **over)
    key, rope = kind.removeprefix("missing: "), config.get("rope_parameters") or {}
    if key not in config if key in {*OTHERS, *MISSING} else "full_attention" in rope:
        pytest.skip(f"{family} has no {key}")
    rope = {key: rope[key] for key in ("partial_rotary_factor", "mrope_section") if key in rope}
    rope["rope_theta"] = 10000.0
    if kind.startswith("rotated: "):
        return {"rope_parameters": {**rope, **ROTATIONS[kind.removeprefix("rotated: ")]}}, {}, ()
    if kind == "as older releases say it":
        told = {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
        return {"rope_parameters": {**rope, **ROTATIONS["linear"]}}, told, ("rope_parameters",)
    if kind.startswith("missing: "):
        usual = any_moe.text_of(AutoConfig.for_model(any_moe.CLASSES.get(family, family)).to_dict())
        return {key: usual[key]}, {}, (key,)
    return {kind: copy.deepcopy(OTHERS[kind])}, {}, ()  # transformers renames in place


def edited(root: Path, told: dict[str, Any], without: tuple[str, ...]) -> Path:
    """A checkpoint with other keys of its decoder in its config.json."""
    import any_moe

    path = root / "config.json"
    config = json.loads(path.read_text())
    text = any_moe.text_of(config)
    for key in without:
        text.pop(key, None)
    text.update(told)
    path.write_text(json.dumps(config))
    return root


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """Skip a test of what transformers itself does not take, or not run."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (StrictDataclassError, AttributeError, RuntimeError, TypeError, ValueError) as e:
        pytest.skip(f"transformers: {e}")

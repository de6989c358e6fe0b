"""Tiny random checkpoints of any MoE type, made through transformers alone: names and shapes of releases.

The config starts from transformers' own class, its sizes made small and its counts set; `save_pretrained` turns the
names of modules back into those of releases. Every tensor gets random values, and so do buffers such as correction
biases.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()

EXPERTS, TOP_K, LAYERS, VOCAB = 6, 2, 2, 258
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 96,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 2048,
    "swa_head_dim": 16,
    "swa_v_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 257,
    "eos_token_id": 256,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 128,
    "num_global_key_value_heads": 2,
    "shared_experts_intermediate_size": 32,
    "prefix_dense_intermediate_size": 96,
    "swa_attention_head_dim": 16,
}
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_KS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk", "moe_top_k")
NOT_KEPT = (
    *("transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config", "_name_or_path"),
    *("rope_scaling", "rope_theta", "per_layer_config"),
)


def _renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    for pattern, new in renames:
        name = re.sub(pattern, new, name)
    return name


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The innermost config of a decoder."""
    for key in ("text_config", "thinker_config"):
        if isinstance(config.get(key), dict):
            return text_of(config[key])
    return config


def plain(value: Any) -> Any:
    """Without transformers' own spelling of infinity."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"].replace("Infinity", "inf"))
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def tiny_config(model_type: str, *, layers: int = LAYERS, experts: int = EXPERTS, **over: Any) -> dict[str, Any]:
    """Keys of a small config; `over` replaces what is not as the type wants it."""
    c = dict(text_of(plain(AutoConfig.for_model(model_type).to_dict())))
    before = c.get("num_hidden_layers", layers)
    for key in NOT_KEPT:
        c.pop(key, None)
    c |= {key: value for key, value in SIZES.items() if key in c and (c[key] is not None or key == "head_dim")}
    c |= {key: experts for key in COUNTS if key in c} | {key: TOP_K for key in TOP_KS if key in c}
    c |= {key: 1 for key in ("n_group", "num_expert_group", "topk_group") if c.get(key) is not None}
    c |= {key: 1 for key in ("first_k_dense_replace", "num_dense_layers") if key in c}
    for key, value in list(c.items()):
        if isinstance(value, list) and len(value) == before and before > layers:
            c[key] = shortened(value, layers)
    c["num_hidden_layers"] = layers
    if "mlp_only_layers" in c:
        c["mlp_only_layers"] = [0] if c["mlp_only_layers"] else []
    if "moe_layer_end_index" in c:
        c["moe_layer_end_index"] = layers - 1
    if "n_shared_experts" in c and not c["n_shared_experts"]:
        c["n_shared_experts"] = 1
    if "kv_lora_rank" in c:
        c["num_key_value_heads"] = 4
        if "head_dim" in c:
            c["head_dim"] = c.get("qk_rope_head_dim", 16)
    return {**c, **over}


def shortened(values: list[Any], layers: int) -> list[Any]:
    """A list with one entry a layer, of fewer layers and as many kinds as fit."""
    if not all(isinstance(each, (str, int)) for each in values):
        return values[:layers]
    others = [each for each in dict.fromkeys(values) if each != values[0]]
    return (values[:1] + others + [values[-1]] * layers)[:layers]


def randomized(model: Any, seed: int = 0) -> Any:
    """Give every parameter and buffer random values that bfloat16 holds; norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or re.search("rotary|inv_freq", name):
                continue
            around = 1.0 if re.search(r"norm.*weight$|scale|scalar", name) else 0.0
            values = torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.ndim > 1 else 0.05) + around
            tensor.copy_(values.bfloat16())
    return model


def class_of(name: str) -> Any:
    """A class of transformers by its name; that which finds the class of a decoder where there is none."""
    return getattr(transformers, name) if name else AutoModelForCausalLM


def build(
    model_type: str, seed: int = 0, *, class_name: str = "", around: dict[str, Any] | None = None, **over: Any
) -> Any:
    """The whole model in memory, float32; `around` is the config of a class that nests that of its decoder."""
    text = tiny_config(model_type, **over)
    if around is None:
        config = AutoConfig.for_model(**text)
    else:
        inside = {**around.get("thinker_config", around), "text_config": text}
        config = AutoConfig.for_model(
            model_type, **({**around, "thinker_config": inside} if "thinker_config" in around else inside)
        )
    of = class_of(class_name)
    model = (
        of.from_config(config, dtype=torch.float32) if not class_name else of._from_config(config, dtype=torch.float32)
    )
    return randomized(model.eval(), seed)


def save(model: Any, root: Path, vocab: int = VOCAB, renames: Sequence[tuple[str, str]] = ()) -> Path:
    """Write a model in bfloat16 as a release has it, and a tokenizer of bytes beside it.

    `renames` are regular expressions and what stands for them, where transformers' way back is not that of releases;
    what is left without a name is left out.
    """
    from test_calibration import byte_tokenizer

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(root)
    if renames:
        (shard,) = root.glob("*.safetensors")
        tensors = {_renamed(name, renames): value for name, value in load_file(shard).items()}
        tensors.pop("", None)
        save_file(tensors, shard, metadata={"format": "pt"})
    config = (root / "config.json").read_text()
    byte_tokenizer(root, vocab_size=vocab)
    (root / "config.json").write_text(json.dumps({**json.loads(config), "dtype": "bfloat16"}, indent=2))
    return root

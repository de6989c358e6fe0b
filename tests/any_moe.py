"""Tiny random checkpoints of any MoE type, made through transformers alone: names and shapes of releases.

The config starts from transformers' own class, its sizes made small and its counts set; `save_pretrained` turns the
names of modules back into those of releases. Every tensor gets random values, and so do buffers such as correction
biases.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoRoundConfig
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
VISION_SIZES = {
    **dict.fromkeys(("depth", "num_hidden_layers"), 2),
    **dict.fromkeys(("num_heads", "num_attention_heads"), 2),
    **dict.fromkeys(("hidden_size", "embed_dim"), 32),
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "projection_hidden_size": 32,
    "projector_hidden_size": 48,
}
"""Of a vision tower, and of what joins it to the decoder."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_KS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_topk", "moe_top_k")
CLASSES = {"kimi_k2": "deepseek_v3"}
"""Types that transformers does not know, and the type whose class they are of."""
TEXTS = {"mistral3": "mistral4"}
"""Types of classes around a decoder of another type than theirs by default."""
NOT_KEPT = (
    *("transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config", "_name_or_path"),
    *("rope_scaling", "rope_theta", "per_layer_config"),
)


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
    model_type = CLASSES.get(model_type, model_type)
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
    """Give all that a checkpoint holds random values that bfloat16 holds; norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or name not in stored:
                continue
            around = 1.0 if re.search(r"norm.*weight$|scale|scalar", name) else 0.0
            values = torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.ndim > 1 else 0.05) + around
            tensor.copy_(values.bfloat16())
    return model


def whole_config(
    model_type: str, *, vision: dict[str, Any] | None = None, around: dict[str, Any] | None = None, **over: Any
) -> dict[str, Any]:
    """Keys of a small config, of a multimodal class where the type is one: `over` is for its text, `vision` not.

    `around` is what such a class has around the config of its decoder, where that is not found by itself.
    """
    text = tiny_config(TEXTS.get(model_type, model_type), **over)
    if around is not None:
        inside = {**around.get("thinker_config", around), "text_config": text}
        whole = {**around, "thinker_config": inside} if "thinker_config" in around else inside
        return {**whole, "model_type": model_type}
    whole = plain(AutoConfig.for_model(CLASSES.get(model_type, model_type)).to_dict())
    if not isinstance(whole.get("vision_config"), dict):
        return text
    tower = {key: VISION_SIZES.get(key, value) for key, value in whole["vision_config"].items() if key not in NOT_KEPT}
    top = {key: VISION_SIZES.get(key, value) for key, value in whole.items() if key not in NOT_KEPT}
    return {**top, "tie_word_embeddings": False, "text_config": text, "vision_config": {**tower, **(vision or {})}}


def class_of(config: dict[str, Any], name: str = "") -> Any:
    """What makes a model of a config: a class of transformers by its name, or what finds it."""
    if name:
        return getattr(transformers, name)
    return AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM


def build(
    model_type: str, seed: int = 0, *, class_name: str = "", around: dict[str, Any] | None = None, **over: Any
) -> Any:
    """The whole model in memory, float32; `around` is the config of a class that nests that of its decoder."""
    config = whole_config(model_type, around=around, **over)
    of = class_of(config, class_name)
    make = of._from_config if class_name else of.from_config
    return randomized(make(AutoConfig.for_model(**config), dtype=torch.float32).eval(), seed)


def of_text(model: Any) -> Any:
    """What gives logits of text: of transformers 5.24, Llama 4's multimodal class cannot without an image."""
    return getattr(model, "language_model" if "Llama4" in type(model).__name__ else "thinker", model)


def renamed(name: str, names: Sequence[tuple[str, str]]) -> str:
    """What a release calls a tensor; nothing where it has none."""
    for pattern, released in names:
        name = re.sub(pattern, released, name)
    return name


def save(
    model: Any,
    root: Path,
    vocab: int = VOCAB,
    model_type: str = "",
    renames: Sequence[tuple[str, str]] = (),
    turned: str = "",
) -> Path:
    """Write a model in bfloat16 as a release has it, and a tokenizer of bytes beside it.

    `renames` are regular expressions and what stands for them, where transformers' way back is not that of releases;
    what is left without a name is left out. `turned` is a pattern of the names, as transformers saves them, of tensors
    that releases have with their last two dimensions the other way round.
    """
    from build import raw, read_checkpoint, write_checkpoint
    from test_calibration import byte_tokenizer

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(root)
    if renames or turned:
        tensors, config = read_checkpoint(root), json.loads((root / "config.json").read_text())
        for name in [name for name in tensors if turned and re.search(turned, name)]:
            tensors[name] = raw(torch.tensor(tensors[name].float32()).bfloat16().mT)
        shutil.rmtree(root)
        released = {renamed(name, renames): value for name, value in tensors.items()}
        released.pop("", None)
        write_checkpoint(root, released, config)
    config = json.loads((root / "config.json").read_text()) | {"dtype": "bfloat16"}
    byte_tokenizer(root, vocab_size=vocab)
    config["model_type"] = model_type or config["model_type"]
    (root / "config.json").write_text(json.dumps(config, indent=2))
    return root


def load(root: Path, dtype: torch.dtype, class_name: str = "") -> tuple[Any, dict[str, Any]]:
    """What transformers makes of a checkpoint, and what it says of the keys it found."""
    config = json.loads((root / "config.json").read_text())
    known = CLASSES.get(config["model_type"])
    over: dict[str, Any] = {"config": AutoConfig.for_model(**{**config, "model_type": known})} if known else {}
    if config.get("quantization_config", {}).get("quant_method") == "gptq":  # whose own loader is not installed
        over["quantization_config"] = AutoRoundConfig(backend="torch")
    return class_of(config, class_name).from_pretrained(root, dtype=dtype, output_loading_info=True, **over)

"""Tiny checkpoints of every family that is written as GGUF, and what llama.cpp and its converter make of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from small_configs import SMALL_OMNI

from shardxform.base.tensors import TensorRef
from shardxform.checkpoint.table import Checkpoint
from shardxform.formats.encoding import Opener
from shardxform.model.expected import expected
from shardxform.model.layout import layout_of
from shardxform.plan.view import View, pruned_view
from shardxform.runtimes.gguf.architecture import Architecture, Named
from shardxform.runtimes.gguf.architectures import architecture_of
from shardxform.runtimes.gguf.keys import Key
from shardxform.runtimes.gguf.metadata import metadata_of

VOCAB = 320
LINEAR = {"layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
GEMMA = {
    "layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "enable_moe_block": True,
    "moe_intermediate_size": 32,
    "per_layer_config": {"3": {"head_dim": 32}},
}
UNSCALED = {"rope_type": "default", "rope_theta": 10000.0}
WINDOWS = {
    "layers": 3,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
INDEXED = {"index_topk": 8, "index_n_heads": 16}
"""Of fewer heads all have no use for many tokens, of which any may be chosen."""
MULTIPLIED = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.7,
}
MAMBA = {"ssm_state_size": 16, "n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 32, "chunk_size": 16}
NEMOTRON = {**MAMBA, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "moe_latent_size": 32}
GRANITE_4 = {
    "layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    **dict.fromkeys(("mamba_chunk_size", "mamba_d_head", "mamba_d_state"), 16),
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
}
LLAMA_4 = {
    "layers": 4,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 96,
    "interleave_moe_layer_step": 2,
    **dict.fromkeys(("layer_types", "no_rope_layers", "moe_layers")),
}
MISTRAL_ROPE = {
    **YARN,
    **dict.fromkeys(("mscale", "mscale_all_dim"), 1.0),
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.1,
    "partial_rotary_factor": 0.5,
}
COHERE = {
    **WINDOWS,
    "expert_selection_fn": "sigmoid",
    "first_k_dense_replace": 1,
    "intermediate_size": 32,
    "logit_scale": 1.5,
    "mlp_layer_types": None,
    "num_shared_experts": 2,
    "prefix_dense_intermediate_size": 96,
    "rms_norm_eps": 1e-6,
}
OVER: dict[str, dict[str, Any]] = {
    "afmoe": {
        "mup_enabled": True,
        "route_scale": 2.5,
        **WINDOWS,
        "layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "cohere2_moe": COHERE,
    "deepseek_v2": {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek_v3": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}},
    "deepseek_v32": {"index_head_dim": 128, **INDEXED},
    "dots1": {"num_key_value_heads": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "ernie4_5_moe": {},
    "exaone_moe": WINDOWS,
    "gemma4_text": GEMMA,
    "glm4_moe": {"attention_bias": True, "use_qk_norm": True},
    "glm4_moe_lite": {},
    "glm4v_moe": {"rope_parameters": {**ROTATED, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm_moe_dsa": {"index_head_dim": 64, "indexer_types": ["full", "shared"], **INDEXED},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {**YARN, "truncate": True}},
    "granitemoe": MULTIPLIED,
    "granitemoeshared": MULTIPLIED,
    "granitemoehybrid": {**GRANITE_4, **MULTIPLIED},
    "hunyuan_v1_moe": {
        "tie_word_embeddings": True,
        "moe_topk": [2, 2],
        "moe_intermediate_size": [96, 96],
        "num_shared_expert": [1, 1],
    },
    "hy_v3": {},
    "jamba": {"layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_k2": {},
    "kimi_k25": {},
    "kimi_linear": {
        "layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "rms_norm_eps": 1e-6,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "laguna": {
        **WINDOWS,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_attention_heads_per_layer": [4, 8, 4],
        "moe_routed_scaling_factor": 2.5,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {
            "full_attention": {**YARN, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
        },
    },
    "lfm2_moe": {"layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": LLAMA_4,
    "mellum": {"rope_parameters": {"full_attention": YARN, "sliding_attention": UNSCALED}, **WINDOWS},
    "mimo_v2_flash": {**WINDOWS, "v_head_dim": 8, "mlp_layer_types": ["dense", "sparse", "sparse"], "head_dim": 32},
    "minimax_m2": {},
    "mistral3": {"head_dim": 32, "qk_head_dim": 32, "rope_parameters": MISTRAL_ROPE},
    "mixtral": {},
    "nemotron_h": NEMOTRON,
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {},
    "qwen3_5_moe": {**LINEAR, "rope_parameters": {**ROTATED, "mrope_section": [1, 1, 0]}},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": LINEAR,
    "qwen3_omni_moe": {
        "class_name": "Qwen3OmniMoeForConditionalGeneration",
        "around": SMALL_OMNI,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "qwen3_vl_moe": {
        "moe_intermediate_size": 96,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        "vision": {"deepstack_visual_indexes": [0, 1]},
    },
    "solar_open": {"rope_parameters": {**ROTATED, "partial_rotary_factor": 1.0}},
}
"""Model types, by what is not as `any_moe` makes them."""

RENAMES = {
    "kimi_linear": ((r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj"),),
    "kimi_k25": (
        (r"language_model\.model\.blocks\.", "language_model.model.layers."),
        (r"vision_tower\.encoder\.patch_embed\.proj", "vision_tower.patch_embed.proj"),
        (r"^model\.mm_projector\.", "mm_projector."),
    ),
}
"""What releases call tensors, where transformers' way back is another."""

STACKS = r"experts\.(gate_up|down)_proj$"
"""Tensors that releases of Qwen3-VL have with their last dimensions the other way round."""

MADE = {
    "afmoe": ("cd3b14f47ebda2fc", "5bd5518fab1b9907"),
    "cohere2_moe": ("d39e986915e90a7e", "6c639e9ca3d15f83"),
    "deepseek_v2": ("96abe3a4139ce98d", "f152bb6664058326"),
    "deepseek_v3": ("f4943e29a623f8d5", "795de4cb2de64f1b"),
    "deepseek_v32": ("904a4f20ff3778d7", "3dbe9c3be3cfa082"),
    "dots1": ("65b1512a35f6b29b", "bf8a756a52391d61"),
    "ernie4_5_moe": ("e12a34ed418a2fc0", "292da93d0f63af2b"),
    "exaone_moe": ("b34b7b22b8c68335", "6ee98a922991a464"),
    "gemma4_text": ("2680ba2bd2c2cf04", "eeb2310500b09271"),
    "glm4_moe": ("ee7a43237b64ac1e", "c9a305d7abeafc37"),
    "glm4_moe_lite": ("f4943e29a623f8d5", "7a82a3fe4a2e3fba"),
    "glm4v_moe": ("1617dbc02350897a", "8a412ba8e36b6b61"),
    "glm_moe_dsa": ("7b8eee6dc72f8330", "f4dd925d7d26ecec"),
    "gpt_oss": ("62fd556990845e95", "406f32094e656e5f"),
    "granitemoe": ("0d2cca4a2e0573c9", "1210cbb1a81a53b8"),
    "granitemoehybrid": ("e3ae28bb380ec30f", "5f623414a2aeefb4"),
    "granitemoeshared": ("6a74d2272093422d", "9b99fc2f48a31d9d"),
    "hunyuan_v1_moe": ("731522e149b4f1ff", "62c870dc8e2fe58a"),
    "hy_v3": ("4d402b4794a7fe55", "e607cc55e2822b7d"),
    "jamba": ("6daa842095cd26c9", "709c9bd5217e8e14"),
    "kimi_k2": ("f4943e29a623f8d5", "85d32631c280b4b0"),
    "kimi_k25": ("8e18e10c3f2f5bda", "85d32631c280b4b0"),
    "kimi_linear": ("db0a4c87114c34a8", "0bdf64f0964e5073"),
    "laguna": ("558a33705f0c3375", "be49bf1955f3acd4"),
    "lfm2_moe": ("2cc989fb60ef2f1b", "e7641e104aea4e90"),
    "llama4_text": ("010719d51795888c", "8e6a9b25d6a5dc88"),
    "mellum": ("10f61d4c760a2710", "0e4b74dca9b3cc48"),
    "mimo_v2_flash": ("8bf73ee88a7ad31a", "7079adafefe64035"),
    "minimax_m2": ("7115d102de5918dd", "fc55cb8e2b47bcda"),
    "mistral3": ("de2358e7137e6daa", "fa9942d60e3a8b65"),
    "mixtral": ("e0a4b43b4d2a515c", "c564cadd99f137dc"),
    "nemotron_h": ("8844338cea6dd0b2", "edbc0f0199a8c92a"),
    "olmoe": ("8bad943354c4a760", "259c6436704d561c"),
    "qwen2_moe": ("9f1dafb19ffb1d84", "53bcf22c0dcbd6a6"),
    "qwen3_5_moe": ("f6a29943fac9bfec", "f90fcf1147f1f085"),
    "qwen3_moe": ("46b74c2fa155dbae", "d6c6767194869f46"),
    "qwen3_next": ("880384147fef47db", "e54a56850c1dff88"),
    "qwen3_omni_moe": ("4dbcc98622b56399", "84a4dba504b8c161"),
    "qwen3_vl_moe": ("441283d401b9303f", "4641fe840f7116fc"),
    "solar_open": ("cc7bc04cf5ecb1d6", "b736a27b8082e64f"),
}

SIGMOID = "expert_gating_func"
MORE = {
    "afmoe": (SIGMOID,),
    "deepseek_v2": (SIGMOID,),
    "deepseek_v3": (SIGMOID,),
    "deepseek_v32": (SIGMOID, "add_bos_token"),  # without which the converter refuses it
    "dots1": (SIGMOID,),
    "exaone_moe": (SIGMOID,),
    "glm4_moe_lite": (SIGMOID,),
    "glm_moe_dsa": (SIGMOID,),
    "kimi_k2": (SIGMOID,),
    "kimi_k25": (SIGMOID,),
    "mimo_v2_flash": (SIGMOID,),
    "minimax_m2": (SIGMOID,),
    "mistral3": (SIGMOID,),
    "nemotron_h": (SIGMOID,),
}
"""Keys that the converter writes only where a config says what is true of the whole family."""

OTHER = {
    "laguna": ("sliding_window_pattern",),
    "afmoe": ("expert_weights_norm",),
    "ernie4_5_moe": ("expert_shared_feed_forward_length",),
    "exaone_moe": ("nextn_predict_layers",),
    "gemma4_text": ("final_logit_softcapping",),
    "glm4_moe": ("nextn_predict_layers",),
    "glm4_moe_lite": ("leading_dense_block_count",),
    "mistral3": ("temperature_length", "temperature_scale"),
    "nemotron_h": ("layer_norm_rms_epsilon",),
    "solar_open": ("leading_dense_block_count", "eot_token_id"),
}
"""Keys that the converter finds to be 0, or does not write where a config has none, for which llama.cpp takes 30: of
logits' cap, of MTP layers, and what it takes from a key that is not written, or
from one of two for one number; ERNIE's shared experts, whose width it
works out of the count of heads; a token of Solar's that it looks up elsewhere."""


def checkpoint(family: str, folder: Path, **over: Any) -> Path:
    """A tiny random one, with a tokenizer that has one merge, and the special tokens that GLM's have."""
    import any_moe

    root = folder / family
    model = any_moe.build(family, vocab_size=VOCAB, **{**OVER[family], **over})
    kind = family if family == "kimi_k2" else ""
    renames, turned = RENAMES.get(family, ()), STACKS if family == "qwen3_vl_moe" else ""
    any_moe.save(model, root, vocab=VOCAB, model_type=kind, renames=renames, turned=turned)
    path = root / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps(of_characters(tokenizer) if family == "gemma4_text" else with_more(tokenizer)))
    config = json.loads((root / "config.json").read_text())
    if family == "minimax_m2":  # as releases have it
        config["rotary_dim"] = 8
    (root / "config.json").write_text(json.dumps(config))
    (root / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 20, "top_p": 0.8}')
    return root


def with_mtp(root: Path) -> Path:
    """The same checkpoint with one more layer, which predicts further tokens, of random values."""
    import any_moe
    import torch
    from build import raw, read_checkpoint, write_checkpoint

    config, tensors, random = json.loads((root / "config.json").read_text()), read_checkpoint(root), torch.Generator()
    mtp = layout_of(config, tensors).family.mtp
    assert mtp is not None
    any_moe.text_of(config)[mtp.count_key] = 1
    for name, item in expected(layout_of(config, tensors), {("mtp", 0): "per-expert"}):
        if item.place.scope == "mtp" and name not in tensors and item.shape and not item.optional:
            values = torch.randn(item.shape, generator=random.manual_seed(len(tensors))) * 0.1
            tensors[name] = raw((values + ("norm" in name)).bfloat16())
    kept = {each.name: each.read_bytes() for each in root.glob("*tok*.json")}
    return write_checkpoint(root.with_name("mtp"), tensors, config, files=kept)


def with_more(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer of bytes with one merge and more tokens."""
    added, vocabulary = tokenizer["added_tokens"], tokenizer["model"]["vocab"]
    vocabulary.update({each["content"]: each["id"] for each in added})
    vocabulary["ab"], tokenizer["model"]["merges"] = len(vocabulary), [["a", "b"]]
    texts = ("[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>", "<think>")
    for at, text in enumerate(texts, len(vocabulary)):
        added.append(token(at, text, special=text != "<think>"))
    return tokenizer


def token(at: int, text: str, *, special: bool) -> dict[str, Any]:
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": at, "content": text, **kind, "special": special}


def of_characters(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer of characters that falls back to bytes, as many tokens as there are rows."""
    texts = [
        "<pad>",
        "<end>",
        "<begin>",
        "<|tool_call>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "ab",
    ]
    texts += [chr(0x4E00 + at) for at in range(VOCAB - 2 - len(texts))]
    added = [token(at, text, special=True) for at, text in enumerate(texts[1:3], 1)]
    added += [token(VOCAB - 2, "▁here", special=False), token(VOCAB - 1, "<|tool_call|>", special=False)]
    model = {**tokenizer["model"], "byte_fallback": True, "vocab": {text: at for at, text in enumerate(texts)}}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    split = {"pre_tokenizer": None, "post_processor": None, "decoder": decoder}
    return {**tokenizer, **split, "added_tokens": added, "model": {**model, "merges": [["a", "b"]]}}


def viewed(root: Path, **options: Any) -> tuple[View, Architecture]:
    view = pruned_view(Checkpoint.open(root), None, **options)
    return view, architecture_of(view.layout)


def read_from(root: Path) -> Any:
    """Fills an array with the bytes of a tensor."""

    def read(ref: TensorRef, array: np.ndarray) -> None:
        parts = []
        for each in ref.ranges:
            with (root / each.file).open("rb") as file:
                file.seek(each.offset)
                parts.append(file.read(each.length))
        array.view("u1").reshape(-1)[...] = np.frombuffer(b"".join(parts), "u1")

    return read


def values_of(root: Path, tensors: Iterable[Named]) -> dict[str, np.ndarray]:
    """Every tensor in float32."""
    opener, out = Opener(read_from(root)), {}
    for named in tensors:
        rows = [piece.open(opener).values(0, piece.shape[0]) for piece in named.pieces]
        found = np.concatenate(rows) if rows else np.array(named.values, "f4")
        out[named.name] = found.reshape(named.shape)
    return out


def digest_of_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}".encode())
        digest.update(np.ascontiguousarray(tensors[name], "<f4").tobytes())
    return digest.hexdigest()[:16]


def digest_of_keys(keys: Mapping[str, tuple[Any, Any]], without: Iterable[str] = ()) -> str:
    """Of names, types and values; the model's name, which is its folder's, is left out."""
    left = {name: each for name, each in keys.items() if not name.endswith(("general.name", *without))}
    return hashlib.sha256(json.dumps(left, sort_keys=True).encode()).hexdigest()[:16]


def as_stored(key: Key) -> tuple[Any, list[str]]:
    """Value and types, as a reader of the file finds them."""
    value = key.value
    if "FLOAT32" in (key.type, key.of):
        value = np.array(value, "f4").tolist()
    return value, [key.type, *([key.of] if key.of else [])]


def keys_of(root: Path, pre_tokenizer: str = "gpt-2") -> dict[str, tuple[Any, list[str]]]:
    view, architecture = viewed(root)
    tensors = list(architecture.tensors(view.checkpoint.tensors))
    found = metadata_of(architecture, tensors, root, name="x", file_type=0, pre_tokenizer=pre_tokenizer)
    return {key.name: as_stored(key) for key in found}

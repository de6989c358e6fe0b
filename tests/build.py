"""Tiny checkpoints for tests, made without the package under test.

`tiny(kind)` gives a config and tensors with a release's real names; `write_checkpoint` puts them into a directory.
Names and shapes are spelled out here a second time, on purpose: they are what the package's templates are tested
against. A `Raw` is a tensor as bytes, so that bfloat16 needs no torch.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = (
    *("qwen3_5_moe", "qwen3_6_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_moe_mixed", "deepseek_v3"),
    *("gpt_oss", "mixtral"),
)
"""What `tiny` can build; each has a session fixture of a written checkpoint in conftest."""

INDEX = "model.safetensors.index.json"

_NUMPY = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "C64": "<c8",
}
_NAMES = {np.dtype(code): name for name, code in _NUMPY.items()}
_WIDEST_FIRST = (  # the reference writer's on-disk order
    ("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    ("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL"),
)
_RANK = {name: rank for rank, name in enumerate(name for names in _WIDEST_FIRST for name in names)}


@dataclass(frozen=True)
class Raw:
    """A tensor as its bytes, with the dtype's name in a header."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> np.ndarray:
        """The elements; bfloat16 as uint16, other dtypes that numpy lacks as uint8."""
        code = _NUMPY.get(self.dtype, "<u2" if self.dtype == "BF16" else "u1")
        return np.frombuffer(self.data, code).reshape(self.shape if self.dtype in (*_NUMPY, "BF16") else -1)

    def float32(self) -> np.ndarray:
        """The elements as float32, of bfloat16 too."""
        if self.dtype == "BF16":
            return (self.array().astype("<u4") << 16).view("<f4")
        return self.array().astype("<f4")


def raw(value: Any) -> Raw:
    """A `Raw` from a numpy array, a torch tensor, `(dtype, shape, bytes)`, or a `Raw`."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, tuple):
        return Raw(value[0], tuple(value[1]), bytes(value[2]))
    if type(value).__module__.partition(".")[0] == "torch":
        import torch

        flat = value.detach().cpu().contiguous()
        name = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}.get(flat.dtype)
        if name:
            return Raw(name, tuple(flat.shape), flat.reshape(-1).view(torch.uint8).numpy().tobytes())
        value = flat.numpy()
    array = np.asarray(value)
    return Raw(
        _NAMES[array.dtype.newbyteorder("<")], array.shape, array.astype(array.dtype.newbyteorder("<")).tobytes()
    )


def bf16(values: np.ndarray) -> Raw:
    """float32 values cut to bfloat16."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4") >> 16
    return Raw("BF16", np.shape(values), bits.astype("<u2").tobytes())


def shard_bytes(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """A whole shard as the reference writer lays it out; `metadata` defaults to `{"format": "pt"}`."""
    raws = {name: raw(value) for name, value in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict({"format": "pt"} if metadata is None else metadata)}
    blobs, end = [], 0
    for name in sorted(raws, key=lambda name: (_RANK[raws[name].dtype], name.encode())):
        tensor = raws[name]
        begin, end = end, end + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        blobs.append(tensor.data)
    return header_bytes(header) + b"".join(blobs)


def header_bytes(header: Any) -> bytes:
    """Length prefix and padded JSON of any object, well-formed or not; bytes are taken as the JSON text itself."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    )
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_shard(path: Path | str) -> dict[str, Raw]:
    """All tensors of a shard, in the header's order."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {
        name: Raw(info["dtype"], tuple(info["shape"]), body[slice(*info["data_offsets"])])
        for name, info in header.items()
    }


def read_checkpoint(root: Path | str) -> dict[str, Raw]:
    """All tensors of all shards in a directory, by shard name."""
    return {name: t for path in sorted(Path(root).glob("*.safetensors")) for name, t in read_shard(path).items()}


def write_checkpoint(
    root: Path | str,
    tensors: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    shards: int | Sequence[str] = 1,
    index: bool | None = None,
    files: Mapping[str, bytes | str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint directory and return its path.

    Args:
        root: made if it is missing.
        tensors: name -> what `raw` takes; dealt to the shards in runs, in the order given.
        config: config.json; none is written when None.
        shards: how many, or their file names.
        index: write the index; by default when there is more than one shard or a name of one is given.
        files: sidecars and whatever else, by name relative to `root`.
        metadata: `__metadata__` of every shard.

    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    if isinstance(shards, int):
        count = shards
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        names = names if count > 1 else ["model.safetensors"]
    else:
        names, count = list(shards), len(shards)
    runs = np.array_split(np.arange(len(tensors)), count)
    items = list(tensors.items())
    weight_map: dict[str, str] = {}
    total = 0
    for name, run in zip(names, runs, strict=True):
        part = dict(items[i] for i in run)
        (root / name).write_bytes(shard_bytes(part, metadata))
        weight_map |= dict.fromkeys(part, name)
        total += sum(len(raw(value).data) for value in part.values())
    if names != ["model.safetensors"] if index is None else index:
        write_json(root / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if config is not None:
        write_json(root / "config.json", config)
    for name, content in (files or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def forget_digests(out: Path) -> Path:
    """Make the record of an output one without digests, as of earlier versions: other checks are to find defects."""
    path = out / "shardxform.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for key in ("digests", "checksum"):
        record.pop(key, None)
    write_json(path, record)
    return out


def write_json(path: Path, value: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def random_tensor(name: str, dtype: str, shape: Sequence[int], seed: int = 0) -> Raw:
    """Values that depend on name and seed alone, of the size that weights have; any bits for integer dtypes."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(tuple(shape)) / 8
    if dtype == "BF16":
        return bf16(values)
    if dtype in ("F16", "F32", "F64"):
        return Raw(dtype, tuple(shape), values.astype(_NUMPY[dtype]).tobytes())
    width = np.dtype(_NUMPY.get(dtype, "u1")).itemsize
    data = rng.integers(0, 2 if dtype == "BOOL" else 256, int(np.prod(shape, dtype=int)) * width, "u1").tobytes()
    return Raw(dtype, tuple(shape), data)


def random_scales(name: str, dtype: str, shape: Sequence[int]) -> Raw:
    """Random, and above zero as scales are: without the sign, the first bit of the last byte of each."""
    found = random_tensor(name, dtype, shape)
    data = bytearray(found.data)
    size = {"F32": 4, "BF16": 2, "F16": 2}[dtype]
    data[size - 1 :: size] = bytes(byte & 0x7F for byte in data[size - 1 :: size])
    return Raw(dtype, found.shape, bytes(data))


def random_tensors(shapes: Mapping[str, Sequence[int]], seed: int = 0, dtype: str = "BF16") -> dict[str, Raw]:
    """One random tensor per name; names that releases keep in float32 are F32."""
    return {
        name: random_tensor(name, "F32" if name.endswith(_FLOAT32) else dtype, shape, seed)
        for name, shape in shapes.items()
    }


_FLOAT32 = ("linear_attn.A_log", "linear_attn.norm.weight", "e_score_correction_bias")


def tiny(
    kind: str,
    *,
    seed: int = 0,
    experts: str | None = None,
    mtp: str | None = None,
    dtype: str = "BF16",
    **over: Any,
) -> tuple[dict[str, Any], dict[str, Raw]]:
    """Config and tensors of a tiny model with a release's names.

    Args:
        kind: one of `KINDS`. `qwen3_5_moe` is multimodal with per-expert MTP, `qwen3_6_moe` the same with fused MTP,
            `qwen3_moe_mixed` has dense layers through mlp_only_layers and decoder_sparse_step.
        seed: of the values.
        experts: `fused` or `per-expert` where it should differ from the release's.
        mtp: the same for the MTP layer.
        dtype: of everything but what releases keep in float32.
        over: keys of the text config, overridden (None values are written as null).

    """
    config, shapes = _RELEASES[kind](experts, mtp, over)
    return config, random_tensors(shapes, seed, dtype)


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the decoder."""
    return config.get("text_config", config)


Shapes = dict[str, tuple[int, ...]]


def _experts(prefix: str, spelling: str, c: Mapping[str, Any], count: int) -> Shapes:
    h, i = c["hidden_size"], c["moe_intermediate_size"]
    if spelling == "fused":
        return {f"{prefix}.gate_up_proj": (count, 2 * i, h), f"{prefix}.down_proj": (count, h, i)}
    return {name: shape for e in range(count) for name, shape in _mlp(f"{prefix}.{e}", i, h).items()}


def _mlp(prefix: str, width: int, h: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (width, h),
        f"{prefix}.up_proj.weight": (width, h),
        f"{prefix}.down_proj.weight": (h, width),
    }


def _grouped_attention(prefix: str, c: Mapping[str, Any], gated: bool) -> Shapes:
    h, d = c["hidden_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    shapes: Shapes = {
        f"{prefix}.q_proj.weight": (queries * (2 if gated else 1), h),
        f"{prefix}.k_proj.weight": (keys, h),
        f"{prefix}.v_proj.weight": (keys, h),
        f"{prefix}.o_proj.weight": (h, queries),
        f"{prefix}.q_norm.weight": (d,),
        f"{prefix}.k_norm.weight": (d,),
    }
    if c.get("attention_bias"):
        shapes |= {f"{prefix}.{p}_proj.bias": (shapes[f"{prefix}.{p}_proj.weight"][0],) for p in "qkvo"}
    return shapes


def _linear_attention(prefix: str, c: Mapping[str, Any]) -> Shapes:
    h = c["hidden_size"]
    values = c["linear_num_value_heads"] * c["linear_value_head_dim"]
    mixed = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"] + values
    return {
        f"{prefix}.in_proj_qkv.weight": (mixed, h),
        f"{prefix}.in_proj_z.weight": (values, h),
        f"{prefix}.in_proj_a.weight": (c["linear_num_value_heads"], h),
        f"{prefix}.in_proj_b.weight": (c["linear_num_value_heads"], h),
        f"{prefix}.out_proj.weight": (h, values),
        f"{prefix}.conv1d.weight": (mixed, 1, c["linear_conv_kernel_dim"]),
        f"{prefix}.A_log": (c["linear_num_value_heads"],),
        f"{prefix}.dt_bias": (c["linear_num_value_heads"],),
        f"{prefix}.norm.weight": (c["linear_value_head_dim"],),
    }


def _ends(prefix: str, c: Mapping[str, Any]) -> Shapes:
    v, h = c["vocab_size"], c["hidden_size"]
    head: Shapes = {} if c.get("tie_word_embeddings") else {"lm_head.weight": (v, h)}
    return {f"{prefix}embed_tokens.weight": (v, h), f"{prefix}norm.weight": (h,), **head}


def _norms(prefix: str, c: Mapping[str, Any]) -> Shapes:
    h = c["hidden_size"]
    return {f"{prefix}.input_layernorm.weight": (h,), f"{prefix}.post_attention_layernorm.weight": (h,)}


def _qwen3_5_block(prefix: str, c: Mapping[str, Any], linear: bool, spelling: str) -> Shapes:
    h, s, count = c["hidden_size"], c["shared_expert_intermediate_size"], c["num_experts"]
    attention = (
        _linear_attention(f"{prefix}.linear_attn", c) if linear else _grouped_attention(f"{prefix}.self_attn", c, True)
    )
    return {
        **_norms(prefix, c),
        **attention,
        f"{prefix}.mlp.gate.weight": (count, h),
        **_experts(f"{prefix}.mlp.experts", spelling, c, count),
        **_mlp(f"{prefix}.mlp.shared_expert", s, h),
        f"{prefix}.mlp.shared_expert_gate.weight": (1, h),
    }


def _vision(v: Mapping[str, Any]) -> Shapes:
    h, i, merged = v["hidden_size"], v["intermediate_size"], v["hidden_size"] * v["spatial_merge_size"] ** 2
    patch = (v["in_channels"], v["temporal_patch_size"], v["patch_size"], v["patch_size"])
    shapes: Shapes = {
        "patch_embed.proj.weight": (h, *patch),
        "patch_embed.proj.bias": (h,),
        "pos_embed.weight": (v["num_position_embeddings"], h),
        "merger.norm.weight": (h,),
        "merger.norm.bias": (h,),
        "merger.linear_fc1.weight": (merged, merged),
        "merger.linear_fc1.bias": (merged,),
        "merger.linear_fc2.weight": (v["out_hidden_size"], merged),
        "merger.linear_fc2.bias": (v["out_hidden_size"],),
    }
    for b in range(v["depth"]):
        linears = {"attn.qkv": (3 * h, h), "attn.proj": (h, h), "mlp.linear_fc1": (i, h), "mlp.linear_fc2": (h, i)}
        for name, shape in linears.items():
            shapes |= {f"blocks.{b}.{name}.weight": shape, f"blocks.{b}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{b}.{name}.weight": (h,), f"blocks.{b}.{name}.bias": (h,)}
    return {f"model.visual.{name}": shape for name, shape in shapes.items()}


def _qwen3_5(multimodal: bool, default_mtp: str) -> Callable[..., tuple[dict[str, Any], Shapes]]:
    def release(experts: str | None, mtp: str | None, over: Mapping[str, Any]) -> tuple[dict[str, Any], Shapes]:
        text: dict[str, Any] = {
            "model_type": "qwen3_5_moe_text",
            "dtype": "bfloat16",
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "attn_output_gate": True,
            "attention_bias": False,
            "linear_conv_kernel_dim": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "vocab_size": 48,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "mtp_num_hidden_layers": 1 if multimodal else 0,
            "tie_word_embeddings": False,
            **over,
        }
        prefix = "model.language_model." if multimodal else "model."
        shapes = _ends(prefix, text)
        for layer, kind in zip(range(text["num_hidden_layers"]), text["layer_types"], strict=True):
            block = f"{prefix}layers.{layer}"
            shapes |= _qwen3_5_block(block, text, kind == "linear_attention", experts or "fused")
        if text["mtp_num_hidden_layers"]:
            h = text["hidden_size"]
            shapes |= {"mtp.fc.weight": (h, 2 * h), "mtp.norm.weight": (h,)}
            shapes |= {"mtp.pre_fc_norm_embedding.weight": (h,), "mtp.pre_fc_norm_hidden.weight": (h,)}
            for layer in range(text["mtp_num_hidden_layers"]):
                shapes |= _qwen3_5_block(f"mtp.layers.{layer}", text, False, mtp or default_mtp)
        if not multimodal:
            return {"architectures": ["Qwen3_5MoeForCausalLM"], **text}, shapes
        vision = {
            "model_type": "qwen3_5_moe",
            "depth": 2,
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": 2,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 16,
        }
        config = {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "image_token_id": 40,
            "video_token_id": 41,
            "vision_start_token_id": 42,
            "vision_end_token_id": 43,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "text_config": text,
            "vision_config": vision,
        }
        return config, shapes | _vision(vision)

    return release


def _qwen3(dense: Mapping[str, Any]) -> Callable[..., tuple[dict[str, Any], Shapes]]:
    def release(experts: str | None, _mtp: str | None, over: Mapping[str, Any]) -> tuple[dict[str, Any], Shapes]:
        c: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "torch_dtype": "bfloat16",
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "attention_bias": False,
            "intermediate_size": 24,
            "moe_intermediate_size": 12,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "vocab_size": 48,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            **dense,
            **over,
        }
        shapes = _ends("model.", c)
        for layer in range(c["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            shapes |= {**_norms(prefix, c), **_grouped_attention(f"{prefix}.self_attn", c, False)}
            if layer in c["mlp_only_layers"] or (layer + 1) % c["decoder_sparse_step"]:
                shapes |= _mlp(f"{prefix}.mlp", c["intermediate_size"], c["hidden_size"])
            else:
                count = c.get("num_experts") or c["num_local_experts"]
                shapes[f"{prefix}.mlp.gate.weight"] = (count, c["hidden_size"])
                shapes |= _experts(f"{prefix}.mlp.experts", experts or "per-expert", c, count)
        return c, shapes

    return release


def _deepseek(experts: str | None, mtp: str | None, over: Mapping[str, Any]) -> tuple[dict[str, Any], Shapes]:
    c: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 6,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 7,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "vocab_size": 48,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **over,
    }
    h, v = c["hidden_size"], c["vocab_size"]
    shapes = _ends("model.", c)
    blocks = c["num_hidden_layers"] + c["num_nextn_predict_layers"]
    for layer in range(blocks):
        prefix = f"model.layers.{layer}"
        shapes |= {**_norms(prefix, c), **_latent_attention(f"{prefix}.self_attn", c)}
        if layer < c["first_k_dense_replace"] or layer % c["moe_layer_freq"]:
            shapes |= _mlp(f"{prefix}.mlp", c["intermediate_size"], h)
        else:
            spelling = experts if layer < c["num_hidden_layers"] else mtp
            shapes[f"{prefix}.mlp.gate.weight"] = (c["n_routed_experts"], h)
            shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
            shapes |= _experts(f"{prefix}.mlp.experts", spelling or "per-expert", c, c["n_routed_experts"])
            shapes |= _mlp(f"{prefix}.mlp.shared_experts", c["n_shared_experts"] * c["moe_intermediate_size"], h)
        if layer >= c["num_hidden_layers"]:
            shapes |= {f"{prefix}.{name}.weight": (h,) for name in ("enorm", "hnorm", "shared_head.norm")}
            shapes |= {f"{prefix}.eh_proj.weight": (h, 2 * h)}
            shapes |= {f"{prefix}.{name}.weight": (v, h) for name in ("embed_tokens", "shared_head.head")}
    return c, shapes


def _latent_attention(prefix: str, c: Mapping[str, Any]) -> Shapes:
    h, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    queries = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    if c["q_lora_rank"] is None:
        query: Shapes = {f"{prefix}.q_proj.weight": (queries, h)}
    else:
        query = {
            f"{prefix}.q_a_proj.weight": (c["q_lora_rank"], h),
            f"{prefix}.q_a_layernorm.weight": (c["q_lora_rank"],),
            f"{prefix}.q_b_proj.weight": (queries, c["q_lora_rank"]),
        }
    return {
        **query,
        f"{prefix}.kv_a_proj_with_mqa.weight": (rank + c["qk_rope_head_dim"], h),
        f"{prefix}.kv_a_layernorm.weight": (rank,),
        f"{prefix}.kv_b_proj.weight": (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), rank),
        f"{prefix}.o_proj.weight": (h, heads * c["v_head_dim"]),
    }


def _gpt_oss(experts: str | None, _mtp: str | None, over: Mapping[str, Any]) -> tuple[dict[str, Any], Shapes]:
    c: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "intermediate_size": 12,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "vocab_size": 48,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        **over,
    }
    h, i, d, count = c["hidden_size"], c["intermediate_size"], c["head_dim"], c["num_local_experts"]
    rows = {"q_proj": c["num_attention_heads"] * d, "k_proj": c["num_key_value_heads"] * d, "o_proj": h}
    rows["v_proj"] = rows["k_proj"]
    shapes = _ends("model.", c)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= _norms(prefix, c)
        for name, out in rows.items():
            shapes[f"{prefix}.self_attn.{name}.weight"] = (out, rows["q_proj"] if name == "o_proj" else h)
            if c["attention_bias"]:
                shapes[f"{prefix}.self_attn.{name}.bias"] = (out,)
        shapes[f"{prefix}.self_attn.sinks"] = (c["num_attention_heads"],)
        shapes[f"{prefix}.mlp.router.weight"] = (count, h)
        shapes[f"{prefix}.mlp.router.bias"] = (count,)
        home = f"{prefix}.mlp.experts"
        if experts == "per-expert":
            for e in range(count):
                shapes |= _mlp(f"{home}.{e}", i, h)
                shapes |= {f"{home}.{e}.{n}_proj.bias": (h if n == "down" else i,) for n in ("gate", "up", "down")}
        else:
            shapes |= {f"{home}.gate_up_proj": (count, h, 2 * i), f"{home}.gate_up_proj_bias": (count, 2 * i)}
            shapes |= {f"{home}.down_proj": (count, i, h), f"{home}.down_proj_bias": (count, h)}
    return c, shapes


def _mixtral(_experts: str | None, _mtp: str | None, over: Mapping[str, Any]) -> tuple[dict[str, Any], Shapes]:
    c: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "torch_dtype": "bfloat16",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 12,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "vocab_size": 48,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **over,
    }
    h, i = c["hidden_size"], c["intermediate_size"]
    d = c.get("head_dim") or h // c["num_attention_heads"]
    shapes = _ends("model.", c)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            **_norms(prefix, c),
            f"{prefix}.self_attn.q_proj.weight": (c["num_attention_heads"] * d, h),
            f"{prefix}.self_attn.k_proj.weight": (c["num_key_value_heads"] * d, h),
            f"{prefix}.self_attn.v_proj.weight": (c["num_key_value_heads"] * d, h),
            f"{prefix}.self_attn.o_proj.weight": (h, c["num_attention_heads"] * d),
            f"{prefix}.block_sparse_moe.gate.weight": (c["num_local_experts"], h),
        }
        for e in range(c["num_local_experts"]):
            home = f"{prefix}.block_sparse_moe.experts.{e}"
            shapes |= {f"{home}.w1.weight": (i, h), f"{home}.w2.weight": (h, i), f"{home}.w3.weight": (i, h)}
    return c, shapes


_RELEASES = {
    "qwen3_5_moe": _qwen3_5(multimodal=True, default_mtp="per-expert"),
    "qwen3_6_moe": _qwen3_5(multimodal=True, default_mtp="fused"),
    "qwen3_5_moe_text": _qwen3_5(multimodal=False, default_mtp="per-expert"),
    "qwen3_moe": _qwen3({}),
    "qwen3_moe_mixed": _qwen3({"num_hidden_layers": 5, "mlp_only_layers": [3], "decoder_sparse_step": 2}),
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
    "mixtral": _mixtral,
}


def names_of(shapes: Iterable[str], *fragments: str) -> list[str]:
    """Names that contain every fragment, in order."""
    return [name for name in shapes if all(fragment in name for fragment in fragments)]

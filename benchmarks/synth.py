"""Write a synthetic checkpoint with the names, shapes, dtypes and shard layout of Qwen3.5-35B-A3B.

    python benchmarks/synth.py OUT --layers 4                              10.6 GB, four blocks of the real shape
    python benchmarks/synth.py OUT --layers 40 --vision-depth 27 --sparse  the whole table, 71.9 GB of holes

Weights are normals (std 0.02) that no run of any training gave; norms lie around 0 or 1. The same options give the
same bytes. Memory stays under 200 MB whatever the size: matrices are cut out of one block of normals at places that
depend on their name, so that writing goes at the speed of the disk and no two tensors are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Spec", "Summary", "Tensor", "config", "tensors", "write_checkpoint"]

Kind = Literal["normal", "zero", "one", "alog"]

_WIDTHS: Final = {"BF16": 2, "F32": 4}
_POOL: Final = 1 << 25  # normals in the block that matrices are cut from: 64 MiB in bf16
_PIECE: Final = 1 << 24  # most elements taken from one place of it
_STD: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to write; the defaults are the shapes of the real model, shortened to four decoder blocks.

    Attributes:
        shard_bytes: most tensor data in one shard.
        mtp: write the multi-token-prediction layer.
        vision_depth: blocks of the vision tower, 27 in the real model.
        sparse: leave the data out: files of the right size that take no space.

    """

    layers: int = 4
    experts: int = 256
    top_k: int = 8
    hidden: int = 2048
    inter: int = 512
    vocab: int = 248320
    shard_bytes: int = 5_000_000_000
    text_only: bool = False
    mtp: bool = True
    vision_depth: int = 2
    seed: int = 0
    sparse: bool = False

    @property
    def prefix(self) -> str:
        """What names of the decoder begin with."""
        return "model." if self.text_only else "model.language_model."

    @property
    def full_size(self) -> bool:
        """Whether head counts are the real model's."""
        return self.hidden >= 2048

    @property
    def head_dim(self) -> int:
        """Of full attention."""
        return max(self.hidden // 8, 16)

    @property
    def heads(self) -> tuple[int, int]:
        """Query and key-value heads of full attention."""
        return 16 * self.hidden // 2048 or 2, 2

    @property
    def linear_heads(self) -> tuple[int, int, int]:
        """Key heads, value heads and the size of both in linear attention."""
        return (16, 32, 128) if self.full_size else (2, 4, 32)

    @property
    def vision(self) -> tuple[int, int, int]:
        """Hidden size, intermediate size and heads of the vision tower."""
        return (1152, 4304, 16) if self.full_size else (64, 128, 4)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    kind: Kind = "normal"
    dtype: str = "BF16"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return _WIDTHS[self.dtype] * self.size


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written."""

    tensors: int
    shards: int
    nbytes: int


def write_checkpoint(out: str | os.PathLike[str], spec: Spec) -> Summary:
    """Write the checkpoint that `spec` describes into the directory `out`, replacing files of the same names."""
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    shards = _grouped(list(tensors(spec)), spec.shard_bytes)
    pool = None if spec.sparse else _Pool(spec.seed)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model.safetensors-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
        _write_shard(root / name, shard, pool)
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    _write_json(
        root / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    _write_json(root / "config.json", config(spec))
    generation = {"eos_token_id": spec.vocab - 1, "do_sample": True, "temperature": 0.6}
    _write_json(root / "generation_config.json", generation)
    return Summary(len(weight_map), len(shards), total)


# -- the table ---------------------------------------------------------------------------------------------------------


def tensors(spec: Spec) -> Iterator[Tensor]:
    """Every tensor, in the order in which the release stores them."""
    yield Tensor(f"{spec.prefix}embed_tokens.weight", (spec.vocab, spec.hidden))
    for layer in range(spec.layers):
        block = f"{spec.prefix}layers.{layer}."
        yield from _full_attention(spec, block) if (layer + 1) % 4 == 0 else _linear_attention(spec, block)
        yield from _fused_experts(spec, block)
        yield from _shared_expert(spec, block)
        yield from _block_norms(spec, block)
    yield Tensor(f"{spec.prefix}norm.weight", (spec.hidden,), "zero")
    yield Tensor("lm_head.weight", (spec.vocab, spec.hidden))
    if spec.mtp:
        yield from _mtp(spec)
    if not spec.text_only:
        yield from _vision(spec)


def _linear_attention(spec: Spec, block: str) -> Iterator[Tensor]:
    H = spec.hidden
    keys, values, size = spec.linear_heads
    mixed = 2 * keys * size + values * size
    at = f"{block}linear_attn."
    yield Tensor(f"{at}A_log", (values,), "alog", "F32")
    yield Tensor(f"{at}conv1d.weight", (mixed, 1, 4))
    yield Tensor(f"{at}dt_bias", (values,), "one")
    yield Tensor(f"{at}in_proj_a.weight", (values, H))
    yield Tensor(f"{at}in_proj_b.weight", (values, H))
    yield Tensor(f"{at}in_proj_qkv.weight", (mixed, H))
    yield Tensor(f"{at}in_proj_z.weight", (values * size, H))
    yield Tensor(f"{at}norm.weight", (size,), "one", "F32")
    yield Tensor(f"{at}out_proj.weight", (H, values * size))


def _full_attention(spec: Spec, block: str) -> Iterator[Tensor]:
    H, D = spec.hidden, spec.head_dim
    queries, keys = spec.heads
    at = f"{block}self_attn."
    yield Tensor(f"{at}q_proj.weight", (2 * queries * D, H))  # each query head carries an output gate
    yield Tensor(f"{at}k_proj.weight", (keys * D, H))
    yield Tensor(f"{at}v_proj.weight", (keys * D, H))
    yield Tensor(f"{at}o_proj.weight", (H, queries * D))
    yield Tensor(f"{at}q_norm.weight", (D,), "zero")
    yield Tensor(f"{at}k_norm.weight", (D,), "zero")


def _fused_experts(spec: Spec, block: str) -> Iterator[Tensor]:
    E, H, I = spec.experts, spec.hidden, spec.inter  # noqa: E741
    yield Tensor(f"{block}mlp.experts.down_proj", (E, H, I))
    yield Tensor(f"{block}mlp.experts.gate_up_proj", (E, 2 * I, H))
    yield Tensor(f"{block}mlp.gate.weight", (E, H))


def _shared_expert(spec: Spec, block: str) -> Iterator[Tensor]:
    order = ("gate_proj", "up_proj", "down_proj") if block.startswith("mtp.") else ("down_proj", "gate_proj", "up_proj")
    for name in order:
        yield _projection(spec, f"{block}mlp.shared_expert.", name)
    yield Tensor(f"{block}mlp.shared_expert_gate.weight", (1, spec.hidden))


def _projection(spec: Spec, at: str, name: str) -> Tensor:
    shape = (spec.hidden, spec.inter) if name == "down_proj" else (spec.inter, spec.hidden)
    return Tensor(f"{at}{name}.weight", shape)


def _block_norms(spec: Spec, block: str) -> Iterator[Tensor]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield Tensor(f"{block}{name}.weight", (spec.hidden,), "zero")


def _mtp(spec: Spec) -> Iterator[Tensor]:
    yield Tensor("mtp.fc.weight", (spec.hidden, 2 * spec.hidden))
    block = "mtp.layers.0."
    for expert in range(spec.experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield _projection(spec, f"{block}mlp.experts.{expert}.", name)
    yield Tensor(f"{block}mlp.gate.weight", (spec.experts, spec.hidden))
    yield from _shared_expert(spec, block)
    yield from _full_attention(spec, block)
    yield from _block_norms(spec, block)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield Tensor(f"mtp.{name}.weight", (spec.hidden,), "zero")


def _vision(spec: Spec) -> Iterator[Tensor]:
    V, W, _ = spec.vision
    tower = "model.visual."
    for number in range(spec.vision_depth):
        block = f"{tower}blocks.{number}."
        yield from _linear(f"{block}attn.proj", V, V)
        yield from _linear(f"{block}attn.qkv", 3 * V, V)
        yield from _linear(f"{block}mlp.linear_fc1", W, V)
        yield from _linear(f"{block}mlp.linear_fc2", V, W)
        yield from _layer_norm(f"{block}norm1", V)
        yield from _layer_norm(f"{block}norm2", V)
    yield from _linear(f"{tower}merger.linear_fc1", 4 * V, 4 * V)
    yield from _linear(f"{tower}merger.linear_fc2", spec.hidden, 4 * V)
    yield from _layer_norm(f"{tower}merger.norm", V)
    yield Tensor(f"{tower}patch_embed.proj.weight", (V, 3, 2, 16, 16))
    yield Tensor(f"{tower}patch_embed.proj.bias", (V,))
    yield Tensor(f"{tower}pos_embed.weight", (2304, V))


def _linear(name: str, outputs: int, inputs: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (outputs, inputs))
    yield Tensor(f"{name}.bias", (outputs,))


def _layer_norm(name: str, size: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (size,), "one")
    yield Tensor(f"{name}.bias", (size,), "zero")


# -- config.json -------------------------------------------------------------------------------------------------------


def config(spec: Spec) -> dict[str, Any]:
    """Contents of config.json, with the keys of the release."""
    text = _text_config(spec)
    if spec.text_only:
        return {**text, "architectures": ["Qwen3_5MoeForCausalLM"], "transformers_version": "5.2.0"}
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": spec.vocab - 4,
        "video_token_id": spec.vocab - 5,
        "vision_start_token_id": spec.vocab - 6,
        "vision_end_token_id": spec.vocab - 7,
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "5.2.0",
        "vision_config": _vision_config(spec),
    }


def _text_config(spec: Spec) -> dict[str, Any]:
    keys, values, size = spec.linear_heads
    kinds = ["linear_attention" if (layer + 1) % 4 else "full_attention" for layer in range(spec.layers)]
    return {
        "model_type": "qwen3_5_moe_text",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "eos_token_id": spec.vocab - 1,
        "full_attention_interval": 4,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "initializer_range": 0.02,
        "layer_types": kinds,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": size,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_value_head_dim": size,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "moe_intermediate_size": spec.inter,
        "mtp_num_hidden_layers": int(spec.mtp),
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": spec.heads[0],
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.top_k,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.heads[1],
        "rms_norm_eps": 1e-6,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": spec.inter,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": spec.vocab,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": _rope_section(spec.head_dim),
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    }


def _rope_section(head_dim: int) -> list[int]:
    third = head_dim // 24
    return [11, 11, 10] if head_dim == 256 else [head_dim // 8 - 2 * third, third, third]


def _vision_config(spec: Spec) -> dict[str, Any]:
    hidden, inter, heads = spec.vision
    return {
        "depth": spec.vision_depth,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_heads": heads,
        "out_hidden_size": spec.hidden,
        "num_position_embeddings": 2304,
        "model_type": "qwen3_5_moe",
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.02,
        "deepstack_visual_indexes": [],
    }


# -- bytes -------------------------------------------------------------------------------------------------------------


class _Pool:
    """A block of bf16 normals, made once; every tensor takes its data from places that its name decides."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        rng = np.random.default_rng(seed)
        self._normals = np.empty(_POOL, np.uint16)
        for start in range(0, _POOL, 1 << 20):
            self._normals[start : start + (1 << 20)] = _bf16(_STD * rng.standard_normal(1 << 20, np.float32))

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """Bytes of `tensor`, in order."""
        rng = np.random.default_rng([self._seed, *hashlib.sha256(tensor.name.encode()).digest()])
        if tensor.kind != "normal":
            values = _vector(tensor, rng)
            yield values.data.cast("B") if tensor.dtype == "F32" else _bf16(values).data.cast("B")
            return
        for start in range(0, tensor.size, _PIECE):
            count = min(_PIECE, tensor.size - start)
            at = int(rng.integers(_POOL - count + 1))
            yield self._normals[at : at + count].data.cast("B")


def _vector(tensor: Tensor, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Values of a tensor that is no matrix of normals around 0."""
    if tensor.kind == "alog":
        return np.log(rng.uniform(1, 16, tensor.size)).astype(np.float32)
    mean = np.float32(1.0 if tensor.kind == "one" else 0.0)
    return mean + np.float32(_STD) * rng.standard_normal(tensor.size, np.float32)


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _grouped(listed: list[Tensor], limit: int) -> list[list[Tensor]]:
    """Cut into shards of at most `limit` bytes, in order."""
    shards: list[list[Tensor]] = [[]]
    total = 0
    for tensor in listed:
        if shards[-1] and total + tensor.nbytes > limit:
            shards.append([])
            total = 0
        shards[-1].append(tensor)
        total += tensor.nbytes
    return shards


def _write_shard(path: Path, shard: list[Tensor], pool: _Pool | None) -> None:
    """Write one shard; without a pool, only its header and its size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(struct.pack("<Q", len(text)) + text))
        if pool is None:
            file.truncate(8 + len(text) + end)
            return
        for tensor in shard:
            for piece in pool.pieces(tensor):
                _write_all(file.fileno(), piece)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write what the command line asks for."""
    default = Spec()
    parser = argparse.ArgumentParser(description="Write a synthetic checkpoint of Qwen3.5-35B-A3B's shape.")
    parser.add_argument("out", type=Path)
    for name in ("layers", "experts", "top-k", "hidden", "inter", "vocab", "vision-depth", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name.replace("-", "_")), help="%(default)s")
    parser.add_argument("--shard-gb", type=float, default=default.shard_bytes / 1e9, help="%(default)s")
    parser.add_argument("--text-only", action="store_true", help="no vision tower, text-only class")
    parser.add_argument("--no-mtp", action="store_true", help="no multi-token-prediction layer")
    parser.add_argument("--sparse", action="store_true", help="leave the data as holes: size on paper only")
    given = vars(parser.parse_args())
    out = given.pop("out")
    spec = Spec(shard_bytes=round(given.pop("shard_gb") * 1e9), mtp=not given.pop("no_mtp"), **given)
    done = write_checkpoint(out, spec)
    print(f"{done.tensors} tensors, {done.shards} shards, {done.nbytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

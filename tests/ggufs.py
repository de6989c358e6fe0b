"""Tiny GGUF files for tests, made with the `gguf` package, and the files that it reads back.

`write_gguf` writes any tensors; `moe` gives those of a small Mixture-of-Experts model of llama.cpp's, with a vocabulary
that it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | tuple[Kind, np.ndarray]],
    *,
    arch: str = "qwen3moe",
    max_bytes: int = 0,
    max_tensors: int = 0,
) -> list[Path]:
    """Write one file, or several where a limit is given, and return their paths.

    Args:
        path: of the one file; the others are called after it.
        metadata: key -> an int (uint32), float, bool, text, list of these, or (type, value).
        tensors: name -> array, slowest dimension first; or the type of its blocks, and rows of bytes.
        arch: `general.architecture`.
        max_bytes: most bytes of tensors in one file.
        max_tensors: most tensors in one file.

    """
    writer = gguf.GGUFWriter(path, arch, split_max_size=max_bytes, split_max_tensors=max_tensors)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if isinstance(value, tuple):
            writer.add_key_value(key, value[1], value[0])
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            add[type(value)](key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=tensor[0])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))


def read_gguf(*paths: Path) -> dict[str, np.ndarray]:
    """Arrays of all tensors as the `gguf` package reads them, in blocks' bytes where they are blocks."""
    return {t.name: np.array(t.data) for path in paths for t in gguf.GGUFReader(path).tensors}


def fields_of(path: Path) -> dict[str, Any]:
    """Metadata as the `gguf` package reads it."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def blocks(rng: np.random.Generator, kind: Kind, shape: tuple[int, ...]) -> tuple[Kind, np.ndarray]:
    """Random blocks of any type, in bytes; values may be anything."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    return kind, rng.integers(0, 256, (*shape[:-1], shape[-1] // elements * size), "u1")


# -- a model ----------------------------------------------------------------------------------------------------------

HIDDEN, HEADS, HEAD, EXPERTS, USED, WIDTH, LAYERS, VOCABULARY = 64, 2, 32, 8, 2, 32, 2, 300


def moe_metadata(**other: Any) -> dict[str, Any]:
    """Metadata of a small Qwen3-MoE: what llama.cpp needs to load it, and a vocabulary of bytes."""
    own = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": 2 * WIDTH,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10_000.0,
        "expert_count": EXPERTS,
        "expert_used_count": USED,
        "expert_feed_forward_length": WIDTH,
    }
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = [chr(byte) for byte in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    tokens = [*shown, *(f"t{n}" for n in range(VOCABULARY - len(shown) - 1)), "<|end|>"]
    return {
        "general.name": "tiny",
        "general.file_type": 0,
        **{f"qwen3moe.{key}": value for key, value in (own | other).items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (VOCABULARY - 1) + [3],
        "tokenizer.ggml.merges": ["t 0", "t 1"],
        "tokenizer.ggml.eos_token_id": VOCABULARY - 1,
        "general.quantization_version": 2,
    }


def moe_tensors(seed: int = 0, experts: int = EXPERTS) -> dict[str, np.ndarray]:
    """Float32 tensors of that model, slowest dimension first."""
    rng = np.random.default_rng(seed)

    def of(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype("f4")

    out = {"token_embd.weight": of(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        b = f"blk.{layer}."
        out |= {f"{b}{name}.weight": np.ones(HIDDEN, "f4") for name in ("attn_norm", "ffn_norm")}
        out |= {f"{b}{name}.weight": np.ones(HEAD, "f4") for name in ("attn_q_norm", "attn_k_norm")}
        out |= {f"{b}attn_q.weight": of(HEADS * HEAD, HIDDEN), f"{b}attn_k.weight": of(HEAD, HIDDEN)}
        out |= {f"{b}attn_v.weight": of(HEAD, HIDDEN), f"{b}attn_output.weight": of(HIDDEN, HEADS * HEAD)}
        out[f"{b}ffn_gate_inp.weight"] = 4 * of(experts, HIDDEN)
        out |= {f"{b}ffn_{name}_exps.weight": of(experts, WIDTH, HIDDEN) for name in ("gate", "up")}
        out[f"{b}ffn_down_exps.weight"] = of(experts, HIDDEN, WIDTH)
    return out | {"output_norm.weight": np.ones(HIDDEN, "f4"), "output.weight": of(VOCABULARY, HIDDEN)}


def quantized(tensors: Mapping[str, np.ndarray], kind: Kind) -> dict[str, Any]:
    """The same with every matrix of attention and experts in blocks of `kind`, as the `gguf` package rounds."""
    wanted = ("_exps.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")
    return {
        name: (kind, gguf.quants.quantize(value, kind)) if name.endswith(wanted) else value
        for name, value in tensors.items()
    }

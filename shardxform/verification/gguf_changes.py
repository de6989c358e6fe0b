"""What llama.cpp's converter does to rows and values, once more and in plain numpy: for the second opinion alone."""

# O: rows of a weight, I: its columns.

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Change", "changes"]

Values = NDArray[np.float32]

_NEIGHBOURS: Final = frozenset({"granitehybrid", "granitemoe", "llama", "nemotron_h_moe"})
"""Architectures that rotate neighbours, so that halves of heads take turns, and Nemotron-H's."""

_LAYER: Final = re.compile(r"(?:model|backbone)\.layers\.(\d+)\.")

Change = Callable[[Values], Values]


def changes(arch: str, name: str, text: Mapping[str, Any]) -> Iterator[tuple[str, Change | None]]:
    """Tensors that a weight becomes, and what is done to it on the way."""
    inner = name.rpartition("linear_attn.")[2]
    if name.endswith("kv_b_proj.weight"):
        heads, keys, values = text["num_attention_heads"], text["qk_nope_head_dim"], text["v_head_dim"]
        stem = name.removesuffix("kv_b_proj.weight")
        yield (
            f"{stem}k_b_proj.weight",
            lambda w_OI: _by(w_OI, heads, keys + values)[:, :keys].swapaxes(1, 2).reshape(-1, keys),
        )
        yield (
            f"{stem}v_b_proj.weight",
            lambda w_OI: _by(w_OI, heads, keys + values)[:, keys:].reshape(-1, w_OI.shape[1]),
        )
    elif inner == "in_proj_qkvz.weight":
        heads, key, value = (text[f"linear_{each}"] for each in ("num_key_heads", "key_head_dim", "value_head_dim"))
        many = text["linear_num_value_heads"] // heads * value
        bounds = np.cumsum([0, key, key, many, many])
        block = f"blk.{_layer(name)}"

        def pick(w_OI: Values, *parts: int) -> Values:
            split = _by(w_OI, heads, int(bounds[-1]))
            found = [split[:, bounds[at] : bounds[at + 1]].reshape(-1, w_OI.shape[1]) for at in parts]
            return np.concatenate(found)

        yield f"{block}.attn_qkv.weight", lambda w_OI: pick(w_OI, 0, 1, 2)
        yield f"{block}.attn_gate.weight", lambda w_OI: pick(w_OI, 3)
    elif name.endswith("norm.weight") and arch in ("qwen35moe", "qwen3next") and inner != "norm.weight":
        yield name, lambda w_OI: w_OI + np.float32(1)
    elif arch in _NEIGHBOURS and (match := re.fullmatch(r".*\.([qk])_proj\.(weight|bias)", name)):
        all_heads = text["num_attention_heads"]
        turned = all_heads if match[1] == "q" else text.get("num_key_value_heads") or all_heads
        yield name, lambda w_OI: w_OI.reshape(turned, 2, -1, w_OI.shape[1]).swapaxes(1, 2).reshape(w_OI.shape)
    elif name.endswith("shared_mlp.input_linear.weight"):
        half = text["shared_intermediate_size"]
        yield f"blk.{_layer(name)}.ffn_gate_shexp.weight", lambda w_OI: w_OI[:half]
        yield f"blk.{_layer(name)}.ffn_up_shexp.weight", lambda w_OI: w_OI[half:]
    elif name.endswith(("mamba.A_log", "mixer.A_log", "self_attn.A_log")):
        yield name, lambda w_OI: -np.exp(w_OI.astype(np.float64)).astype(np.float32)
    elif ".linear_attn." in name:
        yield name, _of_delta_net(arch, inner, text)
    else:
        yield name, None


def _of_delta_net(arch: str, inner: str, text: Mapping[str, Any]) -> Change | None:
    """Decay rates are -exp of what is stored; of Qwen3.5 value heads are tiled over key heads instead of grouped."""
    keys, heads = text["linear_num_key_heads"], text["linear_num_value_heads"]
    value, before = text["linear_value_head_dim"], 2 * keys * text["linear_key_head_dim"]
    width = {"in_proj_z.weight": value, "in_proj_a.weight": 1, "in_proj_b.weight": 1, "A_log": 1, "dt_bias": 1}.get(
        inner
    )

    def tiled(w_OI: Values, each: int) -> Values:
        if arch != "qwen35moe":
            return w_OI
        return w_OI.reshape(keys, heads // keys, each, w_OI.shape[1]).swapaxes(0, 1).reshape(w_OI.shape)

    if inner == "A_log":
        return lambda w_OI: tiled(-np.exp(w_OI.astype(np.float64)).astype(np.float32), 1)
    if width is not None:
        return lambda w_OI: tiled(w_OI, width)
    if inner in ("in_proj_qkv.weight", "conv1d.weight"):
        return lambda w_OI: np.concatenate((w_OI[:before], tiled(w_OI[before:], value)))
    if inner == "out_proj.weight":
        return lambda w_OI: np.ascontiguousarray(tiled(np.ascontiguousarray(w_OI.T), value).T)
    return None


def _by(w_OI: Values, heads: int, each: int) -> Values:
    return w_OI.reshape(heads, each, w_OI.shape[1])


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    assert match is not None
    return int(match[1])

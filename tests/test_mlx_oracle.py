"""MLX checkpoints in the hands of mlx-lm, on the CPU: loaded as they are, and the same to rounding as transformers.

The reference is transformers on the weights that the stored codes, scales and biases stand for, decoded here by numpy.
Only the rest, which is bfloat16 in the files, is widened to float32 before mlx-lm loads it, so that it may compute so.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, raw, read_checkpoint, write_checkpoint

from shardxform.checkpoint.table import Checkpoint
from shardxform.execution.runner import run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan.convert import Target, plan_convert
from shardxform.plan.quantize import plan_quantize

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")
mlx_utils = pytest.importorskip("mlx_lm.utils")

pytestmark = pytest.mark.oracle

HOMES = {"mlp.switch_mlp": "mlp.experts", "block_sparse_moe.switch_mlp": "block_sparse_moe.experts"}
OURS = {"block_sparse_moe.experts": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}}


def quantize(source: Path, out: Path, format: str = "mlx", bits: Any = 4, group_size: int = 32) -> Path:  # noqa: A002
    grid = Grid(bits=bits, group_size=group_size)
    run(plan_quantize(Checkpoint.open(source), Scheme(grid=grid, format=format)), out)  # type: ignore[arg-type]
    return out


def convert(source: Path, out: Path, to: Any = "mlx") -> Path:
    run(plan_convert(Checkpoint.open(source), Target(format=to)), out)
    return out


def affine(words: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """`scale * code + bias`, as mlx documents it: the codes of a word from its lowest bits on."""
    bits = 8 if words.shape[-1] * 4 % scales.shape[-1] == 0 and words.shape[-1] * 4 // scales.shape[-1] in SIZES else 4
    codes = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & np.uint32((1 << bits) - 1)
    codes = codes.reshape(*scales.shape, -1).astype(np.float32)
    return (codes * scales[..., None] + biases[..., None]).reshape(*words.shape[:-1], -1)


SIZES: set[int] = set()
"""Groups in which 8 bits are looked for."""


def plain(out: Path, bits: int) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint of MLX as float32, under its own name."""
    stored, values = read_checkpoint(out), {}
    for name, tensor in stored.items():
        stem, _, last = name.rpartition(".")
        if last in ("scales", "biases"):
            continue
        if tensor.dtype != "U32":
            values[name] = tensor.float32()
            continue
        words = np.frombuffer(tensor.data, np.uint32).reshape(tensor.shape)
        codes = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & np.uint32((1 << bits) - 1)
        scales, biases = (stored[f"{stem}.{each}"].float32() for each in ("scales", "biases"))
        groups = codes.reshape(*scales.shape, -1).astype(np.float32) * scales[..., None] + biases[..., None]
        values[name] = groups.reshape(*words.shape[:-1], -1)
    return values


def released(values: Mapping[str, np.ndarray], source: Path) -> dict[str, Raw]:
    """The same under the names of a release, of which `source` is one."""
    out = {}
    for name in read_checkpoint(source):
        out[name] = raw(torch.tensor(_of_release(name, values)))
    return out


def _of_release(name: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
    for home, experts in HOMES.items():
        if match := re.fullmatch(rf"(.*){re.escape(experts)}\.(gate_up_proj|down_proj)", name):
            of = [f"{match[1]}{home}.{each}.weight" for each in ("gate_proj", "up_proj", "down_proj")]
            return values[of[2]] if match[2] == "down_proj" else np.concatenate([values[of[0]], values[of[1]]], 1)
        if match := re.fullmatch(rf"(.*){re.escape(experts)}\.(\d+)\.(\w+)\.weight", name):
            theirs = {ours: their for their, ours in OURS.get(experts, {}).items()}
            stack = values.get(f"{match[1]}{home}.{theirs.get(match[3], match[3])}.weight")
            if stack is not None:
                return stack[int(match[2])]
    return values[name]


def widened(out: Path, folder: Path) -> Path:
    """The same checkpoint with all but codes in float32, which mlx on the CPU needs and which rounds nothing."""
    config = json.loads((out / "config.json").read_text())
    tensors = {
        name: tensor if tensor.dtype == "U32" else raw(torch.tensor(tensor.float32()))
        for name, tensor in read_checkpoint(out).items()
    }
    write_checkpoint(folder, tensors, config)
    return folder


def mlx_logits(path: Path, ids: Any) -> np.ndarray:
    """Loaded strictly: nothing missing, nothing left over."""
    mx.set_default_device(mx.cpu)
    model, _ = mlx_utils.load_model(path, strict=True)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(ids.numpy())).astype(mx.float32), np.float64)


def divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL divergence over positions."""
    one, other = (torch.log_softmax(torch.tensor(each), -1) for each in (ours, theirs))
    return float((one.exp() * (one - other)).sum(-1).mean())


def check(out: Path, source: Path, bits: int, tmp_path: Path, ids: Any) -> None:
    from any_moe import load

    values = plain(out, bits)
    reference = tmp_path / "reference"
    write_checkpoint(reference, released(values, source), json.loads((source / "config.json").read_text()))
    model, info = load(reference, torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = model(ids).logits.double().numpy()
    found = mlx_logits(widened(out, tmp_path / "wide"), ids)
    assert found.shape == expected.shape
    kl = divergence(expected, found)
    print(out, kl, abs(found - expected).max())
    assert kl <= 1e-10
    shutil.rmtree(reference)


def test_the_small_model_converted(small_moe: Path, tmp_path: Path) -> None:
    from test_prune_oracle import tokens

    out = convert(quantize(small_moe, tmp_path / "q", "auto-round"), tmp_path / "out")
    check(out, small_moe, 4, tmp_path, tokens(small_moe))
    assert mlx_utils.load_model(out, strict=True)


FAMILIES = ("deepseek_v3", "qwen3_moe", "mixtral", "minimax_m2", "glm4_moe", "glm4_moe_lite", "deepseek_v32")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_tiny_model_of_every_family(model_type: str, tmp_path: Path) -> None:
    from any_moe import build, save

    source = save(build(model_type), tmp_path / "source")
    out = convert(quantize(source, tmp_path / "q", "compressed-tensors"), tmp_path / "out")
    check(out, source, 4, tmp_path, torch.arange(24).reshape(1, 24) * 7 % 256)

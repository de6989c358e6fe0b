"""FP8 stacks of experts whose scales have no last part of their own: `gate_up_proj` beside `gate_up_proj_scale_inv`.

In families whose stacks are transposed, scales lie like the stack, as in Qwen3-VL's release, or like the matrices.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import any_moe
import numpy as np
import pytest
from build import Raw, bf16, read_checkpoint, write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from strategies import picked  # noqa: E402
from test_small_floats import DATA, as_released, call, fp8_blocks, fp8_whole, keep_file, raw  # noqa: E402

pytestmark = pytest.mark.oracle

BLOCK = 24
KINDS = {
    "rows": ("qwen3_5_moe_text", False),
    "transposed": ("gpt_oss", False),
    "transposed, scales are not": ("gpt_oss", True),
    "a scale an expert": ("qwen3_5_moe_text", None),
}


def stacked(stack: np.ndarray, turned: bool | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and values of a stack, a matrix after the other."""
    found = []
    for matrix in stack:
        parts, values = fp8_whole(matrix) if turned is None else fp8_blocks(matrix, BLOCK)
        scale = parts["weight_scale" if turned is None else "weight_scale_inv"].array()
        found.append(
            (parts["weight"].array().reshape(matrix.shape), scale.reshape(1, 1) if turned is None else scale, values)
        )
    codes, scales, values = (np.stack(each) for each in zip(*found, strict=True))
    return codes, scales.transpose(0, 2, 1) if turned else scales, values


def made(root: Path, kind: str) -> tuple[Path, Path]:
    """A checkpoint, and its twin in bfloat16."""
    model_type, turned = KINDS[kind]
    any_moe.save(any_moe.build(model_type), root / "plain")
    config, tensors = json.loads((root / "plain" / "config.json").read_text()), read_checkpoint(root / "plain")
    files = {p.name: p.read_text() for p in (root / "plain").glob("tokenizer*")}
    if "model.layers.0.mlp.experts.gate_up_proj" not in tensors:
        tensors = as_released(tensors, "fused")
    twin = dict(tensors)
    left = [name.removesuffix(".weight") for name in tensors if ".layers." in name and name.endswith(".weight")]
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        codes, scales, values = stacked(tensors[name].float32(), turned)
        tensors[name], tensors[f"{name}_scale_inv"] = raw("F8_E4M3", codes), raw("F32", scales)
        twin[name] = bf16(values)
        if turned is None:
            tensors[f"{name}_activation_scale"] = raw("F32", np.ones(len(codes), np.float32))
    declared: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    declared["modules_to_not_convert"] = ["lm_head", *left]
    if turned is None:
        declared |= {"activation_scheme": "static", "weight_block_size": None}
    write_checkpoint(root / "twin", twin, config, files=files)
    write_checkpoint(root / "source", tensors, {**config, "quantization_config": declared}, files=files)
    return root / "source", root / "twin"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pruned_as_it_is_and_rounded_as_its_twin(kind: str, tmp_path: Path) -> None:
    source, twin = made(tmp_path, kind)
    keep = keep_file(tmp_path)
    call("verify", source)
    call("prune", source, tmp_path / "out", "-m", keep, "-q")
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "out")
    for name in [name for name in before if ".layers.1.mlp.experts." in name and "bias" not in name]:
        ours, theirs = (each[name].array().reshape(each[name].shape) for each in (after, before))
        assert np.array_equal(ours, theirs[[1, 2, 4, 5]]), name
    call("verify", tmp_path / "out", "--source", source, "--independent")
    rounded = []
    for root in (source, twin):
        call("quantize", root, tmp_path / f"{root.name}-4", "-m", keep, "--group-size", 32, "-q")
        rounded.append(read_checkpoint(tmp_path / f"{root.name}-4"))
    assert rounded[0] == rounded[1]
    call("verify", tmp_path / "source-4", "--source", source, "--independent")


@pytest.mark.parametrize("kind", ["rows", "transposed, scales are not"])
def test_it_is_healed_as_it_is_and_in_16_bits(kind: str, tmp_path: Path) -> None:
    source, twin = made(tmp_path, kind)
    heal = ("-m", keep_file(tmp_path), "-q", "--heal", "moe", "--heal-iters", 3, "--heal-lr", "0.01", *DATA)
    call("prune", source, tmp_path / "out", *heal)
    call("verify", tmp_path / "out", "--source", source)
    name = "model.layers.{}.mlp.experts.down_proj_scale_inv"
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "out")
    kept = {0: [0, 2, 3, 5], 1: [1, 2, 4, 5]}
    pairs = [(after[name.format(at)].array(), before[name.format(at)].array()[kept[at]]) for at in kept]
    assert all(ours.shape == theirs.shape for ours, theirs in pairs)
    assert any(not np.array_equal(*pair) for pair in pairs)
    call("prune", source, tmp_path / "wide", *heal, "--heal-encoding", "16bit")
    call("prune", twin, tmp_path / "twin-out", *heal)
    assert read_checkpoint(tmp_path / "wide") == read_checkpoint(tmp_path / "twin-out")
    call("verify", tmp_path / "wide", "--source", source)


def test_scales_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    source, _ = made(tmp_path, "transposed")
    config, tensors = json.loads((source / "config.json").read_text()), read_checkpoint(source)
    name = "model.layers.0.mlp.experts.down_proj"

    def refused(block: list[int], change: dict[str, Raw], message: str) -> None:
        declared: dict[str, Any] = {**config["quantization_config"], "weight_block_size": block}
        root = write_checkpoint(
            tmp_path / f"bad{len(message)}", {**tensors, **change}, {**config, "quantization_config": declared}
        )
        said = call("quantize", root, tmp_path / "no", "--group-size", 32, code=1).output
        assert message in " ".join(said.split()), said

    shape = tensors[name].shape
    square = raw("F32", np.ones((shape[0], 1, 1), np.float32))
    stacks = [n for n in tensors if n.endswith("_proj_scale_inv")]
    refused([4096, 4096], dict.fromkeys(stacks, square), "cannot be told from a square")
    refused([24, 32], {}, "expected square blocks")
    odd = raw("F32", np.ones((shape[0], 7, 7), np.float32))
    refused([24, 24], {f"{name}_scale_inv": odd}, "in blocks of [24, 24]")


@pytest.mark.parametrize("flat", picked([False, True], 2), ids=str)
def test_mistral_small_4_as_it_is_released(flat: bool, tmp_path: Path) -> None:
    """One scale, in bfloat16, for each linear and each stacked expert, one of activations beside, and a plain tower."""
    any_moe.save(any_moe.build("mistral3", head_dim=32, qk_head_dim=32, first_k_dense_replace=0), tmp_path / "plain")
    config, tensors = json.loads((tmp_path / "plain" / "config.json").read_text()), read_checkpoint(tmp_path / "plain")
    files, twin = {p.name: p.read_text() for p in (tmp_path / "plain").glob("tokenizer*")}, dict(tensors)
    for name in [name for name in tensors if ".experts." in name and "shared" not in name]:
        codes, scales, values = stacked(tensors[name].float32(), None)
        twin[name], tensors[name] = bf16(values), raw("F8_E4M3", codes)
        tensors[f"{name}_scale_inv"] = bf16(scales)
        ones = np.ones(len(codes) if flat else (len(codes), 1, 1), np.float32)
        tensors[f"{name}_activation_scale"] = bf16(ones)
    linears = [name for name in twin if name.startswith("language_model.model.layers.") and name.endswith(".weight")]
    for name in [name for name in linears if len(twin[name].shape) == 2 and not name.endswith("mlp.gate.weight")]:
        parts, values = fp8_whole(tensors[name].float32())
        twin[name], tensors[name] = bf16(values), parts["weight"]
        stem = name.removesuffix("weight")
        tensors[f"{stem}weight_scale_inv"] = bf16(parts["weight_scale"].array().reshape(()))
        tensors[f"{stem}activation_scale"] = bf16(np.array(np.float32(1)))
    declared: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    declared["modules_to_not_convert"] = ["vision_tower", "multi_modal_projector", "lm_head", "gate"]
    write_checkpoint(tmp_path / "twin", twin, config, files=files)
    source = write_checkpoint(tmp_path / "source", tensors, {**config, "quantization_config": declared}, files=files)
    keep = keep_file(tmp_path)
    call("verify", source)
    call("prune", source, tmp_path / "out", "-m", keep, "-q")
    after = read_checkpoint(tmp_path / "out")
    for name in [name for name in tensors if ".layers.1.mlp.experts." in name]:
        ours, theirs = (each[name].array().reshape(each[name].shape) for each in (after, tensors))
        assert np.array_equal(ours, theirs[[1, 2, 4, 5]]), name
    call("verify", tmp_path / "out", "--source", source, "--independent")
    call("convert", source, tmp_path / "decoded", "--to", "bf16", "-q")
    assert read_checkpoint(tmp_path / "decoded") == twin
    rounded = []
    for root in (source, tmp_path / "twin"):
        call("quantize", root, tmp_path / f"{root.name}-4", "-m", keep, "--group-size", 32, "-q")
        rounded.append(read_checkpoint(tmp_path / f"{root.name}-4"))
    assert rounded[0] == rounded[1]
    call("verify", tmp_path / "source-4", "--source", source, "--independent")

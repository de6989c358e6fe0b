"""Experts that lie otherwise than usual: gpt-oss (transposed, interleaved, biased stacks) and mixtral (w1, w3, w2).

What an output must hold is cut from the source in plain numpy here, and what it computes is asked of transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, bf16, read_checkpoint, tiny, write_checkpoint
from test_run import tree

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import FamilyError, SchemeError
from shardxform.execution.runner import RunOptions, run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan.convert import Target, plan_convert
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.verification import verify

SIZES = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 32}
SCHEMES = {
    "gpt_oss": Scheme(grid=Grid(group_size=32)),
    "mixtral": Scheme(grid=Grid(group_size=32), format="compressed-tensors"),
}
KEEP = {0: (1, 3, 4), 1: (0, 2, 5)}
HOMES = {"gpt_oss": "mlp.experts", "mixtral": "block_sparse_moe.experts"}
KINDS = sorted(HOMES)


def make(root: Path, kind: str) -> tuple[Path, dict[str, Raw]]:
    config, tensors = tiny(kind, **SIZES)
    return write_checkpoint(root / kind, tensors, config, shards=2, files={"tokenizer.json": "{}"}), tensors


def quantized(source: Path, out: Path, kind: str, **over: Any) -> Path:
    scheme = Scheme(grid=over.pop("grid", SCHEMES[kind].grid), format=SCHEMES[kind].format, **over)
    run(plan_quantize(Checkpoint.open(source), scheme, Manifest(keep=KEEP)), out, RunOptions(jobs=1))
    return out


def expert(tensors: dict[str, Raw], kind: str, layer: int, number: int) -> dict[str, np.ndarray]:
    """Matrices [O, I] and biases of one expert of the source, by the name of the projection in an output."""
    home = f"model.layers.{layer}.{HOMES[kind]}"
    if kind == "mixtral":
        return {name: tensors[f"{home}.{number}.{name}.weight"].float32() for name in ("w1", "w2", "w3")}
    both, down = (tensors[f"{home}.{name}"].float32()[number] for name in ("gate_up_proj", "down_proj"))
    bias, last = (tensors[f"{home}.{name}_bias"].float32()[number] for name in ("gate_up_proj", "down_proj"))
    half = len(bias) // 2  # of rows that take turns, as auto-round's loader has it
    return {
        "gate_proj": both[:, :half].T,
        "gate_proj.bias": bias[:half],
        "up_proj": both[:, half:].T,
        "up_proj.bias": bias[half:],
        "down_proj": down.T,
        "down_proj.bias": last,
    }


def values(tensors: dict[str, Raw], stem: str) -> np.ndarray:
    """What a quantized matrix stands for, [O, I]."""
    if f"{stem}.qweight" in tensors:
        words, scales = tensors[f"{stem}.qweight"].array().T, tensors[f"{stem}.scales"].array().astype(np.float32).T
    else:
        words, scales = tensors[f"{stem}.weight_packed"].array(), tensors[f"{stem}.weight_scale"].float32()
    nibbles = (np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    codes = nibbles.reshape(len(words), -1).astype(np.float32) - 8
    return codes * np.repeat(scales, 32, axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_matrix_of_an_output_is_that_of_the_expert_that_was_kept(kind: str, tmp_path: Path) -> None:
    source, tensors = make(tmp_path, kind)
    out = read_checkpoint(quantized(source, tmp_path / "out", kind))
    for layer, ids in KEEP.items():
        for new, old in enumerate(ids):
            for name, wanted in expert(tensors, kind, layer, old).items():
                stem = f"model.layers.{layer}.{HOMES[kind]}.{new}.{name}"
                if name.endswith("bias"):
                    np.testing.assert_array_equal(out[stem].float32(), wanted)
                    continue
                found = values(out, stem)
                step = np.abs(wanted).reshape(len(wanted), -1, 32).max(-1).repeat(32, axis=1) / 8
                assert (np.abs(found - wanted) <= step * 0.51 + 1e-6).all() or np.abs(found - wanted).max() < step.max()
                assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.99
    assert not any(name.endswith(("gate_up_proj", "gate_up_proj_bias", "down_proj_bias")) for name in out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_16bit", [(), ("*.experts.*",)])
def test_outputs_are_sound_against_the_source_and_by_a_second_derivation(
    kind: str, keep_16bit: tuple[str, ...], tmp_path: Path
) -> None:
    source, _ = make(tmp_path, kind)
    out = quantized(source, tmp_path / "out", kind, keep_16bit=keep_16bit)
    report = verify(out, source=source, independent=True)
    assert report.problems == ()
    assert report.values_compared == report.tensors
    run(plan_prune(Checkpoint.open(source), Manifest(keep=KEEP)), tmp_path / "pruned")
    assert verify(tmp_path / "pruned", source=source, independent=True).problems == ()


@pytest.mark.parametrize("name", ["mlp.experts.1.gate_proj.bias", "mlp.experts.0.up_proj.qweight"])
def test_what_is_not_the_sources_is_found(name: str, tmp_path: Path) -> None:
    """A bias by its bytes, a matrix by what rounding its cut again gives."""
    source, _ = make(tmp_path, "gpt_oss")
    out = quantized(source, tmp_path / "out", "gpt_oss")
    tensors = read_checkpoint(out)
    name = f"model.layers.0.{name}"
    other = name.replace("gate_proj", "up_proj") if "bias" in name else name.replace("up_proj", "gate_proj")
    tensors[name], tensors[other] = tensors[other], tensors[name]
    config = json.loads((out / "config.json").read_text())
    bad = write_checkpoint(tmp_path / "bad", tensors, config, files={"tokenizer.json": "{}"})
    keep = Manifest(keep=KEEP)
    assert name in {problem.where for problem in verify(bad, source=source, manifest=keep).problems}
    found = verify(bad, source=source, manifest=keep, independent=True).problems
    assert {problem.where for problem in found if problem.code == "independent"} >= {name}


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_a_pruned_checkpoint_is_pruning_and_quantizing_at_once(kind: str, tmp_path: Path) -> None:
    source, _ = make(tmp_path, kind)
    run(plan_prune(Checkpoint.open(source), Manifest(keep=KEEP)), tmp_path / "pruned")
    run(plan_quantize(Checkpoint.open(tmp_path / "pruned"), SCHEMES[kind]), tmp_path / "twice")
    once = quantized(source, tmp_path / "once", kind)
    shards = {name: data for name, data in tree(once).items() if name.endswith((".safetensors", "config.json"))}
    assert {name: data for name, data in tree(tmp_path / "twice").items() if name in shards} == shards


@pytest.mark.parametrize(
    ("kind", "format_"), [("gpt_oss", "gptq"), ("gpt_oss", "compressed-tensors"), ("mixtral", "gptq")]
)
def test_formats_whose_loaders_do_not_find_the_experts_are_refused(kind: str, format_: Any, tmp_path: Path) -> None:
    source, _ = make(tmp_path, kind)
    scheme = Scheme(grid=Grid(group_size=32), format=format_)
    with pytest.raises(
        SchemeError, match=f"do not find experts of family {kind}; they are read in `format` {SCHEMES[kind].format}"
    ):
        plan_quantize(Checkpoint.open(source), scheme)
    out = quantized(source, tmp_path / "out", kind)
    with pytest.raises(SchemeError, match="do not find experts"):
        plan_convert(Checkpoint.open(out), Target(format=format_))
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_method"] = format_
    path.write_text(json.dumps(config))
    assert any("do not find experts" in problem.message for problem in verify(out).problems)


def test_what_cannot_be_spelled_or_stacked_again_is_refused(tmp_path: Path) -> None:
    source, _ = make(tmp_path, "gpt_oss")
    with pytest.raises(SchemeError, match="no experts in the fused-indexed spelling"):
        quantized(source, tmp_path / "x", "gpt_oss", expert_names="fused-indexed")
    out = quantized(source, tmp_path / "out", "gpt_oss")
    with pytest.raises(SchemeError, match="stacks its experts transposed"):
        plan_convert(Checkpoint.open(out), Target(format="bf16"))


def test_a_stack_without_its_bias_is_refused(tmp_path: Path) -> None:
    config, tensors = tiny("gpt_oss", **SIZES)
    del tensors["model.layers.1.mlp.experts.down_proj_bias"]
    root = write_checkpoint(tmp_path / "source", tensors, config)
    with pytest.raises(FamilyError, match=r"'model.layers.1.mlp.experts.down_proj_bias' is missing"):
        plan_prune(Checkpoint.open(root), Manifest(keep=KEEP))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_was_written_and_computes_with_it(kind: str, tmp_path: Path) -> None:
    """The same logits as the plain model has with the values that the output stands for."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    source, _ = make(tmp_path, kind)
    out = quantized(source, tmp_path / "out", kind)
    run(plan_prune(Checkpoint.open(source), Manifest(keep=KEEP)), tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    plain = write_checkpoint(tmp_path / "plain", dequantized(read_checkpoint(out), kind), config)
    ids = torch.arange(1, 41)[None]
    logits = []
    for path in (plain, out):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        with torch.no_grad():
            logits.append(model(ids).logits.float())
    assert (logits[0] - logits[1]).abs().max() < 0.03 * logits[0].abs().max()


def dequantized(tensors: dict[str, Raw], kind: str) -> dict[str, Raw]:
    """The tensors of an output in the release's layout, with the values that they stand for."""
    stems = {name.rpartition(".")[0] for name in tensors if name.endswith((".qweight", ".weight_packed"))}
    plain = {name: t for name, t in tensors.items() if name.rpartition(".")[0] not in stems or name.endswith(".bias")}
    found = {stem: values(tensors, stem) for stem in stems}
    out = {name: tensor for name, tensor in plain.items() if ".experts." not in name}
    out |= {
        f"{stem}.weight": bf16(value) for stem, value in found.items() if kind == "mixtral" or ".experts." not in stem
    }
    for layer in KEEP if kind == "gpt_oss" else ():
        home = f"model.layers.{layer}.mlp.experts"
        both, downs = (
            np.stack([np.concatenate([found[f"{home}.{e}.{name}_proj"] for name in names]).T for e in range(3)])
            for names in (("gate", "up"), ("down",))
        )
        biases, last = (
            np.stack([np.concatenate([plain[f"{home}.{e}.{n}_proj.bias"].float32() for n in names]) for e in range(3)])
            for names in (("gate", "up"), ("down",))
        )
        out[f"{home}.gate_up_proj"], out[f"{home}.gate_up_proj_bias"] = bf16(both), bf16(biases)
        out[f"{home}.down_proj"], out[f"{home}.down_proj_bias"] = bf16(downs), bf16(last)
    return out

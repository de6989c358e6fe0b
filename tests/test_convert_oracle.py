"""Converted checkpoints in the hands of transformers, auto-round and compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import barrage
import pytest
from build import read_checkpoint
from smaller import smaller
from test_prune_oracle import logits

from shardxform.checkpoint.table import Checkpoint
from shardxform.execution.runner import run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan.convert import Target, plan_convert
from shardxform.plan.quantize import plan_quantize

torch = pytest.importorskip("torch")
pytest.importorskip("auto_round")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.oracle


def quantize(source: Path, out: Path, names: Any = "split", **grid: Any) -> Path:
    scheme = Scheme(grid=Grid(**{"group_size": 64, **grid}), expert_names=names)
    run(plan_quantize(Checkpoint.open(source), scheme), out)
    return out


def converted(source: Path, out: Path, to: Any) -> Path:
    run(plan_convert(Checkpoint.open(source), Target(format=to)), out)
    return out


@pytest.fixture(scope="module")
def small_moe() -> Path:
    return smaller()


@pytest.fixture(scope="module")
def auto_round(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, rounded, in auto-round's format."""
    return quantize(small_moe, tmp_path_factory.mktemp("oracle") / "auto-round")


ELSEWHERE = """
import sys, torch
from pathlib import Path
checkpoint, small_moe, found, tests = map(Path, sys.argv[1:])
sys.path.insert(0, str(tests))
from test_prune_oracle import logits
torch.save(logits(checkpoint, small_moe), found)
raise SystemExit
"""


def logits_elsewhere(path: Path, small_moe: Path, folder: Path) -> Any:
    """The same in a process of its own: once auto-round has loaded a model, transformers misses packed experts."""
    nursery, found = barrage.nursery(tuple(barrage.COMPUTING)), folder / "logits.pt"
    words = list(map(str, (path, small_moe, found, Path(__file__).parent)))
    child = nursery.start(words, folder, "elsewhere", first=ELSEWHERE)
    assert nursery.wait(child, 240) == 0, child.err.read_text()
    return torch.load(found)


def stored(root: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: t for path in sorted(root.glob("*.safetensors")) for name, t in load_file(path).items()}


def gptq_values(tensors: dict[str, Any], bits: int, group_size: int) -> Iterator[tuple[str, Any]]:
    """float32 [O, I] of every module in gptq layout, with torch, bit by bit as the format describes it."""
    shifts = torch.arange(0, 32, bits)
    mask = (1 << bits) - 1
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        words, zeros, scales = (tensors[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales"))
        codes = (words[:, None, :] >> shifts[None, :, None]) & mask
        codes = codes.reshape(-1, words.shape[1])
        points = ((zeros[:, :, None] >> shifts) & mask).reshape(zeros.shape[0], -1) + 1
        group = torch.arange(codes.shape[0]) // (codes.shape[0] if group_size == -1 else group_size)
        yield stem, (scales.float()[group] * (codes - points[group]).float()).T.contiguous()


def weight(tensors: dict[str, Any], stem: str) -> Any:
    """A module's weight in a checkpoint whose experts are fused."""
    experts, dot, rest = stem.partition(".experts.")
    if not dot:
        return tensors[f"{stem}.weight"]
    number, projection = rest.split(".")
    if projection == "down_proj":
        return tensors[f"{experts}.experts.down_proj"][int(number)]
    return tensors[f"{experts}.experts.gate_up_proj"][int(number)].chunk(2)[projection == "up_proj"]


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, -1), (8, 32)])
def test_bf16_weights_equal_those_that_torch_dequantizes(
    bits: int, group_size: int, small_moe: Path, tmp_path: Path
) -> None:
    source = quantize(small_moe, tmp_path / "q", bits=bits, group_size=group_size, search=True)
    after = stored(converted(source, tmp_path / "bf16", "bf16"))
    assert after.keys() == stored(small_moe).keys()
    count = 0
    for stem, values in gptq_values(stored(source), bits, group_size):
        assert torch.equal(weight(after, stem), values.to(torch.bfloat16)), stem
        count += 1
    assert count == 61


def test_bf16_computes_in_transformers_what_the_auto_round_checkpoint_computes(
    auto_round: Path, small_moe: Path, tmp_path: Path
) -> None:
    """Logits agree to bfloat16 noise, far closer than either is to the model before rounding."""
    plain = converted(auto_round, tmp_path / "bf16", "bf16")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    ours, theirs, before = (logits(path, small_moe) for path in (plain, auto_round, small_moe))
    spread = theirs.std()
    assert (ours - theirs).abs().mean() < 0.01 * spread
    assert (ours - theirs).abs().mean() < 0.25 * (before - theirs).abs().mean()


@pytest.mark.parametrize("to", ["auto-round", "compressed-tensors"])
def test_the_older_spelling_becomes_loadable(to: str, auto_round: Path, small_moe: Path, tmp_path: Path) -> None:
    older = quantize(small_moe, tmp_path / "older", "fused-indexed")
    made = converted(older, tmp_path / "made", to)
    theirs = logits(auto_round, small_moe)
    if to == "auto-round":
        assert torch.equal(logits(made, small_moe), theirs)
    else:
        ours = logits_elsewhere(made, small_moe, tmp_path)
        assert (ours - theirs).abs().mean() < 0.01 * theirs.std()


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, -1), (8, 32)])
def test_compressed_tensors_decompresses_to_the_same_weights(
    bits: int, group_size: int, small_moe: Path, tmp_path: Path
) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    source = quantize(small_moe, tmp_path / "q", bits=bits, group_size=group_size, search=True)
    rows = stored(converted(source, tmp_path / "rows", "compressed-tensors"))
    for stem, values in gptq_values(stored(source), bits, group_size):
        shape = torch.Size(rows[f"{stem}.weight_shape"].tolist())
        scale = rows[f"{stem}.weight_scale"].float()
        codes = unpack_from_int32(rows[f"{stem}.weight_packed"], bits, shape).float()
        assert torch.equal(codes * scale.repeat_interleave(shape[1] // scale.shape[1], dim=1), values), stem


def test_what_upstream_writes_is_accepted_and_kept(small_moe: Path, tmp_path: Path) -> None:
    """Upstream's own checkpoint: its fields, its plain names of 16-bit modules, its order of tensors."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(small_moe, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(small_moe)
    quantizer = AutoRound(model, tokenizer, scheme="W4A16", iters=0, disable_opt_rtn=True, device_map="cpu")
    quantizer.quantize_and_save(str(tmp_path / "upstream"), format="auto_round")
    (upstream,) = (path.parent for path in (tmp_path / "upstream").rglob("config.json"))
    declared = json.loads((upstream / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.shared_expert_gate" in declared["extra_config"]
    ours = quantize(small_moe, tmp_path / "ours", group_size=128, scale_grid="fp16")
    assert read_checkpoint(upstream) == read_checkpoint(ours)
    for to in ("gptq", "compressed-tensors", "bf16"):
        made = converted(upstream, tmp_path / f"upstream-{to}", to)
        assert read_checkpoint(made) == read_checkpoint(converted(ours, tmp_path / f"ours-{to}", to))
    back = converted(tmp_path / "upstream-gptq", tmp_path / "back", "auto-round")
    assert read_checkpoint(back) == read_checkpoint(upstream)
    torch.testing.assert_close(logits(back, small_moe), logits(upstream, small_moe), rtol=0, atol=0)


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "bf16"])
def test_shards_equal_what_the_reference_writer_makes_of_the_same_tensors(
    to: str, auto_round: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    out = converted(auto_round, tmp_path / "out", to)
    save_file(load_file(out / "model.safetensors"), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()

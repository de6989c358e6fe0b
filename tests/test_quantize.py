"""`quantize` end to end: one pass equals two, bytes depend on inputs alone, bad weights are refused by name."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, read_checkpoint, tiny, write_checkpoint
from faults import Counting, Crashing, Failing, Short, forked, sampled
from test_prune import manifest_of
from test_run import looks_complete, tree

from shardxform.base.file_system import FileSystem
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import ExecutionError, SchemeError, ShardxformError
from shardxform.execution.runner import RunOptions, run
from shardxform.execution.transcoding import write_item
from shardxform.formats import integers
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan import plan as plan_module
from shardxform.plan.plan import Copy, Extent
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.steps import Transcode, TranscodeItem
from shardxform.plan.view import ViewOptions

SIZES: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32}
QWEN35: dict[str, Any] = {**SIZES, "shared_expert_intermediate_size": 32, "head_dim": 32, "linear_value_head_dim": 32}
KIND_SIZES: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": QWEN35,
    "qwen3_6_moe": QWEN35,
    "qwen3_5_moe_text": QWEN35,
    "qwen3_moe": {**SIZES, "head_dim": 32, "intermediate_size": 64},
    "deepseek_v3": {**SIZES, "intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 32},
}
SCHEME = Scheme(grid=Grid(group_size=32))
OPTIONS = ViewOptions(max_shard_bytes=100_000)


def make(root: Path, kind: str = "qwen3_5_moe", change: dict[str, Raw] | None = None) -> Path:
    config, tensors = tiny(kind, **KIND_SIZES[kind])
    return write_checkpoint(root, {**tensors, **(change or {})}, config, shards=3, files={"tokenizer.json": "{}"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "STEP_BYTES", 60_000)


def quantize(source: Path, out: Path, scheme: Scheme = SCHEME, *, pruned: bool = True, jobs: int = 2) -> Path:
    manifest = manifest_of(source) if pruned else None
    run(plan_quantize(Checkpoint.open(source), scheme, manifest, OPTIONS), out, RunOptions(jobs=jobs))
    return out


def without_record(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(root).items() if name != "shardxform.json"}


@pytest.mark.parametrize("kind", sorted(KIND_SIZES))
@pytest.mark.parametrize("format_", ["auto-round", "compressed-tensors"])
def test_one_pass_equals_prune_then_quantize(kind: str, format_: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind)
    scheme = replace(SCHEME, format=format_)
    run(plan_prune(Checkpoint.open(source), manifest_of(source)), tmp_path / "pruned")
    two = quantize(tmp_path / "pruned", tmp_path / "two", scheme, pruned=False)
    one = quantize(source, tmp_path / "one", scheme)
    assert without_record(one) == without_record(two)
    assert json.loads((one / "config.json").read_text())["quantization_config"]["quant_method"] == format_


def test_bytes_do_not_depend_on_how_the_source_is_sharded(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_5_moe", **QWEN35)
    shuffled = dict(sorted(tensors.items(), key=lambda item: item[0][::-1]))
    a = write_checkpoint(tmp_path / "a", tensors, config)
    b = write_checkpoint(tmp_path / "b", shuffled, config, shards=["z.safetensors", "a.safetensors"])
    outs = [without_record(quantize(source, tmp_path / f"out-{source.name}")) for source in (a, b)]
    assert outs[0] == outs[1]


def test_bytes_are_the_same_whatever_jobs_steps_tiles_and_short_calls(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = without_record(quantize(source, tmp_path / "a", jobs=1))
    assert without_record(quantize(source, tmp_path / "b", jobs=4)) == reference
    monkeypatch.setattr(plan_module, "STEP_BYTES", 9_000)
    monkeypatch.setattr(integers, "ROUND_TILE", 128)
    plan = plan_quantize(Checkpoint.open(source), SCHEME, manifest_of(source), OPTIONS)
    run(plan, tmp_path / "c", fs=Short())
    assert without_record(tmp_path / "c") == reference


@pytest.mark.crash
def test_a_crash_at_any_effect_ends_with_the_same_bytes(source: Path, tmp_path: Path) -> None:
    plan = plan_quantize(Checkpoint.open(source), SCHEME, manifest_of(source), OPTIONS)
    counting = Counting()
    run(plan, tmp_path / "reference", RunOptions(jobs=1), fs=counting)
    reference = tree(tmp_path / "reference")
    for k in sampled(counting.effects, step=23, ends=3):
        out = tmp_path / f"out{k}"
        assert forked(functools.partial(run, plan, out, RunOptions(jobs=1), fs=Crashing(k))) == 9
        if out.exists() and looks_complete(out):
            assert {name: data for name, data in tree(out).items() if name in reference} == reference
        run(plan, out)
        assert tree(out) == reference, f"effect {k}"


def test_an_error_while_rounding_is_resumed(source: Path, tmp_path: Path) -> None:
    plan = plan_quantize(Checkpoint.open(source), SCHEME, manifest_of(source), OPTIONS)
    run(plan, tmp_path / "reference")
    with pytest.raises(ShardxformError, match="run the same command again"):
        run(plan, tmp_path / "out", fs=Failing(120))
    report = run(plan, tmp_path / "out")
    assert report.resumed_bytes
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (1e30, "scale")])
def test_bad_weights_are_refused_naming_tensor_expert_and_row(value: float, what: str, tmp_path: Path) -> None:
    name = "model.language_model.layers.2.mlp.experts.gate_up_proj"
    _, tensors = tiny("qwen3_5_moe", **QWEN35)
    bits = tensors[name].array().copy()
    bits[5, 40, 3] = np.float32(value).view(np.uint32) >> 16  # row 40 of [E, 64, 64] is row 8 of the up projection
    source = make(tmp_path / "source", change={name: Raw("BF16", bits.shape, bits.tobytes())})
    with pytest.raises(ExecutionError, match=rf"gate_up_proj' \(module .*experts\.5\.up_proj\): .*{what}") as caught:
        quantize(source, tmp_path / "out", pruned=False)
    assert "row 8" in str(caught.value)
    assert not looks_complete(tmp_path / "out")


def test_an_expert_of_zeros_is_reported_and_recorded(tmp_path: Path) -> None:
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    _, tensors = tiny("qwen3_5_moe", **QWEN35)
    bits = tensors[name].array().copy()
    bits[3] = 0
    source = make(tmp_path / "source", change={name: Raw("BF16", bits.shape, bits.tobytes())})
    report = run(plan_quantize(Checkpoint.open(source), SCHEME, None, OPTIONS), tmp_path / "out")
    module = "model.language_model.layers.1.mlp.experts.3.down_proj"
    assert report.facts["zero_modules"] == [module]
    assert json.loads((tmp_path / "out" / "shardxform.json").read_text())["facts"]["zero_modules"] == [module]
    scales = read_checkpoint(tmp_path / "out")[module + ".scales"].array()
    assert set(scales.ravel().tolist()) == {float(np.float16(1e-5))}


def test_what_is_not_quantized_is_copied_byte_for_byte(source: Path, tmp_path: Path) -> None:
    before, after = read_checkpoint(source), read_checkpoint(quantize(source, tmp_path / "out", pruned=False))
    common = set(before) & set(after)
    assert {name: after[name] for name in common} == {name: before[name] for name in common}
    assert {"model.language_model.layers.0.linear_attn.A_log", "lm_head.weight", "mtp.fc.weight"} <= common
    assert not any("experts" in name for name in common if name.startswith("model."))


@pytest.mark.oracle
def test_a_torch_device_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu:0"  # cpu:0 goes through torch, cpu does not
    plan = plan_quantize(Checkpoint.open(source), SCHEME, manifest_of(source), OPTIONS)
    run(plan, tmp_path / "out", RunOptions(device=device))
    assert tree(tmp_path / "out") == tree(quantize(source, tmp_path / "reference"))


@pytest.mark.oracle
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    plan = plan_quantize(Checkpoint.open(source), SCHEME)
    with pytest.raises(SchemeError, match="`device` abacus"):
        run(plan, tmp_path / "out", RunOptions(device="abacus"))
    assert not (tmp_path / "out").exists()


def test_steps_read_every_kept_byte_once(source: Path) -> None:
    plan = plan_quantize(Checkpoint.open(source), SCHEME, manifest_of(source), OPTIONS)
    reads = sorted((r.file, r.offset, r.length) for step in plan.steps for r in step.reads)
    for (file, offset, length), following in pairwise(reads):
        assert file != following[0] or offset + length <= following[1]
    assert {type(step) for step in plan.steps} == {Copy, Transcode}


def test_a_quantized_source_is_refused(source: Path, tmp_path: Path) -> None:
    out = quantize(source, tmp_path / "out")
    with pytest.raises(SchemeError, match=r"nothing to round: all \d+ weights are 4-bit integers"):
        plan_quantize(Checkpoint.open(out), SCHEME)


def test_what_is_not_written_whole_is_no_success(tmp_path: Path) -> None:
    class Stunted:
        def written(self, _rows: Any, _writing: Any) -> Any:
            yield "values", 0, np.zeros(7, np.uint8)

    item = TranscodeItem("module", (), Stunted(), (("values", Extent(0, 0, 8)),))  # type: ignore[arg-type]
    fd = os.open(tmp_path / "shard", os.O_RDWR | os.O_CREAT)
    with pytest.raises(ExecutionError, match="module: 7 bytes written of 8"):
        write_item(item, (), None, lambda _shard: fd, FileSystem())  # type: ignore[arg-type]
    os.close(fd)

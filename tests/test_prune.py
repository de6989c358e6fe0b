"""Pruning: the output equals numpy slices of the loaded source, and everything else is untouched."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from build import INDEX, KINDS, Raw, read_checkpoint, read_shard, text_of, tiny, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from shardxform.ask.manifest import Manifest, keep_all
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import FamilyError, ManifestError, PlanError
from shardxform.execution.runner import RunOptions, run
from shardxform.model.layout import layout_of
from shardxform.plan import plan as plan_module
from shardxform.plan.prune import plan_prune
from shardxform.plan.view import ViewOptions, pruned_view

COUNT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")


def keep_of(config: dict[str, Any], *, seed: int = 0, per_group: int = 2) -> list[int]:
    """Some experts to keep: as many from each router group."""
    text = text_of(config)
    experts = next(text[key] for key in COUNT_KEYS if key in text)
    groups = text.get("n_group") or 1
    rng = np.random.default_rng(seed)
    size = experts // groups
    picks = [g * size + rng.choice(size, per_group, replace=False) for g in range(groups)]
    return sorted(int(e) for e in np.concatenate(picks))


def manifest_of(root: Path, *, mtp: bool = False, seed: int = 0) -> Manifest:
    source = Checkpoint.open(root)
    layout = layout_of(source.config, source.tensors)
    keep = {layer: tuple(keep_of(dict(source.config), seed=seed + layer)) for layer in layout.moe_layers}
    mtp_keep = {0: tuple(keep_of(dict(source.config), seed=seed + 99))} if mtp and layout.has_mtp else {}
    return Manifest(keep=keep, mtp_keep=mtp_keep)


def prune(root: Path, out: Path, manifest: Manifest | None, options: ViewOptions | None = None, jobs: int = 2) -> Path:
    run(plan_prune(Checkpoint.open(root), manifest, options), out, RunOptions(jobs=jobs))
    return out


ROUTERS = r"\.mlp\.(gate|router)\.|\.block_sparse_moe\.gate\."


def in_memory(
    config: dict[str, Any], tensors: dict[str, Raw], keep: dict[int, Any], mtp_keep: dict[int, Any]
) -> dict[str, Raw]:
    """Prune a loaded checkpoint the obvious way: by string handling and numpy indexing."""
    layers = text_of(config)["num_hidden_layers"]
    out: dict[str, Raw] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        keeps = keep
        layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
        if name.startswith("mtp.") or layer >= layers:
            if not mtp_keep:
                continue
            keeps, layer = mtp_keep, 0
        ids = keeps.get(layer) if ".mlp." in name or ".block_sparse_moe." in name else None
        if ids is None or "shared_expert" in name:
            out[name] = tensor
        elif parts[-1].removesuffix("_bias") in ("gate_up_proj", "down_proj") or re.search(ROUTERS, name):
            data = np.ascontiguousarray(tensor.array()[list(ids)])
            out[name] = Raw(tensor.dtype, data.shape, data.tobytes())
        elif "experts" in parts:
            at = parts.index("experts") + 1
            if int(parts[at]) in ids:
                parts[at] = str(list(ids).index(int(parts[at])))
                out[".".join(parts)] = tensor
        else:
            out[name] = tensor
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mtp", [False, True])
def test_pruned_tensors_equal_numpy_slices_of_the_loaded_source(
    kind: str, mtp: bool, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    config, tensors = tiny(kind)
    manifest = manifest_of(tiny_checkpoints[kind], mtp=mtp)
    out = prune(tiny_checkpoints[kind], tmp_path / "out", manifest, ViewOptions(max_shard_bytes=20_000))
    assert read_checkpoint(out) == in_memory(config, tensors, dict(manifest.keep), dict(manifest.mtp_keep))


@pytest.mark.parametrize("kind", KINDS)
def test_config_changes_in_the_expert_and_mtp_counts_only(
    kind: str, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    config, _ = tiny(kind)
    manifest = manifest_of(tiny_checkpoints[kind])
    out = prune(tiny_checkpoints[kind], tmp_path / "out", manifest)
    expected = json.loads(json.dumps(config))
    for key in COUNT_KEYS:
        if key in text_of(expected):
            text_of(expected)[key] = manifest.num_kept
    for key in ("mtp_num_hidden_layers", "num_nextn_predict_layers"):
        if text_of(expected).get(key):
            text_of(expected)[key] = 0
    written = json.loads((out / "config.json").read_text())
    assert written == expected
    assert list(text_of(written)) == list(text_of(config)), "the order of keys changed"


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_experts_is_the_identity(kind: str, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    root = tiny_checkpoints[kind]
    source = Checkpoint.open(root)
    out = prune(root, tmp_path / "out", keep_all(layout_of(source.config, source.tensors)))
    assert read_checkpoint(out) == read_checkpoint(root)
    assert (out / "config.json").read_bytes() == (root / "config.json").read_bytes()


def test_output_shards_equal_the_reference_writers_bytes(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe", dtype="F16")
    root = write_checkpoint(tmp_path / "source", tensors, config, shards=2)
    out = prune(root, tmp_path / "out", manifest_of(root), ViewOptions(max_shard_bytes=4_000))
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        arrays = {name: raw.array() for name, raw in read_shard(shard).items()}
        assert shard.read_bytes() == save(arrays, metadata={"format": "pt"})


def test_index_names_every_tensor_and_the_true_size(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    root = tiny_checkpoints["qwen3_5_moe"]
    out = prune(root, tmp_path / "out", manifest_of(root), ViewOptions(max_shard_bytes=8_000))
    index = json.loads((out / INDEX).read_text())
    held = {name: path.name for path in out.glob("*.safetensors") for name in read_shard(path)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in read_checkpoint(out).values())


@given(seed=st.integers(0, 1000), size=st.sampled_from([1, 700, 5_000, 10**9]), jobs=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_bytes_depend_on_neither_jobs_nor_step_size(
    seed: int, size: int, jobs: int, tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, folder = tiny_checkpoints["qwen3_5_moe"], tmp_path_factory.mktemp("jobs")
    manifest, options = manifest_of(root, seed=seed), ViewOptions(max_shard_bytes=size)
    first = prune(root, folder / "a", manifest, options, jobs=1)
    with patch.object(plan_module, "STEP_BYTES", 1):
        plan = plan_prune(Checkpoint.open(root), manifest, options)
    assert len(plan.steps) == sum(len(shard.entries) for shard in plan.shards)
    run(plan, folder / "b", RunOptions(jobs=jobs))
    a, b = (
        {p.name: p.read_bytes() for p in path.iterdir() if p.name != "shardxform.json"}
        for path in (first, folder / "b")
    )
    assert a == b


def test_text_only_drops_the_tower_and_promotes_the_text_config(
    tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    root = tiny_checkpoints["qwen3_5_moe"]
    config, tensors = tiny("qwen3_5_moe")
    out = prune(root, tmp_path / "out", manifest_of(root, mtp=True), ViewOptions(text_only=True))
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert written["model_type"] == "qwen3_5_moe_text"
    assert written["num_experts"] == 2
    assert "vision_config" not in written
    assert {k: v for k, v in config["text_config"].items() if k != "num_experts"}.items() <= written.items()
    names = set(read_checkpoint(out))
    assert not any("visual" in name or "language_model" in name for name in names)
    expected = {
        name.replace("model.language_model.", "model.")
        for name in in_memory(config, tensors, dict(manifest_of(root).keep), {0: (0, 1)})
        if "visual" not in name
    }
    assert {n for n in names if not n.startswith("mtp.")} == {n for n in expected if not n.startswith("mtp.")}


def test_mtp_keep_without_a_list_is_refused(tiny_checkpoints: dict[str, Path]) -> None:
    root = tiny_checkpoints["qwen3_5_moe"]
    with pytest.raises(ManifestError, match="has no mtp_keep"):
        plan_prune(Checkpoint.open(root), manifest_of(root), ViewOptions(mtp="keep"))


def test_correction_bias_stays_float32_and_follows_its_experts(
    tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    root = tiny_checkpoints["deepseek_v3"]
    manifest = manifest_of(root)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = read_checkpoint(root)[name]
    after = read_checkpoint(prune(root, tmp_path / "out", manifest))[name]
    assert after.dtype == "F32"
    assert after.array().tolist() == before.array()[list(manifest.keep[1])].tolist()


def _with(root: Path, extra: dict[str, Raw], kind: str, drop: tuple[str, ...] = ()) -> Checkpoint:
    config, tensors = tiny(kind)
    kept = {name: t for name, t in tensors.items() if name not in drop}
    return Checkpoint.open(write_checkpoint(root, {**kept, **extra}, config))


def test_unknown_tensors_are_copied_and_reported(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    extra = {"model.novelty.weight": Raw("F32", (3,), bytes(12))}
    plan = plan_prune(_with(tmp_path / "s", extra, "qwen3_moe"), manifest_of(tiny_checkpoints["qwen3_moe"]))
    assert any("model.novelty.weight" in note for note in plan.notes)
    assert any(e.spec.name == "model.novelty.weight" for shard in plan.shards for e in shard.entries)


def test_unknown_tensors_that_count_experts_are_refused(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    extra = {"model.layers.0.mlp.balance": Raw("F32", (6,), bytes(24))}
    with pytest.raises(PlanError, match=r"mlp\.balance.*unknown to family qwen3_moe"):
        plan_prune(_with(tmp_path / "s", extra, "qwen3_moe"), manifest_of(tiny_checkpoints["qwen3_moe"]))


def test_a_source_without_one_of_its_experts_is_refused(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(FamilyError, match=r"experts\.3\.up_proj\.weight' is missing"):
        plan_prune(_with(tmp_path / "s", {}, "qwen3_moe", (name,)), manifest_of(tiny_checkpoints["qwen3_moe"]))


def test_a_source_with_one_expert_too_many_is_refused(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    extra = {"model.layers.1.mlp.experts.6.up_proj.weight": Raw("BF16", (12, 16), bytes(384))}
    with pytest.raises(FamilyError, match=r"experts\.6\.up_proj"):
        plan_prune(_with(tmp_path / "s", extra, "qwen3_moe"), manifest_of(tiny_checkpoints["qwen3_moe"]))


def test_a_router_of_another_size_is_refused(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    extra = {"model.layers.1.mlp.gate.weight": Raw("BF16", (5, 16), bytes(160))}
    with pytest.raises(FamilyError, match=r"shape \[5, 16\], but the config promises \[6, 16\]"):
        plan_prune(_with(tmp_path / "s", extra, "qwen3_moe"), manifest_of(tiny_checkpoints["qwen3_moe"]))


def test_float8_experts_keep_their_scales(tmp_path: Path) -> None:
    config, tensors = tiny("deepseek_v3")
    scales = {
        name + "_scale_inv": Raw("F32", (1, 1), np.float32([[i]]).tobytes())
        for i, name in enumerate(tensors)
        if ".experts." in name
    }
    root = write_checkpoint(tmp_path / "s", {**tensors, **scales}, config)
    manifest = manifest_of(root)
    out = read_checkpoint(prune(root, tmp_path / "out", manifest))
    for layer in (1, 2):
        for new, old in enumerate(manifest.keep[layer]):
            name = "model.layers.{}.mlp.experts.{}.up_proj.weight_scale_inv"
            assert out[name.format(layer, new)] == scales[name.format(layer, old)]


def test_a_plan_carries_the_view_that_it_was_made_of(tiny_checkpoint: Path) -> None:
    source, manifest = Checkpoint.open(tiny_checkpoint), manifest_of(tiny_checkpoint)
    plan = plan_prune(source, manifest, ViewOptions(mtp="drop"))
    view = pruned_view(source, manifest, mtp="drop").checkpoint
    assert (plan.view.tensors, plan.view.config) == (view.tensors, view.config)
    assert plan.fingerprint == replace(plan, view=source).fingerprint  # its steps and heads are

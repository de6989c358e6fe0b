"""Figures, scores and manifests are taken for no other checkpoint's, though only values tell the two apart."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import tiny, write_checkpoint
from click.testing import CliRunner
from test_identity import flip
from test_prune import manifest_of
from texts import few

from shardxform.checkpoint.identity import identify
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import PlanError
from shardxform.execution.runner import run
from shardxform.experts import ExpertStats, Saliency, difference_of_models
from shardxform.plan.prune import plan_prune
from shardxform.publish.card.gathering import read_evaluation

EVALUATION: dict[str, Any] = {
    "data": {"data": "held.jsonl", "sha256": "ab", "files": ["held.jsonl"], "seqlen": 64},
    "windows": 2,
    "tokens": 128,
    "perplexity": 9.5,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config, tensors = tiny("qwen3_moe")
    return write_checkpoint(tmp_path / "source", tensors, config)


def pruned(source: Path, out: Path, seed: int) -> Checkpoint:
    run(plan_prune(Checkpoint.open(source), manifest_of(source, seed=seed)), out)
    return Checkpoint.open(out)


def test_figures_of_another_pruning_to_the_same_count_are_refused(source: Path, tmp_path: Path) -> None:
    one, other = (pruned(source, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1)))
    assert [shard.header_sha256 for shard in one.shards] == [shard.header_sha256 for shard in other.shards]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"identity": identify(one).described(), **EVALUATION}))
    assert read_evaluation(path, one).perplexity == 9.5
    with pytest.raises(PlanError, match=f"of another checkpoint than {other.root}: other values in tensor"):
        read_evaluation(path, other)


@pytest.mark.parametrize("identity", [None, {}, {"config": "x"}, "2b745d0ae5ce"])
def test_figures_that_do_not_say_of_which_values_they_are_are_refused(
    identity: Any, source: Path, tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"fingerprint": "ab", "identity": identity, **EVALUATION}))
    with pytest.raises(PlanError, match="says nothing of the values that it is of, as earlier versions did not"):
        read_evaluation(path, Checkpoint.open(source))


def saliency(root: Path, **run_facts: Any) -> Saliency:
    checkpoint, ones = Checkpoint.open(root), np.ones(8)
    stats = ExpertStats(count_E=ones.astype(np.int64), reap_E=ones, ean_E=ones, gate_E=ones, peak_E=ones)
    found = identify(checkpoint)
    model = {"model_type": "qwen3_moe", "num_layers": 1, "num_experts": 8, "num_experts_per_tok": 2, "num_groups": 1}
    return Saliency(
        model={**model, "source_fingerprint": found.fingerprint, "identity": found.described()},
        layers={0: stats},
        mtp_layers={},
        tokens=4,
        runs=(run_facts,),
        where=root.name,
    )


def test_scores_of_another_fine_tune_do_not_add_up(source: Path, tmp_path: Path) -> None:
    tuned = shutil.copytree(source, tmp_path / "tuned")
    flip(tuned, next(n for n in Checkpoint.open(tuned).tensors if "down_proj" in n), 5, 3)
    one = saliency(source)
    assert one.added(saliency(source)).tokens == 8
    with pytest.raises(PlanError, match=r"tuned: model.identity: other values in .*; only runs over the same"):
        one.added(saliency(tuned))


def test_scores_with_another_tokenizer_do_not_add_up(source: Path) -> None:
    one = saliency(source, tokenizer="aa")
    assert len(one.added(saliency(source, tokenizer="aa")).runs) == 2
    with pytest.raises(PlanError, match="another tokenizer"):
        one.added(saliency(source, tokenizer="bb"))


def test_models_of_an_earlier_version_are_compared_by_what_they_say(source: Path) -> None:
    model = {key: value for key, value in saliency(source).model.items() if key != "identity"}
    assert difference_of_models(model, model) == ""
    assert difference_of_models(model, {**model, "source_fingerprint": "cd"}).startswith(
        "model.source_fingerprint: 'cd'"
    )


def scored(source: Path, out: Path, *more: str) -> str:
    text = few("calib.jsonl")
    options = ("--samples", "1", "--seqlen", "16", "--dtype", "float32", "-q", *more)
    result = CliRunner().invoke(main, ["score", str(source), "-o", str(out), "--data", str(text), *options])
    assert result.exit_code in (0, 1), result.output
    return result.output


@pytest.mark.oracle
def test_scores_are_not_called_complete_for_a_copy_with_another_router(small_moe: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    copy, out = shutil.copytree(small_moe, tmp_path / "copy"), tmp_path / "a.sal"
    assert "complete and durable" in scored(small_moe, out)
    assert "already complete, made from the same inputs" in scored(copy, out)
    flip(copy, "model.layers.2.mlp.gate.weight", 1)
    told = "holds a saliency of another run: model.identity: other values in tensor 'model.layers.2.mlp.gate.weight'"
    assert told in scored(copy, out)
    assert "--seqlen" in scored(small_moe, out, "--seqlen", "8") or "windows" in scored(small_moe, out, "--seqlen", "8")
    keep = tmp_path / "keep.json"
    select = CliRunner().invoke(main, ["select", str(out), "--keep", "8", "-o", str(keep)])
    assert select.exit_code == 0, select.output
    prune = ["prune", str(copy), str(tmp_path / "out"), "-m", str(keep), "-q"]
    refused = CliRunner().invoke(main, prune)
    assert refused.exit_code == 1
    assert "chosen on another checkpoint: other values in tensor 'model.layers.2.mlp.gate.weight'" in refused.output
    assert not os.path.lexists(tmp_path / "out")
    assert CliRunner().invoke(main, [*prune, "--any-source"]).exit_code == 0
    assert (
        CliRunner().invoke(main, ["prune", str(small_moe), str(tmp_path / "own"), "-m", str(keep), "-q"]).exit_code == 0
    )

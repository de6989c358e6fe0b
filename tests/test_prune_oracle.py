"""The pruned small checkpoint in transformers: loads cleanly, and computes what pruning the loaded model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from smaller import smaller
from texts import TEXTS

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.execution.runner import run
from shardxform.plan.prune import plan_prune

pytestmark = pytest.mark.oracle

KEEP = {0: (0, 2, 5, 7), 1: (4, 5, 6, 7)}


@pytest.fixture(scope="module")
def small_moe() -> Path:
    return smaller()


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    return model.eval(), info


def tokens(small_moe: Path) -> Any:
    import torch
    from transformers import AutoTokenizer

    text = json.loads((TEXTS / "heldout.jsonl").read_text().splitlines()[0])["text"]
    ids = AutoTokenizer.from_pretrained(small_moe)(text).input_ids[:96]
    return torch.tensor([ids[:48], ids[48:]])


def logits(path: Path, small_moe: Path) -> Any:
    """Of a checkpoint that transformers finds whole."""
    import torch

    model, info = load(path)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{kind}: {sorted(info[kind])[:3]}"
    with torch.no_grad():
        return model(tokens(small_moe)).logits.float()


def prune_loaded(model: Any, keep: dict[int, tuple[int, ...]]) -> Any:
    """Cut the experts out of a loaded model by indexing its parameters."""
    import torch

    for layer, ids in keep.items():
        mlp, index = model.model.layers[layer].mlp, torch.tensor(ids)
        for module, name in ((mlp.experts, "gate_up_proj"), (mlp.experts, "down_proj"), (mlp.gate, "weight")):
            parameter = getattr(module, name)
            setattr(module, name, torch.nn.Parameter(parameter.detach()[index].clone(), requires_grad=False))
        mlp.experts.num_experts = mlp.gate.num_experts = len(ids)
    return model


def test_the_pruned_checkpoint_computes_what_the_model_pruned_in_memory_computes(
    small_moe: Path, tmp_path: Path
) -> None:
    import torch

    run(plan_prune(Checkpoint.open(small_moe), Manifest(keep=KEEP)), tmp_path / "out")
    pruned, info = load(tmp_path / "out")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    batch = tokens(small_moe)
    with torch.no_grad():
        ours = pruned(batch).logits
        original, _ = load(small_moe)
        before = original(batch).logits
        reference = prune_loaded(original, KEEP)(batch).logits
    assert torch.equal(ours, reference)
    assert not torch.equal(before, reference), "the oracle pruned nothing"


def test_shards_equal_what_the_reference_writer_makes_of_the_same_tensors(small_moe: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    run(plan_prune(Checkpoint.open(small_moe), Manifest(keep=KEEP)), out)
    save_file(load_file(out / "model.safetensors"), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()

"""What transformers has no code for in families that are sliced otherwise: tensors by hand, in names of releases."""

from __future__ import annotations

from pathlib import Path

import any_moe
import pytest
from build import random_tensors, read_checkpoint, write_checkpoint

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.execution.runner import RunOptions, run
from shardxform.model.layout import layout_of
from shardxform.plan.prune import plan_prune
from shardxform.plan.view import MtpMode, ViewOptions
from shardxform.verification import verify

pytestmark = pytest.mark.oracle


def pruned(source: Path, out: Path, keep: Manifest, mtp: MtpMode = "auto") -> Path:
    """A pruned output, sound by every check."""
    run(plan_prune(Checkpoint.open(source), keep, ViewOptions(mtp=mtp)), out, RunOptions(jobs=1))
    report = verify(out, source=source, manifest=keep, mtp=mtp, independent=True)
    assert (report.problems, report.tensors_differing) == ((), 0)
    return out


@pytest.mark.parametrize("mtp", ["auto", "drop"])
def test_mtp_layers_of_ernie_have_no_experts_and_stay_as_they_are(mtp: MtpMode, tmp_path: Path) -> None:
    plain = any_moe.save(any_moe.build("ernie4_5_moe"), tmp_path / "plain")
    tensors, config = read_checkpoint(plain), dict(Checkpoint.open(plain).config)
    dense = {name: raw.shape for name, raw in tensors.items() if name.startswith("model.layers.0.")}
    shapes = {name.replace("layers.0.", "mtp_block.0."): shape for name, shape in dense.items()}
    shapes |= {f"model.mtp_{name}.0.weight": (64,) for name in ("emb_norm", "hidden_norm")}
    shapes["model.mtp_linear_proj.0.weight"] = (64, 128)
    extra = random_tensors(shapes)
    source = write_checkpoint(tmp_path / "in", {**tensors, **extra}, {**config, "num_nextn_predict_layers": 1})
    checkpoint = Checkpoint.open(source)
    layout = layout_of(checkpoint.config, checkpoint.tensors)
    assert (layout.unknown, layout.mtp_layers, layout.has_mtp) == ((), 1, True)
    out = read_checkpoint(pruned(source, tmp_path / "out", Manifest(keep={1: (0, 2, 5)}), mtp))
    assert {name: out.get(name) for name in extra} == (extra if mtp == "auto" else dict.fromkeys(extra))
    assert Checkpoint.open(tmp_path / "out").config["num_nextn_predict_layers"] == (mtp == "auto")

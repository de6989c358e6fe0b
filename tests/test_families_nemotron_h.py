"""Nemotron-3: MTP layers of several blocks, and configs as they are in the wild."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, bf16, read_checkpoint, write_checkpoint
from safetensors.torch import load_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import any_moe  # noqa: E402
from test_every_family import CASES, FLOAT32, IDS  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.errors import CheckpointError, FamilyError  # noqa: E402
from shardxform.execution.runner import RunOptions, run  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.forward.skeleton import Skeleton, mtp_layer  # noqa: E402
from shardxform.forward.weights import Weights  # noqa: E402
from shardxform.model.layout import layout_of  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

MOE, ATTENTION = 1, 2
KEEP, MTP_KEEP = {MOE: (0, 2, 3, 5)}, {0: (1, 2, 4, 5)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an MTP layer in the names that vLLM reads, its blocks like those of the decoder."""
    root = tmp_path_factory.mktemp("nemotron")
    plain = any_moe.save(any_moe.build("nemotron_h", **CASES["nemotron_h"].over), root / "plain")
    config = json.loads((plain / "config.json").read_text())
    tensors = read_checkpoint(plain)
    rng = np.random.default_rng(0)

    def random(shape: tuple[int, ...], around: float = 0.0) -> Raw:
        return bf16((rng.standard_normal(shape) * 0.1 + around).astype(np.float32))

    more = {}
    for number, like in enumerate((ATTENTION, MOE)):
        for name, raw in tensors.items():
            prefix = f"backbone.layers.{like}."
            if name.startswith(prefix):
                shape = raw.shape
                value = random(shape, 1.0 if "norm" in name else 0.0)
                more[f"mtp.layers.{number}.{name.removeprefix(prefix)}"] = value if raw.dtype == "BF16" else raw
    hidden = config["hidden_size"]
    more |= {f"mtp.layers.0.{name}.weight": random((hidden,), 1.0) for name in ("enorm", "hnorm")}
    more |= {"mtp.layers.0.eh_proj.weight": random((hidden, 2 * hidden))}
    more |= {"mtp.layers.1.final_layernorm.weight": random((hidden,), 1.0)}
    del config["mtp_layers_block_type"]
    config |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    files = {path.name: path.read_text() for path in plain.glob("token*.json")}
    return write_checkpoint(root / "mtp", {**tensors, **more}, config, files=files)


def test_mtp_layers_are_pruned_by_their_own_list_or_dropped_with_their_count(source: Path, tmp_path: Path) -> None:
    checkpoint, tensors = Checkpoint.open(source), read_checkpoint(source)
    layout = layout_of(checkpoint.config, checkpoint.tensors)
    assert (layout.unknown, layout.mtp_layers, layout.mtp_blocks, layout.num_layers) == ((), 1, 2, 4)
    report = verify(source)
    assert (report.problems, report.warnings) == ((), ())
    for name, keep in (("kept", Manifest(keep=KEEP, mtp_keep=MTP_KEEP)), ("dropped", Manifest(keep=KEEP))):
        run(plan_prune(checkpoint, keep), tmp_path / name, RunOptions(jobs=1))
        found = verify(tmp_path / name, source=checkpoint, independent=True)
        assert (found.problems, found.tensors_differing) == ((), 0)
    kept, dropped = (read_checkpoint(tmp_path / name) for name in ("kept", "dropped"))
    for new, old in enumerate(MTP_KEEP[0]):
        for part in ("up_proj", "down_proj"):
            names = (f"mtp.layers.1.mixer.experts.{each}.{part}.weight" for each in (new, old))
            assert kept[next(names)] == tensors[next(names)]
    rows = tensors["mtp.layers.1.mixer.gate.weight"].float32()[list(MTP_KEEP[0])]
    assert np.array_equal(kept["mtp.layers.1.mixer.gate.weight"].float32(), rows)
    assert not any(name.startswith("mtp.") for name in dropped)
    assert json.loads((tmp_path / "dropped" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_a_missing_tensor_of_an_mtp_layer_is_found(source: Path, tmp_path: Path) -> None:
    tensors, config = read_checkpoint(source), Checkpoint.open(source).config
    for name in (
        "mtp.layers.1.final_layernorm.weight",
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.1.mixer.gate.weight",
    ):
        less = {other: raw for other, raw in tensors.items() if other != name}
        assert verify(write_checkpoint(tmp_path / name, less, config)).problems, name


@torch.no_grad()
def test_an_mtp_layer_is_run_as_transformers_runs_its_blocks(source: Path, tmp_path: Path) -> None:
    model = any_moe.build("nemotron_h", **CASES["nemotron_h"].over)
    tensors = {name: value.float() for path in source.glob("*.safetensors") for name, value in load_file(path).items()}
    hidden = torch.randn(*IDS.shape, 64, generator=torch.Generator().manual_seed(3))

    def block(number: int, like: int) -> Any:
        out, prefix = copy.deepcopy(model.model.layers[like]), f"mtp.layers.{number}."
        for name in out.state_dict():
            target = out.get_parameter(name) if name in dict(out.named_parameters()) else out.get_buffer(name)
            if name.startswith("mixer.experts."):
                part = name.removeprefix("mixer.experts.")
                each = [tensors[f"{prefix}mixer.experts.{e}.{part}.weight"] for e in range(any_moe.EXPERTS)]
                target.copy_(torch.stack(each))
            else:
                target.copy_(tensors[prefix + name])
        return out

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (64,), tensors[f"mtp.layers.{name}.weight"], 1e-5)

    embedded = model.model.embeddings(IDS[:, 1:])
    both = torch.cat((normed(embedded, "0.enorm"), normed(hidden[:, :-1], "0.hnorm")), dim=-1)
    state = torch.nn.functional.linear(both, tensors["mtp.layers.0.eh_proj.weight"])
    state = block(1, MOE)(block(0, ATTENTION)(state))
    with Weights(Checkpoint.open(source), FLOAT32) as weights, mtp_layer(Skeleton(weights), 0, None) as layer:
        found = layer(IDS, hidden)
    torch.testing.assert_close(found, normed(state, "1.final_layernorm"), rtol=2e-5, atol=2e-5)
    windows = Windows(ids_NT=IDS.numpy().astype(np.int32), fingerprint="x", provenance={"data": "random"}, notes=())
    scored = score(Checkpoint.open(source), windows, ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))
    assert (list(scored.layers), list(scored.mtp_layers)) == ([MOE], [0])


def test_kinds_of_blocks_may_be_a_pattern_and_the_count_of_layers_be_missing(source: Path) -> None:
    checkpoint = Checkpoint.open(source)
    config = {key: value for key, value in checkpoint.config.items() if key not in ("layers_block_type", "layer_types")}
    for said in ({"hybrid_override_pattern": "ME*-"}, {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}):
        layout = layout_of({**config, **said}, checkpoint.tensors)
        assert (layout.num_layers, layout.moe_layers, layout.unknown) == (4, (MOE,), ())
    for wrong in ({"hybrid_override_pattern": "ME+-"}, {"layers_block_type": ["moe", 3]}, {}):
        with pytest.raises(FamilyError, match="cannot tell how many layers there are: layers_block_type"):
            layout_of({**config, **wrong}, checkpoint.tensors)


INFINITY = ("Infinity", '"Infinity"', '{"__float__": "Infinity"}')


@pytest.mark.parametrize("written", INFINITY)
def test_infinity_in_a_config_is_taken_however_it_is_written_and_given_back_so(
    written: str, source: Path, tmp_path: Path
) -> None:
    root = tmp_path / "source"
    write_checkpoint(root, read_checkpoint(source), Checkpoint.open(source).config)
    config = json.loads((root / "config.json").read_text()) | {"time_step_limit": ["?"]}
    text = json.dumps(config, indent=2).replace('"?"', f"0.0, {written}")
    (root / "config.json").write_text(text)
    checkpoint = Checkpoint.open(root)
    with Weights(checkpoint, FLOAT32) as weights:
        assert Skeleton(weights).num_blocks == 4
    if written == INFINITY[1]:  # which transformers refuses, so that nothing is made of it
        assert any("time_step_limit: expected list of float" in each.message for each in verify(root).problems)
        return
    assert verify(root).problems == ()
    run(plan_prune(checkpoint, Manifest(keep=KEEP)), tmp_path / "out", RunOptions(jobs=1))
    out = (tmp_path / "out" / "config.json").read_text()
    limit = [0.0, json.loads(written)]
    assert json.loads(out)["time_step_limit"] == limit
    assert (written in out) or written == INFINITY[2]
    report = verify(tmp_path / "out", source=checkpoint, independent=True)
    assert (report.problems, report.tensors_differing) == ((), 0)


def test_infinity_is_refused_in_other_files_and_beyond_a_double(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "source"
    write_checkpoint(root, read_checkpoint(source), Checkpoint.open(source).config, shards=2)
    config = (root / "config.json").read_text()
    (root / "config.json").write_text(config.replace("{", '{"huge": 1e999,', 1))
    with pytest.raises(CheckpointError, match="1e999 is beyond a double"):
        Checkpoint.open(root)
    (root / "config.json").write_text(config)
    index = root / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("{", '{"more": Infinity,', 1))
    with pytest.raises(CheckpointError, match="Infinity is not JSON"):
        Checkpoint.open(root)

"""Gemma 4 with its vision tower: pruned whole and as text alone, run, and quantized, against transformers' class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from build import read_checkpoint, write_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import any_moe  # noqa: E402
from test_every_family import CASES, FLOAT32, IDS, classes_put_back, keep_of, loaded, sliced  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.errors import FamilyError  # noqa: E402
from shardxform.execution.runner import RunOptions, run  # noqa: E402
from shardxform.formats.scheme import Grid, Scheme  # noqa: E402
from shardxform.forward.skeleton import Skeleton  # noqa: E402
from shardxform.forward.weights import Weights  # noqa: E402
from shardxform.model.layout import layout_of  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
from shardxform.plan.quantize import plan_quantize  # noqa: E402
from shardxform.plan.view import ViewOptions  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "position_embedding_size": 20,
    "patch_size": 4,
}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "clipped"])
def model(request: pytest.FixtureRequest) -> Any:
    text = any_moe.tiny_config("gemma4_text", **CASES["gemma4_text"].over)
    vision = VISION | dict.fromkeys(("standardize", "use_clipped_linears"), request.param)
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    return any_moe.randomized(transformers.Gemma4ForConditionalGeneration(config).float().eval())


@pytest.fixture(scope="module")
def source(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    root = any_moe.save(model, tmp_path_factory.mktemp("gemma4"))
    (root / "preprocessor_config.json").write_text("{}")
    return Checkpoint.open(root)


def whole(root: Path, **given: Any) -> Any:
    """What transformers' multimodal class makes of a checkpoint that holds all that it wants and nothing else."""
    kind = transformers.Gemma4ForConditionalGeneration
    out, told = kind.from_pretrained(root, output_loading_info=True, **given)
    assert {key: list(value) for key, value in told.items() if value} == {}
    return out.eval()


def test_it_is_pruned_whole_and_as_text_alone(model: Any, source: Checkpoint, tmp_path: Path) -> None:
    layout = layout_of(source.config, source.tensors)
    assert (layout.unknown, layout.has_vision, verify(source.root).problems) == ((), True, ())
    keep = keep_of(source)
    for text_only, load in ((False, whole), (True, loaded)):
        out = tmp_path / str(text_only)
        run(plan_prune(source, Manifest(keep=keep), ViewOptions(text_only=text_only)), out, RunOptions(jobs=1))
        smaller = load(out)
        wanted = sliced(model.model.language_model, smaller.get_decoder(), keep)
        assert all(torch.equal(value.float(), wanted[n]) for n, value in smaller.get_decoder().state_dict().items())
        report = verify(out, source=source, independent=True, text_only=text_only)
        assert (report.problems, report.tensors_differing) == ((), 0)
        assert (out / "preprocessor_config.json").exists() is not text_only


@torch.no_grad()
def test_its_decoder_is_run(model: Any, source: Checkpoint) -> None:
    with Weights(source, FLOAT32) as weights:
        skeleton = Skeleton(weights)
        hidden = skeleton.embed(IDS)
        for layer in range(skeleton.num_blocks):
            with skeleton.block(layer) as block:
                hidden = block(hidden)
        with skeleton.head() as head:
            found = head.logits(hidden.flatten(0, 1)).view(*IDS.shape, -1)
    torch.testing.assert_close(found, model(input_ids=IDS).logits, rtol=2e-6, atol=2e-6)


@torch.no_grad()
def test_it_is_loaded_quantized_with_its_tower_in_16_bits(model: Any, source: Checkpoint, tmp_path: Path) -> None:
    scheme = Scheme(grid=Grid(bits=8, group_size=32), format="auto-round")
    run(plan_quantize(source, scheme), tmp_path / "out", RunOptions(jobs=1))
    assert verify(tmp_path / "out", source=source, independent=True).problems == ()
    with classes_put_back(model):
        found = whole(tmp_path / "out", dtype=torch.bfloat16)(input_ids=IDS).logits.float()
    wanted = model(input_ids=IDS).logits
    assert float((found - wanted).abs().median()) < 0.05 * float(wanted.std())


def test_what_only_dense_models_have_is_refused_in_a_line(source: Checkpoint) -> None:
    for key, value in (("hidden_size_per_layer_input", 8), ("num_kv_shared_layers", 1), ("use_double_wide_mlp", True)):
        config = {**source.config, "text_config": {**source.config["text_config"], key: value}}
        with pytest.raises(FamilyError, match=f"{key} {value}: expected none in a model with experts"):
            layout_of(config, source.tensors)


def test_sizes_of_full_attention_are_read_as_releases_and_as_transformers_write_them(
    source: Checkpoint, tmp_path: Path
) -> None:
    text = dict(source.config["text_config"])
    assert text.pop("per_layer_config") == {"1": {"head_dim": 32, "num_key_value_heads": 1}}
    config = {**source.config, "text_config": {**text, "global_head_dim": 32, "num_global_key_value_heads": 1}}
    tensors = read_checkpoint(source.root)
    root = write_checkpoint(tmp_path / "right", tensors, config, files={"preprocessor_config.json": "{}"})
    assert verify(root).problems == ()
    config = json.loads(json.dumps(config).replace('"global_head_dim": 32', '"global_head_dim": 48'))
    assert verify(write_checkpoint(tmp_path / "wrong", tensors, config)).problems

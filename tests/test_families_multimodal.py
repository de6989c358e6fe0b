"""Multimodal families: views of the text alone, configs as releases have them, MTP layers under names of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import raw, read_checkpoint, write_checkpoint

torch = pytest.importorskip("torch")

from any_moe import of_text  # noqa: E402
from test_every_family import FLOAT32, IDS, hooked, keep_of, loaded, model_of, source_of  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.errors import FamilyError  # noqa: E402
from shardxform.execution.runner import run  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.formats.scheme import Scheme  # noqa: E402
from shardxform.model.families import all_families  # noqa: E402
from shardxform.model.layout import layout_of  # noqa: E402
from shardxform.plan.convert import Target, plan_convert  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
from shardxform.plan.quantize import plan_quantize  # noqa: E402
from shardxform.plan.view import ViewOptions  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

MULTIMODAL = ("glm4v_moe", "kimi_k25", "llama4", "minimax_m3_vl", "mistral3", "qwen3_vl_moe")
WITH_TEXT = ("kimi_k25", "llama4", "mistral3")
CLASS_OF_TEXT = {"mistral3": "Mistral4ForCausalLM"}
"""Classes that AutoModelForCausalLM does not know."""
OF_MLPS = r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("multimodal")


@pytest.mark.parametrize("kind", WITH_TEXT)
def test_the_text_alone_is_a_model_of_the_text_class(kind: str, folder: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(source_of(kind, folder))
    every = {layer: tuple(range(6)) for layer in keep_of(source)}
    run(plan_prune(source, Manifest(keep=every), ViewOptions(text_only=True)), tmp_path / "out")
    report = verify(tmp_path / "out", source=source, independent=True)
    assert (report.problems, report.tensors_differing) == ((), 0)
    with torch.no_grad():
        models = loaded(tmp_path / "out", CLASS_OF_TEXT.get(kind, "")), model_of(kind)
        found, wanted = (of_text(model)(input_ids=IDS).logits for model in models)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", [kind for kind in MULTIMODAL if kind not in WITH_TEXT])
def test_without_a_text_class_there_is_no_view_of_the_text(kind: str, folder: Path) -> None:
    source = Checkpoint.open(source_of(kind, folder))
    with pytest.raises(FamilyError, match=f"family {kind} has no text-only class"):
        plan_prune(source, Manifest(keep=keep_of(source)), ViewOptions(text_only=True))


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_vision_tensor_that_is_missing_is_found(kind: str, folder: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(source_of(kind, folder))
    name = next(
        name for name, place in layout_of(source.config, source.tensors).places.items() if place.scope == "vision"
    )
    tensors = {other: value for other, value in read_checkpoint(source.root).items() if other != name}
    report = verify(write_checkpoint(tmp_path / "less", tensors, source.config))
    assert [problem.code for problem in report.problems] == ["missing"]


def test_a_kimi_config_of_a_release_says_the_same(folder: Path, tmp_path: Path) -> None:
    """Keys of the vision tower begin with `vt_`, and the decoder calls itself kimi_k2."""
    source = Checkpoint.open(source_of("kimi_k25", folder))
    vision = {
        (key if "patch" in key or "merge" in key else f"vt_{key}"): v
        for key, v in source.config["vision_config"].items()
    }
    text = {**source.config["text_config"], "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    config = {**source.config, "architectures": ["KimiK25ForConditionalGeneration"], "vision_config": vision}
    root = write_checkpoint(tmp_path / "out", read_checkpoint(source.root), {**config, "text_config": text})
    assert verify(root).problems == ()
    found = score(Checkpoint.open(root), WINDOWS, ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))
    assert list(found.layers) == [1]


WINDOWS = Windows(ids_NT=IDS.numpy().astype(np.int32), fingerprint="x", provenance={"data": "random"}, notes=())
MTP = "language_model.model.mtp.layers.0."


def test_the_mtp_layer_of_minimax_m3_is_scored_and_pruned(folder: Path, tmp_path: Path) -> None:
    """It is made of the tensors of block 0, which has an indexer and experts as it has."""
    source = Checkpoint.open(source_of("minimax_m3_vl", folder))
    tensors, block = read_checkpoint(source.root), "language_model.model.layers.0."
    own = {name.removeprefix(block): value for name, value in tensors.items() if name.startswith(block)}
    tensors |= {f"{MTP}transformer_layer.{name}": value for name, value in own.items()}
    generator = torch.Generator().manual_seed(7)
    ours: dict[str, Any] = {}
    for name, shape in (("enorm", (64,)), ("hnorm", (64,)), ("final_layernorm", (64,)), ("eh_proj", (64, 128))):
        ours[name] = (torch.randn(shape, generator=generator) / 8).bfloat16()
        tensors[f"{MTP}{name}.weight"] = raw(ours[name])
    text = {**source.config["text_config"], "num_mtp_modules": 1}
    root = write_checkpoint(tmp_path / "whole", tensors, {**source.config, "text_config": text})
    whole = Checkpoint.open(root)
    assert verify(root).problems == ()
    found = score(whole, WINDOWS, ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))

    model = model_of("minimax_m3_vl")
    decoder = model.model.language_model

    def norm(name: str, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + ours[name].float())

    with torch.no_grad():
        hidden = decoder(input_ids=IDS).last_hidden_state[:, :-1]
        both = torch.cat((norm("enorm", decoder.embed_tokens(IDS[:, 1:])), norm("hnorm", hidden)), dim=-1)
        wanted = hooked(model, inputs_embeds=both @ ours["eh_proj"].float().T)[0]
    for name, values in wanted.items():
        np.testing.assert_allclose(getattr(found.mtp_layers[0], name), values, rtol=1e-4)

    for mtp in ("keep", "drop"):
        lists: dict[str, Any] = {"mtp_keep": {0: (1, 2, 4, 5)}} if mtp == "keep" else {}
        out = tmp_path / mtp
        run(plan_prune(whole, Manifest(keep=keep_of(whole), **lists), ViewOptions(mtp=mtp)), out)
        report = verify(out, source=whole, independent=True)
        assert (report.problems, report.tensors_differing) == ((), 0)
        text = json.loads((out / "config.json").read_text())["text_config"]
        assert text["num_mtp_modules"] == (1 if mtp == "keep" else 0)
        assert any(name.startswith(MTP) for name in read_checkpoint(out)) == (mtp == "keep")


def test_every_multimodal_family_is_here() -> None:
    kinds = {"mistral4": "mistral3"}  # where the type of the class is not that of the family
    found = {kinds.get(family.name, family.name) for family in all_families() if family.vision}
    assert found - {"gemma4", "qwen3_5_moe"} == set(MULTIMODAL)


def test_a_whole_kimi_with_experts_in_integers_is_pruned_and_decoded(folder: Path, tmp_path: Path) -> None:
    """As K2.6 is published: only experts are integers, and the config of the decoder says so."""
    kept = ("*self_attn*", "*shared_experts*", "*.mlp.gate_proj", "*.mlp.up_proj", "*.mlp.down_proj")
    scheme = replace(Scheme.preset("W4A16", format="compressed-tensors", group_size=32), keep_16bit=kept)
    run(plan_quantize(Checkpoint.open(source_of("kimi_k25", folder)), scheme), tmp_path / "rounded")
    config = json.loads((tmp_path / "rounded" / "config.json").read_text())
    ignored = [*(rf"re:.*{name}.*" for name in ("self_attn", "shared_experts", "lm_head")), "re:vision_tower.*"]
    declared = {**config.pop("quantization_config"), "ignore": [*ignored, "re:mm_projector.*", OF_MLPS]}
    text = {**config["text_config"], "quantization_config": declared}
    root = write_checkpoint(tmp_path / "k", read_checkpoint(tmp_path / "rounded"), {**config, "text_config": text})
    source = Checkpoint.open(root)
    run(plan_prune(source, Manifest(keep=keep_of(source))), tmp_path / "pruned")
    run(plan_prune(source, Manifest(keep=keep_of(source)), ViewOptions(text_only=True)), tmp_path / "text")
    run(plan_convert(source, Target(format="bf16")), tmp_path / "decoded")
    for out in ("pruned", "text", "decoded"):
        report = verify(tmp_path / out, source=source, independent=True)
        assert (report.problems, report.tensors_differing) == ((), 0), out

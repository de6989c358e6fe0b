"""MTP layers of families whose own transformers classes leave them out: their tensors made here, in the names of
releases, from transformers' `MtpLayer` around the model's own block.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from build import Raw, raw, read_checkpoint, write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import any_moe  # noqa: E402
from transformers import modeling_layers  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.execution.runner import RunOptions, run  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.forward.skeleton import Skeleton, mtp_layer  # noqa: E402
from shardxform.forward.weights import Precision, Weights  # noqa: E402
from shardxform.model.expected import expected  # noqa: E402
from shardxform.model.families import family_of  # noqa: E402
from shardxform.model.layout import layout_of, variants_found  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
from shardxform.plan.view import ViewOptions  # noqa: E402
from shardxform.verification import verify  # noqa: E402

if not hasattr(modeling_layers, "MtpLayer"):
    pytest.skip("transformers has such layers from 5.14 on", allow_module_level=True)
MtpLayer: Any = modeling_layers.MtpLayer
pytestmark = pytest.mark.oracle

DECLARED = {"num_nextn_predict_layers": 1}
KINDS: dict[str, dict[str, Any]] = {
    "deepseek_v32": DECLARED,
    "glm4_moe": DECLARED | {"attention_bias": True, "use_qk_norm": True},
    "glm4_moe_lite": DECLARED,
    "kimi_k2": DECLARED,
    "qwen3_next": {},  # whose releases do not count them
}
NAMES = {  # of what is not the block's own
    "enorm": ("model.layers.2.enorm", "mtp.pre_fc_norm_embedding"),
    "hnorm": ("model.layers.2.hnorm", "mtp.pre_fc_norm_hidden"),
    "eh_proj": ("model.layers.2.eh_proj", "mtp.fc"),
    "post_norm": ("model.layers.2.shared_head.norm", "mtp.norm"),
}
KEEP, MTP_KEEP = (0, 2, 3, 5), (1, 2, 4, 5)
IDS = torch.randint(1, any_moe.VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mtp")


@cache
def models(kind: str) -> tuple[Any, Any]:
    """A model, and its MTP layer around a block like its last one."""
    model = any_moe.build(kind, **KINDS[kind])
    last = model.get_decoder().layers[-1]
    layer = MtpLayer(model.config, type(last), type(last.input_layernorm), len(model.get_decoder().layers) - 1)
    return model, any_moe.randomized(layer.float().eval(), seed=1)


def source_of(kind: str, folder: Path) -> Path:
    """A checkpoint with an MTP layer."""
    root = folder / kind
    if root.exists():
        return root
    model, layer = models(kind)
    home = "mtp.layers.0." if kind == "qwen3_next" else "model.layers.2."
    tensors = read_checkpoint(any_moe.save(model, folder / f"{kind}-without", model_type=kind))
    other = copy.deepcopy(model)
    other.get_decoder().layers[-1] = layer.mtp_block
    block = read_checkpoint(any_moe.save(other, folder / f"{kind}-other"))
    last = "model.layers.1."
    tensors |= {home + name.removeprefix(last): value for name, value in block.items() if name.startswith(last)}
    for name, (follows, apart) in NAMES.items():
        stem = apart if kind == "qwen3_next" else follows
        tensors[f"{stem}.weight"] = raw(getattr(layer, name).weight.detach().bfloat16())
    if kind != "qwen3_next":
        for name, whole in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            tensors[f"{home}{name}.weight"] = tensors[f"{whole}.weight"]
    config = json.loads((folder / f"{kind}-without" / "config.json").read_text())
    return write_checkpoint(root, tensors, config, files={"tokenizer.json": "{}"})


def sliced(tensors: dict[str, Raw]) -> dict[str, Raw]:
    """The MTP layer's tensors with the experts of `MTP_KEEP`, renumbered."""
    out = {}
    for name, value in tensors.items():
        if ".experts." in name:
            head, _, tail = name.partition(".experts.")
            number, _, part = tail.partition(".")
            if int(number) in MTP_KEEP:
                out[f"{head}.experts.{MTP_KEEP.index(int(number))}.{part}"] = value
        elif name.endswith(("mlp.gate.weight", "e_score_correction_bias")):
            rows = value.array()[list(MTP_KEEP)]
            out[name] = Raw(value.dtype, rows.shape, rows.tobytes())
        else:
            out[name] = value
    return out


def of_mtp(kind: str, tensors: dict[str, Raw]) -> dict[str, Raw]:
    start = "mtp." if kind == "qwen3_next" else "model.layers.2."
    return {name: value for name, value in tensors.items() if name.startswith(start)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_mtp_layer_is_known_to_the_last_tensor(kind: str, folder: Path) -> None:
    source = Checkpoint.open(source_of(kind, folder))
    layout = layout_of(source.config, source.tensors)
    assert layout.unknown == ()
    assert (layout.has_mtp, layout.mtp_layers) == (True, 1)
    listed = dict(expected(layout, variants_found(layout)))
    assert {name: each.shape for name, each in listed.items() if name in source.tensors} == {
        name: ref.spec.shape for name, ref in source.tensors.items()
    }
    report = verify(source.root)
    assert (report.problems, report.warnings) == ((), ())


@pytest.mark.parametrize("kind", KINDS)
def test_an_mtp_layer_is_pruned_by_its_own_list_or_dropped(kind: str, folder: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(source_of(kind, folder))
    keep = dict.fromkeys(layout_of(source.config, source.tensors).moe_layers, KEEP)
    before = read_checkpoint(source.root)
    kept, dropped, whole = tmp_path / "kept", tmp_path / "dropped", tmp_path / "whole"
    run(plan_prune(source, Manifest(keep=keep, mtp_keep={0: MTP_KEEP})), kept, RunOptions(jobs=1))
    run(plan_prune(source, Manifest(keep=keep)), dropped, RunOptions(jobs=1))
    run(plan_prune(source, None, ViewOptions(mtp="drop")), whole, RunOptions(jobs=1))
    assert of_mtp(kind, read_checkpoint(kept)) == sliced(of_mtp(kind, before))
    assert of_mtp(kind, read_checkpoint(dropped)) == of_mtp(kind, read_checkpoint(whole)) == {}
    for out, layers in ((kept, 1), (dropped, 0), (whole, 0)):
        report = verify(out, source=source, independent=True)
        assert (report.problems, report.warnings, report.tensors_differing) == ((), (), 0)
        found = Checkpoint.open(out)
        assert layout_of(found.config, found.tensors).mtp_layers == layers
        assert found.config.get("num_nextn_predict_layers") == (None if kind == "qwen3_next" else layers)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_mtp_layer_computes_what_its_modules_do(kind: str, folder: Path, tmp_path: Path) -> None:
    model, layer = models(kind)
    decoder = model.get_decoder()
    normed = decoder(input_ids=IDS, use_cache=False).last_hidden_state
    only = copy.deepcopy(decoder)  # the block and the norm of the MTP layer in the model's place
    only.layers, only.norm = torch.nn.ModuleList([layer.mtp_block]), layer.post_norm
    only.config.num_hidden_layers = 1
    if getattr(only.config, "layer_types", None):
        only.config.layer_types = only.config.layer_types[-1:]
    both = torch.cat((layer.enorm(decoder.embed_tokens(IDS[:, 1:])), layer.hnorm(normed[:, :-1])), dim=-1)
    wanted = only(inputs_embeds=layer.eh_proj(both), use_cache=False).last_hidden_state
    source = Checkpoint.open(source_of(kind, folder))
    precision = Precision(torch.device("cpu"), torch.float32)
    with Weights(source, precision) as weights, mtp_layer(Skeleton(weights), 0, None) as found:
        torch.testing.assert_close(found(IDS, normed), wanted, rtol=2e-6, atol=2e-6)
    windows = Windows(ids_NT=IDS.numpy().astype("int32"), fingerprint="x", provenance={"data": "random"}, notes=())
    scored = score(source, windows, ScoreOptions(precision=precision, work=tmp_path / "w"))
    assert scored.mtp_layers[0].count_E.sum() == any_moe.TOP_K * IDS[:, 1:].numel()


def test_layers_that_no_config_counts_are_those_that_are_there() -> None:
    config = any_moe.tiny_config("qwen3_next") | {"architectures": ["Qwen3NextForCausalLM"]}
    names = ["mtp.fc.weight", "mtp.layers.0.input_layernorm.weight", "mtp.layers.1.input_layernorm.weight"]
    for over, layers in (({}, 2), ({"num_nextn_predict_layers": 1}, 1)):
        assert layout_of(config | over, names).mtp_layers == layers
    assert layout_of(config, []).mtp_layers == 0
    assert family_of(config)[0].mtp is not None

"""What must be true of every family, against transformers' own classes: one entry of `CASES` each.

A tiny checkpoint is saved by transformers in the names of releases. A pruned one must be slices of the loaded model;
the block runner's logits must be the model's; scores those of hooks; quantized outputs must load and hold what the
codes stand for; tuned must be better than rounded, healed better than pruned; and verify must tell sound from not.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import KINDS, Raw, read_checkpoint, write_checkpoint
from click.testing import CliRunner
from small_configs import SMALL_OMNI, SMALL_VISION
from strategies import picked
from texts import few

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import any_moe  # noqa: E402
from transformers import CONFIG_MAPPING  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.base.file_system import FileSystem  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.identity import config_sha256  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.errors import FamilyError  # noqa: E402
from shardxform.execution.runner import RunOptions, run  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.forward import skeleton, weights  # noqa: E402
from shardxform.forward.resting import PlainMatrix, RoutedExpert  # noqa: E402
from shardxform.forward.skeleton import Skeleton  # noqa: E402
from shardxform.forward.weights import Precision, Weights  # noqa: E402
from shardxform.model.families import family_of  # noqa: E402
from shardxform.model.layout import layout_of  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
from shardxform.plan.view import pruned_view  # noqa: E402
from shardxform.tuning import merging  # noqa: E402
from shardxform.tuning.workers import Workers  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle


@dataclass(frozen=True)
class Case:
    """How a family's tiny checkpoint is made and what of it is asked.

    Attributes:
        over: keys of the config beside those of `any_moe.tiny_config`.
        formats: quantized formats whose outputs transformers loads with every weight in its place.
        runs: whether decoder blocks can be run.
        loads: whether transformers loads releases.
        group_size: of quantized weights.
        class_name: of transformers' class, where that which finds the class of a model does not know the type.
        around: the config of a class that nests that of its decoder, where that is not found by itself.
        renames: regular expressions and what stands for them in names, where transformers' way back is not that of
            releases.
        turned: pattern of tensors whose last two dimensions releases have the other way round.
        more: other configs, in the manner of `over`, whose checkpoints hold what the first one lacks.
        elsewhere: templates of tensors that transformers does not save so, held against tensors made by hand.

    """

    over: dict[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = ("auto-round",)
    runs: bool = True
    loads: bool = True
    group_size: int = 32
    class_name: str = ""
    around: dict[str, Any] | None = None
    renames: tuple[tuple[str, str], ...] = ()
    turned: str = ""
    more: tuple[dict[str, Any], ...] = ()
    elsewhere: tuple[str, ...] = ()


LLAMA4 = {"num_experts_per_tok": 1, "intermediate_size_mlp": 96, "layer_types": None, "no_rope_layers": None}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "moe_latent_size": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
}
GEMMA4 = {
    "enable_moe_block": True,
    "num_experts": any_moe.EXPERTS,
    "top_k_experts": any_moe.TOP_K,
    "moe_intermediate_size": 32,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_expand": 1, "mamba_dt_rank": 8}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_head_dim": 4,
    "linear_num_heads": 32,  # rows of b_proj, which clients merge with others
}
GRANITE_4 = {
    "layer_types": ["mamba", "attention"],
    **dict.fromkeys(("mamba_chunk_size", "mamba_d_head", "mamba_d_state"), 16),
    "mamba_n_heads": 8,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}
ERNIE_VL = "Ernie4_5_VLMoeForConditionalGeneration"

CASES: dict[str, Case] = {
    "afmoe": Case(over={"mup_enabled": True}, more=({"attention_bias": True},)),
    "axk1": Case(more=({"attention_bias": True},)),
    "axk2": Case(more=({"attention_bias": True},)),
    "bailing_hybrid": Case(
        over={**DELTA, "num_expert_group": 2},
        formats=(),
        more=({"attention_bias": True},),
        elsewhere=(
            "attention.o_proj.weight",
            *(f"attention.q_{part}.weight" for part in ("a_layernorm", "a_proj", "b_proj")),
        ),
    ),
    "beam": Case(more=({"attention_bias": True},)),
    "cohere2_moe": Case(
        over={
            "num_shared_experts": 2,
            "expert_selection_fn": "sigmoid",
            "first_k_dense_replace": 1,
            "mlp_layer_types": None,
            "prefix_dense_intermediate_size": 96,
            "intermediate_size": 32,
        },
        more=({"attention_bias": True, "tie_word_embeddings": False},),
    ),
    "dbrx": Case(
        over={
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 6, "moe_top_k": 2},
        },
        runs=False,
        formats=(),
    ),
    "deepseek_v2": Case(more=({"q_lora_rank": None},)),
    "deepseek_v3": Case(),
    "deepseek_v32": Case(),
    "deepseek_v4": Case(
        over={"o_groups": 2, "o_lora_rank": 32},
        runs=False,
        formats=("compressed-tensors",),
        renames=(
            (r"^model\.", ""),
            (r"^embed_tokens", "embed"),
            (r"^hc_head\.hc_", "hc_head_"),
            (r"(layers\.\d+\.attn)\.norm", r"\1.kv_norm"),
        ),
    ),
    "dots1": Case(more=({"attention_bias": True},)),
    "ernie4_5_moe": Case(more=({"tie_word_embeddings": False},)),
    "ernie4_5_vl_moe": Case(
        over={
            "moe_intermediate_size": [32, 64],
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [2, 2, 4]},
        },
        class_name=ERNIE_VL,
        runs=False,
        formats=(),
    ),
    "exaone_moe": Case(over={"head_dim": 32}),
    "flex_olmo": Case(over={"pad_token_id": None}, more=({"attention_bias": True},)),
    "flint": Case(over={"mlp_only_layers": [0]}, more=({"attention_bias": True},)),
    "gemma4_text": Case(over=GEMMA4, more=({"tie_word_embeddings": False},)),
    "glm4_moe": Case(over={"attention_bias": True, "use_qk_norm": True}),
    "glm4_moe_lite": Case(more=({"q_lora_rank": None},)),
    "glm4v_moe": Case(
        over={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 2],
            }
        },
        more=({"attention_bias": False},),
    ),
    "glm5_next": Case(
        over={"qk_rope_head_dim": 0, "linear_head_dim": 16, "linear_num_heads": 4},
        class_name="Glm5NextForConditionalGeneration",
        around={"vision_config": SMALL_VISION},
        runs=False,
    ),
    "glm_moe_dsa": Case(over={"indexer_types": ["full", "shared"]}),  # the others load too
    "granitemoe": Case(over={"embedding_multiplier": 3.0}, more=({"attention_bias": True},)),
    "granitemoe_swa": Case(more=({"attention_bias": True},)),
    "granitemoehybrid": Case(over=GRANITE_4, more=({"attention_bias": True, "mamba_proj_bias": True},)),
    "granitemoeshared": Case(more=({"attention_bias": True},)),
    "hunyuan_v1_moe": Case(over={"moe_topk": [2, 2]}, more=({"attention_bias": True},)),
    "hy_v3": Case(more=({"attention_bias": True, "mlp_bias": True},)),
    "jamba": Case(over=JAMBA, more=({"mamba_proj_bias": True},)),
    "kimi_k2": Case(more=({"q_lora_rank": None},)),
    "kimi_k25": Case(
        renames=(
            (r"language_model\.model\.blocks\.", "language_model.model.layers."),
            (r"vision_tower\.encoder\.patch_embed\.proj", "vision_tower.patch_embed.proj"),
            (r"^model\.mm_projector\.", "mm_projector."),
        ),
        formats=("compressed-tensors",),
    ),
    "kimi_linear": Case(
        over={**DELTA, "q_lora_rank": None},
        formats=(),
        more=({"attention_bias": True, "q_lora_rank": 32},),
        elsewhere=("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    ),
    "kolibri1": Case(),
    "laguna": Case(
        over={
            "num_attention_heads_per_layer": [4, 8],
            "layer_types": ["sliding_attention", "full_attention"],
            "moe_routed_scaling_factor": 2.5,
            "moe_router_logit_softcapping": 5.0,
        },
        more=({"attention_bias": True, "gating": "per-element"},),
    ),
    "lfm2_moe": Case(
        over={"layer_types": ["conv", "full_attention"]},
        formats=("compressed-tensors",),
        more=({"conv_bias": True, "tie_word_embeddings": False},),
    ),
    "llama4": Case(
        over={**LLAMA4, "moe_layers": None},
        formats=("compressed-tensors",),
        more=({"moe_layers": [1], "attention_bias": True},),
    ),
    "llama4_text": Case(
        over={**LLAMA4, "moe_layers": None},
        formats=("compressed-tensors",),
        more=({"attention_bias": True, "interleave_moe_layer_step": 2},),
    ),
    "longcat_flash": Case(
        over={
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "zero_expert_num": 3,
            "num_layers": 2,
            "qk_head_dim": 32,
        },
        runs=False,
        formats=("compressed-tensors",),
        loads=False,  # transformers 5.23 wants a gate and up projection of experts that have none, and refuses releases
        renames=((r".*\.experts\.[678]\..*", ""),),
    ),
    "mellum": Case(
        over={"layer_types": ["full_attention", "sliding_attention"]},
        more=({"attention_bias": True, "mlp_layer_types": ["dense", "sparse"]},),
    ),
    "mimo_v2_flash": Case(over={"v_head_dim": 8}, more=({"attention_bias": True},), formats=("compressed-tensors",)),
    "minimax": Case(over={"block_size": 16}, formats=("compressed-tensors",)),
    "minimax_m2": Case(formats=("compressed-tensors",)),
    "minimax_m3_vl": Case(
        over={
            "layer_types": ["minimax_m3_sparse", "full_attention"],
            "mlp_layer_types": ["sparse", "sparse"],
            "routed_scaling_factor": 0.25,
        },
        formats=(),
        more=({"mlp_layer_types": ["dense", "sparse"]},),
    ),
    "mistral3": Case(over={"head_dim": 32, "qk_head_dim": 32}, more=({"q_lora_rank": None},)),
    "mistral4": Case(
        over={"head_dim": 32, "qk_head_dim": 32},
        more=({"q_lora_rank": None},),
        class_name="Mistral4ForCausalLM",
    ),
    "mixtral": Case(formats=("compressed-tensors",)),
    "muse_spark": Case(
        over={"moe_hidden_size": 32},
        more=({"mlp_layer_types": ["dense", "sparse"]},),
        class_name="MuseSparkForConditionalGeneration",
        around={
            "vision_config": {key: SMALL_VISION[key] for key in list(SMALL_VISION)[:4]},
            "audio_config": {"out_hidden_size": 64, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
            "projector_hidden_size": 32,
        },
        runs=False,
        formats=(),
    ),
    "nemotron_h": Case(over=NEMOTRON, more=({"mlp_bias": True, "attention_bias": True, "use_bias": True},)),
    "olmoe": Case(more=({"attention_bias": True},)),
    "phimoe": Case(over={"attention_bias": True, "lm_head_bias": True}, formats=("compressed-tensors",)),
    "qwen2_moe": Case(more=({"mlp_only_layers": [0]},)),
    "qwen3_5_moe_text": Case(over={"layer_types": ["linear_attention", "full_attention"]}),
    "qwen3_moe": Case(),
    "qwen3_next": Case(more=({"mlp_only_layers": [0], "attention_bias": True},)),
    "qwen3_omni_moe": Case(
        class_name="Qwen3OmniMoeForConditionalGeneration",
        around=SMALL_OMNI,
        runs=False,
        formats=(),
        more=({"mlp_only_layers": [0], "attention_bias": True},),
    ),
    "qwen3_vl_moe": Case(
        over={"moe_intermediate_size": 96, "vision": {"deepstack_visual_indexes": [0, 1]}},
        turned=r"experts\.(gate_up|down)_proj$",
        more=({"mlp_only_layers": [0], "attention_bias": True},),
    ),
    "qwen4_exp": Case(
        over={
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "ple_layer_ids": [1],
            "ple_embed_dim": 64,
            "ngram_vocab_size_base": 50,
            "split_ngram_parts": 2,
            "hc_lowrank": 32,
            "eos_token_id": 256,
            "layer_types": ["linear_attention", "indexed_attention"],
        },
        class_name="Qwen4ExpForConditionalGeneration",
        around={"vision_config": SMALL_VISION},
        runs=False,
    ),
    "solar_open": Case(more=({"attention_bias": True},)),
    "step3p7": Case(
        over={
            "share_expert_dim": 32,
            "num_sliding_attention_heads": 6,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        class_name="Step3p7ForConditionalGeneration",
        around={"vision_config": SMALL_VISION},
        runs=False,
        formats=(),
        more=({"layer_types": ["sliding_attention", "full_attention"]},),
    ),
}
for _newer in [name for name in CASES if any_moe.CLASSES.get(name, name) not in CONFIG_MAPPING]:
    del CASES[_newer]  # than the transformers that is installed
RUN = [name for name, case in CASES.items() if case.runs]
IDS = torch.randint(1, any_moe.VOCAB, (3, 24), generator=torch.Generator().manual_seed(2))
FLOAT32 = Precision(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model_of(kind: str) -> Any:
    """The whole model, float32."""
    return built(kind, CASES[kind].over)


def built(kind: str, over: dict[str, Any]) -> Any:
    """A model of another config."""
    return any_moe.build(kind, class_name=CASES[kind].class_name, around=CASES[kind].around, **over)


def source_of(kind: str, folder: Path) -> Path:
    """Its checkpoint."""
    root = folder / kind
    return root if (root / "config.json").exists() else saved(kind, model_of(kind), root)


def saved(kind: str, model: Any, root: Path) -> Path:
    """Write a model as releases of its kind are."""
    return any_moe.save(model, root, model_type=kind, renames=CASES[kind].renames, turned=CASES[kind].turned)


def keep_of(source: Checkpoint) -> dict[int, tuple[int, ...]]:
    """Other experts in every layer, and in every set of them: four of six."""
    layout = layout_of(source.config, source.tensors)
    every = range(any_moe.EXPERTS * max(len(layout.family.sets), 1))
    return {layer: tuple(e for e in every if (e + layer + e // any_moe.EXPERTS) % 3) for layer in layout.moe_layers}


def kept_of(name: str, keep: tuple[int, ...]) -> tuple[int, ...]:
    """Experts that stay of the set that a parameter belongs to, of which transformers has a module each."""
    first = any_moe.EXPERTS * (".vision_moe." in name)
    return tuple(e - first for e in keep if first <= e < first + any_moe.EXPERTS)


def loaded(root: Path, class_name: str = "") -> Any:
    """What transformers makes of a checkpoint, which must hold all that it wants and nothing else."""
    model, told = any_moe.load(root, torch.float32, class_name)
    assert {key: list(value) for key, value in told.items() if value} == {}
    return model.eval()


def positions(before: int, after: int, keep: tuple[int, ...]) -> Any:
    """What stays of a dimension: one position for each expert, and others that stay, or several for each."""
    experts = any_moe.EXPERTS
    if before - after == experts - len(keep):
        return torch.tensor([*keep, *range(experts, before)])
    each = before // experts
    return torch.tensor([e * each + at for e in keep for at in range(each)])


def renumbered(table: Any, keep: tuple[int, ...]) -> Any:
    """Ids of experts after pruning, one after the other: of one that goes, the next that stays and is not there yet."""
    out = table.clone()
    for row in out:
        there = set(row.tolist()) & set(keep)
        for at, old in enumerate(row.tolist()):
            if old not in keep:
                new = next(e for e in [*range(old, any_moe.EXPERTS), *range(old)] if e in keep and e not in there)
                there.add(new)
                row[at] = new
    return torch.tensor([[keep.index(e) for e in row] for row in out.tolist()])


def sliced(model: Any, smaller: Any, keep: dict[int, tuple[int, ...]]) -> dict[str, Any]:
    """The state of `model` with the experts of every layer selected, wherever `smaller` has fewer of something."""
    wanted = smaller.state_dict()
    out = {}
    for name, value in model.state_dict().items():
        axes = [at for at, (a, b) in enumerate(zip(value.shape, wanted[name].shape, strict=True)) if a != b]
        layer = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        if axes:
            sizes = value.shape[axes[0]], wanted[name].shape[axes[0]]
            value = value.index_select(axes[0], positions(*sizes, kept_of(name, keep[layer])))
        out[name] = renumbered(value, keep[layer]) if name.endswith("tid2eid") else value
    return out


@pytest.mark.parametrize("kind", CASES)
def test_a_release_is_known_to_the_last_tensor(kind: str, folder: Path) -> None:
    source = Checkpoint.open(source_of(kind, folder))
    assert layout_of(source.config, source.tensors).unknown == ()
    report = verify(source.root)
    assert report.problems == ()
    beside = {"mtp-absent", "preprocessor"}  # transformers has no code for these layers, and no file was written
    assert {each.code for each in report.warnings} <= beside


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in KINDS])  # these: see test_families.py
def test_every_template_is_seen_in_some_release(kind: str, folder: Path, tmp_path: Path) -> None:
    roots = [source_of(kind, folder)]
    for at, over in enumerate(CASES[kind].more):
        roots.append(saved(kind, built(kind, {**CASES[kind].over, **over}), tmp_path / str(at)))
        assert verify(roots[-1]).problems == ()
    layouts = [layout_of(source.config, source.tensors) for source in map(Checkpoint.open, roots)]
    assert all(layout.unknown == () for layout in layouts)
    seen = {place.template.name for layout in layouts for place in layout.places.values()}
    family, spelled = layouts[0].family, {place.template.variant for place in layouts[0].places.values()}
    templates = [each for each in (*family.root, *family.block) if not each.optional and each.variant in spelled]
    assert {each.name for each in templates} <= seen | {*CASES[kind].elsewhere}


FLAGLESS = {"dbrx", "llama4", "llama4_text", "longcat_flash", "step3p7"}
"""Kinds whose experts transformers makes in their own way, without saying how they lie."""


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in FLAGLESS])
def test_experts_lie_as_the_flags_of_transformers_class_say(kind: str) -> None:
    experts = family_of({"model_type": kind})[0].experts
    found = next(module for module in model_of(kind).modules() if hasattr(module, "is_transposed"))
    transposed = found.is_transposed != bool(CASES[kind].turned)
    assert (transposed, found.has_gate, found.has_bias) == (experts.transposed, experts.gated, experts.bias)
    assert found.is_concatenated == (experts.gate != "interleaved")


@pytest.mark.parametrize("kind", CASES)
def test_a_pruned_output_is_slices_of_the_loaded_model(kind: str, folder: Path) -> None:
    source, out = Checkpoint.open(source_of(kind, folder)), folder / f"{kind}-pruned"
    keep = keep_of(source)
    run(plan_prune(source, Manifest(keep=keep)), out, RunOptions(jobs=1))
    if CASES[kind].loads:
        smaller = loaded(out, CASES[kind].class_name)
        wanted = sliced(model_of(kind), smaller, keep)
        assert all(torch.equal(value, wanted[name]) for name, value in smaller.state_dict().items())
    report = verify(out, source=source, independent=True)
    assert (report.problems, report.tensors_differing) == ((), 0)


@pytest.mark.parametrize("kind", CASES)
def test_an_output_with_a_defect_is_not_sound(kind: str, folder: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(source_of(kind, folder))
    config = copy.deepcopy(source.config)
    tensors = read_checkpoint(source.root)
    layout = layout_of(config, tensors)
    of_experts = [name for name, place in layout.places.items() if place.role == "routed experts"]
    routers = [name for name, place in layout.places.items() if place.role == "router"]
    for at, name in enumerate((of_experts[-1], routers[0])):
        less = {other: value for other, value in tensors.items() if other != name}
        assert verify(write_checkpoint(tmp_path / f"less-{at}", less, config)).problems, name
        rows, data = tensors[name].shape[0], tensors[name].data
        shorter = Raw(tensors[name].dtype, (rows - 1, *tensors[name].shape[1:]), data[: len(data) // rows * (rows - 1)])
        torn = {**tensors, name: shorter}
        assert verify(write_checkpoint(tmp_path / f"torn-{at}", torn, config)).problems, name


@pytest.mark.parametrize("kind", [kind for kind, case in CASES.items() if not case.runs])
@pytest.mark.parametrize("verb", ["score", "evaluate", "quantize", "prune"])
def test_what_cannot_be_run_is_said_in_one_line_before_anything_is_written(
    kind: str, verb: str, folder: Path, tmp_path: Path
) -> None:
    root, out = source_of(kind, folder), tmp_path / "out"
    keep = keep_of(Checkpoint.open(root))
    lists = {str(layer): list(ids) for layer, ids in keep.items()}
    (tmp_path / "keep.json").write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": lists}))
    data = ["--data", str(few("calib.jsonl")), "--samples", "2", "--seqlen", "16"]
    command = {
        "score": ["score", str(root), "-o", str(out), *data],
        "evaluate": ["evaluate", str(root), *data],
        "quantize": ["quantize", str(root), str(out), "--method", "auto-round", "--group-size", "32", *data],
        "prune": ["prune", str(root), str(out), "-m", str(tmp_path / "keep.json"), "--heal", "all", *data],
    }[verb]
    family = layout_of(Checkpoint.open(root).config, []).family
    said = f"family {family.name} is not run: {family.not_run}"
    if verb == "quantize" and family.formats:
        command += ["--format", family.formats[0]]
    elif verb == "quantize":
        said = f"no quantized format of family {family.name} is read: {family.unread}; `shardxform prune` makes it"
    result = CliRunner().invoke(main, [*command, "-q"], catch_exceptions=False)
    assert result.exit_code
    assert said in result.output.splitlines()[-1]
    assert not out.exists()


@torch.no_grad()
def block_by_block(root: Path, precision: Precision = FLOAT32) -> Any:
    """Logits of a checkpoint, quantized or not, as the block runner gives them; its config stays as it is."""
    checkpoint = Checkpoint.open(root)
    identity = config_sha256(checkpoint.config)
    with Weights(checkpoint, precision) as weights:
        skeleton = Skeleton(weights)
        assert config_sha256(checkpoint.config) == identity  # whose digest evaluations are bound to
        hidden = skeleton.embed(IDS)
        for layer in range(skeleton.num_blocks):
            with skeleton.block(layer) as block:
                hidden = block(hidden)
        with skeleton.head() as head:
            return head.logits(hidden.flatten(0, 1)).view(*IDS.shape, -1)


@pytest.mark.parametrize("kind", RUN)
@torch.no_grad()
def test_the_block_runner_gives_the_logits_of_the_model(kind: str, folder: Path) -> None:
    wanted = any_moe.of_text(model_of(kind))(input_ids=IDS).logits
    torch.testing.assert_close(block_by_block(source_of(kind, folder)), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["minimax_m3_vl", *picked([kind for kind in RUN if kind != "minimax_m3_vl"], 15)])
def test_blocks_are_run_in_bfloat16_too(kind: str, folder: Path) -> None:
    model, _ = any_moe.load(source_of(kind, folder), torch.bfloat16, CASES[kind].class_name)
    wanted = logits_of(model.eval())
    found = block_by_block(source_of(kind, folder), Precision(torch.device("cpu"), torch.bfloat16))
    assert float((found - wanted).abs().median()) < 0.01 * float(wanted.std())  # the head alone is in float32


def test_experts_that_are_called_otherwise_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As classes of older versions of transformers do."""
    module, ids = torch.nn.Module(), torch.tensor([[0, 1], [1, 2]])
    weights.attach(module, weights.ExpertBank(lambda _expert: pytest.fail("read"), FLOAT32))
    with pytest.raises(ValueError, match=r"experts are called with weights \[2, 6\] for ids \[2, 2\]"):
        weights._forward(module, torch.zeros(2, 4), ids, torch.ones(2, 6))
    monkeypatch.setattr(skeleton, "experts_module", lambda _block: None)
    with (
        Weights(Checkpoint.open(source_of("olmoe", folder)), FLOAT32) as reader,
        pytest.raises(FamilyError, match=r"olmoe is not run with transformers .*, whose class computes"),
    ):
        Skeleton(reader)


@pytest.mark.parametrize(("version", "runs"), [("5.14.1", False), ("5.15.0", True), ("5.16.0.dev0", True)])
def test_a_class_that_computes_another_model_is_refused(
    version: str, runs: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before transformers 5.15, that of Mistral-Small-4 left a factor out."""
    monkeypatch.setattr(skeleton.transformers, "__version__", version)
    said = f"family mistral4 is not run with transformers {version}, whose class computes another model"
    refused = contextlib.nullcontext() if runs else pytest.raises(FamilyError, match=said)
    with Weights(Checkpoint.open(source_of("mistral4", folder)), FLOAT32) as reader, refused:
        Skeleton(reader)


def test_a_config_stays_as_it_is_when_its_model_is_run(folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(source_of("minimax_m2", folder), tmp_path / "source")
    config = json.loads((root / "config.json").read_text())
    assert "rope_theta" in config["rope_parameters"]
    (root / "config.json").write_text(json.dumps({**config, "rotary_dim": 8}))  # transformers moves it into the former
    block_by_block(root)


def hooked(model: Any, **inputs: Any) -> list[dict[str, np.ndarray]]:
    """REAP's sums of every layer with experts, in float64: the module itself is asked what an expert puts out."""
    found: list[dict[str, np.ndarray]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if len(args) == 1:  # all tokens for each expert, weighed, and times zero those that are not its own
            (entering,) = args
            ours = entering.view(module.num_experts, -1, entering.shape[-1])
            norms = type(module).forward(module, entering).view(ours.shape).double().norm(dim=-1)
            there = (ours != 0).any(-1)
            found.append({"reap_E": (norms * there).sum(1).numpy(), "count_E": there.sum(1).numpy()})
            return
        hidden, index, weights = (*args, *kwargs.values())[:3]
        hidden, index, weights = (x.flatten(0, -2) for x in (hidden, index, weights))
        reap, count = np.zeros(any_moe.EXPERTS), np.zeros(any_moe.EXPERTS)
        for expert in range(any_moe.EXPERTS):
            rows = (index == expert).any(-1)
            if rows.any():
                only = torch.full((int(rows.sum()), 1), expert)
                values = type(module).forward(module, hidden[rows], only, torch.ones(only.shape)).double()
                gates = (weights * (index == expert)).sum(-1)[rows].double()
                reap[expert], count[expert] = float((gates * values.norm(dim=-1)).sum()), float(rows.sum())
        found.append({"reap_E": reap, "count_E": count})

    handles = [
        module.register_forward_pre_hook(look, with_kwargs=True)
        for module in model.modules()
        if type(module).__name__.endswith("Experts") and hasattr(module, "num_experts")
    ]
    with torch.no_grad():
        (model if inputs else any_moe.of_text(model))(**(inputs or {"input_ids": IDS}))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", RUN)
def test_scores_are_those_of_hooks(kind: str, folder: Path, tmp_path: Path) -> None:
    windows = Windows(ids_NT=IDS.numpy().astype(np.int32), fingerprint="x", provenance={"data": "random"}, notes=())
    source = Checkpoint.open(source_of(kind, folder))
    found = score(source, windows, ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))
    for stats, wanted in zip(found.layers.values(), hooked(model_of(kind)), strict=True):
        for name, values in wanted.items():
            np.testing.assert_allclose(getattr(stats, name), values, rtol=1e-4, err_msg=name)


def another_order(expert: RoutedExpert, module: Any) -> RoutedExpert:
    """The same function, its channels in another order."""
    values, turned = expert.at_rest(), expert.layout.transposed and len(expert.gate_up) == 1
    channels = values.down_HI.shape[1]
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(1))
    gate = expert.layout.gate
    rows = torch.stack([2 * order, 2 * order + 1], 1).flatten() if gate == "interleaved" else order
    rows = torch.cat([order, channels + order]) if gate in ("concatenated", "separate") else rows
    both, down = values.gate_up_OH[rows], values.down_HI[:, order]
    x = torch.randn(5, both.shape[1], generator=torch.Generator().manual_seed(2))
    between = weights.activation(module)
    bias, moved = (0, 0) if values.gate_up_bias_O is None else (values.gate_up_bias_O, values.gate_up_bias_O[rows])
    inner = between(x @ both.T.float() + moved)
    torch.testing.assert_close(inner, between(x @ values.gate_up_OH.T.float() + bias)[:, order])
    biases = (moved, *expert.biases[-1:]) if isinstance(moved, torch.Tensor) else ()
    parts = (PlainMatrix(both.T if turned else both),)
    return RoutedExpert(
        parts, PlainMatrix(down.T if turned else down), biases, replace(expert.layout, transposed=turned)
    )


@pytest.mark.parametrize("kind", picked(RUN, 6))
@torch.no_grad()
def test_an_expert_is_merged_into_its_copy_without_a_trace(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pruned expert is one that stays, its channels in another order: found, and put back in that of the other."""
    source = Checkpoint.open(source_of(kind, folder))
    keep = keep_of(source)
    view = pruned_view(source, Manifest(keep=keep))
    layer, ids = next(iter(keep.items()))
    gone = [e for e in range(layout_of(source.config, source.tensors).num_experts) if e not in ids]
    with Weights(source, FLOAT32) as before, Weights(view.checkpoint, FLOAT32) as after, Workers(2) as workers:
        original, pruned = Skeleton(before), Skeleton(after)
        module = original.module(layer).get_submodule(original.experts_name(layer))
        in_set, copies, read = original.layout.in_set, {}, before.expert
        for e in gone:
            own = [k for k in ids if k // in_set == e // in_set and k not in copies.values()]
            copies[e] = own[0]

        def expert(scope: str, at: int, e: int) -> RoutedExpert:
            return another_order(read(scope, at, copies[e]), module) if e in copies else read(scope, at, e)

        monkeypatch.setattr(before, "expert", expert)
        groups = {k: [e for e in gone if copies[e] == k] for k in ids}
        monkeypatch.setattr(merging, "groups_of", lambda *_: groups)
        hidden = original.embed(IDS)
        for at in range(layer):
            with original.block(at) as block:
                hidden = block(hidden)
        with original.block(layer) as block:
            shares: list[float] = []
            running = merging.Running(workers=workers, at_once=2, on_work=shares.append, stopped=lambda: None)
            merger = merging.Merger(original, pruned, layer, ids, running)
            merged = merger.merge(block, iter([hidden]), tmp_path, FileSystem())
        gate_up, down = list(pruned.stacked(layer).values())[:2]
        found = torch.zeros_like(gate_up), torch.zeros_like(down)
        merged.into(*found, 1.0)
    torch.testing.assert_close(found, (gate_up, down), rtol=1e-2, atol=1e-6)  # a mean of equals, rounded
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1


FORMATS = [(kind, name) for kind in RUN for name in CASES[kind].formats]


TUNED = picked(FORMATS, 5)


@pytest.mark.parametrize(("kind", "name"), TUNED, ids=["-".join(each) for each in TUNED])
def test_a_healed_and_tuned_output_is_better_and_loads(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    root, out = source_of(kind, folder), tmp_path / "out"
    source = Checkpoint.open(root)
    keep = {str(layer): list(ids) for layer, ids in keep_of(source).items()}
    (tmp_path / "keep.json").write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": keep}))
    command = ["quantize", str(root), str(out), "-m", str(tmp_path / "keep.json"), "--format", name, "-q"]
    command += ["--method", "auto-round", "--iters", "20", "--merge", "--heal", "all", "--heal-iters", "8"]
    command += ["--heal-lr", "0.005"]
    samples = "16" if kind == "mellum" else "8"  # merged without a trace, it has what rounding left to heal alone
    command += ["--group-size", str(CASES[kind].group_size), "--data", str(few("calib.jsonl")), "--samples", samples]
    command += ["--seqlen", "32", "--batch-size", "4", "--dtype", "float32"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    blocks = json.loads((out / "shardxform.json").read_text())["facts"]["blocks"]
    assert len(blocks) == layout_of(source.config, source.tensors).num_layers
    healed = [block["healed"] for block in blocks if block["layer"] in keep_of(source)]
    for errors, before, after in ((blocks, "rtn_error", "tuned_error"), (healed, "pruned_error", "healed_error")):
        assert all(each[after] <= each[before] for each in errors)
        assert any(each[after] < 0.999 * each[before] for each in errors)
    assert verify(out, source=source, independent=True).problems == ()
    assert_loads(out, CASES[kind].class_name)


ROUNDED = [(kind, name) for kind in CASES if not CASES[kind].runs for name in CASES[kind].formats]


@pytest.mark.parametrize(("kind", "name"), ROUNDED, ids=["-".join(each) for each in ROUNDED])
def test_a_rounded_output_of_what_is_not_run_loads(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    root, out = source_of(kind, folder), tmp_path / "out"
    command = ["quantize", str(root), str(out), "--format", name, "--group-size", str(CASES[kind].group_size), "-q"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert verify(out, source=root, independent=True).problems == ()
    if CASES[kind].loads:
        assert_loads(out, CASES[kind].class_name)


@pytest.mark.parametrize("kind", [kind for kind in RUN if not CASES[kind].formats])
def test_a_family_that_no_format_is_read_of_is_healed_and_not_quantized(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    source = Checkpoint.open(source_of(kind, folder))
    keep = {str(layer): list(ids) for layer, ids in keep_of(source).items()}
    (tmp_path / "keep.json").write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": keep}))
    command = ["prune", str(source.root), str(tmp_path / "out"), "-m", str(tmp_path / "keep.json"), "-q"]
    command += ["--heal", "all", "--heal-iters", "8", "--heal-lr", "0.005", "--data", str(few("calib.jsonl"))]
    command += ["--samples", "8", "--seqlen", "32", "--batch-size", "4", "--dtype", "float32"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    blocks = json.loads((tmp_path / "out" / "shardxform.json").read_text())["facts"]["blocks"]
    assert any(each["healed"]["healed_error"] < 0.999 * each["healed"]["pruned_error"] for each in blocks)
    assert verify(tmp_path / "out", source=source, independent=True).problems == ()
    loaded(tmp_path / "out")
    result = CliRunner().invoke(main, ["quantize", str(source.root), str(tmp_path / "quantized")])
    assert result.exit_code == 1
    assert "no quantized format of family" in result.output
    assert not (tmp_path / "quantized").exists()


@contextlib.contextmanager
def classes_put_back(model: Any) -> Iterator[None]:
    """Undo what auto-round's loader does to the classes of a type: it replaces them for the whole process."""
    namespace = vars(sys.modules[type(model).__module__])
    before = dict(namespace)
    try:
        yield
    finally:
        namespace.update(before)


def assert_loads(out: Path, class_name: str = "") -> None:
    """Logits of a quantized output are those of its own values, written as a 16-bit checkpoint.

    Stacks that are transposed are not written of quantized experts: there the block runner says what the values give.
    """
    config, plain = json.loads((out / "config.json").read_text()), out.with_name("plain")
    if layout_of(config, ()).family.experts.transposed:
        wanted, model = block_by_block(out), model_of(config["model_type"])
    else:
        command = ["convert", str(out), str(plain), "--to", "bf16", "-q"]
        result = CliRunner().invoke(main, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        model = loaded(plain, class_name).bfloat16()
        wanted = logits_of(model)
    with classes_put_back(model):
        quantized, told = any_moe.load(out, torch.bfloat16, class_name)
        found = logits_of(quantized.eval())
    assert not told["missing_keys"]
    # A weight in a wrong place moves every logit; bfloat16 alone flips a choice of experts here and there.
    assert float((found - wanted).abs().median()) < 0.02 * float(wanted.std())


@torch.no_grad()
def logits_of(model: Any) -> Any:
    whole = getattr(model, "thinker", model)  # which decompresses what compressed-tensors has loaded
    try:
        return whole(input_ids=IDS, use_cache=False).logits.float()
    except AttributeError:
        return any_moe.of_text(model)(input_ids=IDS, use_cache=False).logits.float()

"""What must be true of every family, against transformers' own classes: one entry of `CASES` each.

A tiny checkpoint is saved by transformers in the names of releases. A pruned one must be slices of the loaded model;
the block runner's logits must be the model's; scores those of hooks; quantized outputs must load and hold what the
codes stand for; tuned must be better than rounded, healed better than pruned; and verify must tell sound from not.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import KINDS, Raw, read_checkpoint, write_checkpoint
from click.testing import CliRunner
from texts import few

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import any_moe  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.execution.runner import RunOptions, run  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.forward.skeleton import Skeleton  # noqa: E402
from shardxform.forward.weights import Precision, Weights  # noqa: E402
from shardxform.model.layout import layout_of  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
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
        class_name: of transformers' class, where that which finds the class of a decoder does not know the type.
        around: the config of a class that nests that of its decoder.
        renames: regular expressions and what stands for them in names, where transformers' way back is not that of
            releases.
        more: other configs, in the manner of `over`, whose checkpoints hold what the first one lacks.

    """

    over: dict[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = ("auto-round",)
    runs: bool = True
    loads: bool = True
    group_size: int = 32
    class_name: str = ""
    around: dict[str, Any] | None = None
    renames: tuple[tuple[str, str], ...] = ()
    more: tuple[dict[str, Any], ...] = ()


NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "moe_latent_size": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0, "mamba_dt_rank": 8}
SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
SMALL_TALKER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_OMNI = {
    "thinker_config": {
        "vision_config": {**SMALL_VISION, "deepstack_visual_indexes": [0]},
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": 64,
            "downsample_hidden_size": 8,
            "num_hidden_layers": 1,
        },
    },
    "talker_config": {
        "text_config": {**SMALL_TALKER, "num_local_experts": 5, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
        | {"shared_expert_intermediate_size": 16},
        "code_predictor_config": {**SMALL_TALKER, "num_code_groups": 4},
        "thinker_hidden_size": 64,
        "spatial_merge_size": 2,
        "num_code_groups": 4,
    },
    "code2wav_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "codebook_size": 16,
        "decoder_dim": 32,
        "num_quantizers": 4,
    },
}

CASES: dict[str, Case] = {
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
    "deepseek_v3": Case(),
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
    "ernie4_5_moe": Case(more=({"tie_word_embeddings": False},)),
    "glm5_next": Case(
        over={"qk_rope_head_dim": 0, "linear_head_dim": 16, "linear_num_heads": 4},
        class_name="Glm5NextForConditionalGeneration",
        around={"vision_config": SMALL_VISION},
        runs=False,
    ),
    "jamba": Case(over=JAMBA),
    "lfm2_moe": Case(over={"layer_types": ["conv", "full_attention"]}, formats=("compressed-tensors",)),
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
    "minimax_m2": Case(formats=("compressed-tensors",)),
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
    "nemotron_h": Case(over=NEMOTRON, formats=("auto-round", "compressed-tensors")),
    "qwen3_5_moe_text": Case(over={"layer_types": ["linear_attention", "full_attention"]}),
    "qwen3_moe": Case(),
    "qwen3_omni_moe": Case(
        class_name="Qwen3OmniMoeForConditionalGeneration",
        around=SMALL_OMNI,
        runs=False,
        formats=(),
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
    return root if (root / "config.json").exists() else any_moe.save(model_of(kind), root, renames=CASES[kind].renames)


def keep_of(source: Checkpoint) -> dict[int, tuple[int, ...]]:
    """Other experts in every layer: four of six."""
    layout = layout_of(source.config, source.tensors)
    return {layer: tuple(e for e in range(6) if (e + layer) % 3) for layer in layout.moe_layers}


def loaded(root: Path, class_name: str = "") -> Any:
    """What transformers makes of a checkpoint, which must hold all that it wants and nothing else."""
    of = any_moe.class_of(class_name)
    model, told = of.from_pretrained(root, dtype=torch.float32, output_loading_info=True)
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
            value = value.index_select(
                axes[0], positions(value.shape[axes[0]], wanted[name].shape[axes[0]], keep[layer])
            )
        out[name] = renumbered(value, keep[layer]) if name.endswith("tid2eid") else value
    return out


@pytest.mark.parametrize("kind", CASES)
def test_a_release_is_known_to_the_last_tensor(kind: str, folder: Path) -> None:
    source = Checkpoint.open(source_of(kind, folder))
    assert layout_of(source.config, source.tensors).unknown == ()
    report = verify(source.root)
    assert report.problems == ()
    assert {each.code for each in report.warnings} <= {"mtp-absent"}  # transformers has no code for these layers


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in KINDS])  # these: see test_families.py
def test_every_template_is_seen_in_some_release(kind: str, folder: Path, tmp_path: Path) -> None:
    roots = [source_of(kind, folder)]
    for at, over in enumerate(CASES[kind].more):
        model = built(kind, {**CASES[kind].over, **over})
        roots.append(any_moe.save(model, tmp_path / str(at), renames=CASES[kind].renames))
        assert verify(roots[-1]).problems == ()
    layouts = [layout_of(source.config, source.tensors) for source in map(Checkpoint.open, roots)]
    assert all(layout.unknown == () for layout in layouts)
    seen = {place.template.name for layout in layouts for place in layout.places.values()}
    family, spelled = layouts[0].family, {place.template.variant for place in layouts[0].places.values()}
    templates = [each for each in (*family.root, *family.block) if not each.optional and each.variant in spelled]
    assert {each.name for each in templates} <= seen


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
        said = f"no loader of a quantized format finds experts of {family.name}"
    result = CliRunner().invoke(main, [*command, "-q"], catch_exceptions=False)
    assert result.exit_code
    assert result.output.splitlines()[-1].endswith(said)
    assert not out.exists()


@pytest.mark.parametrize("kind", RUN)
@torch.no_grad()
def test_the_block_runner_gives_the_logits_of_the_model(kind: str, folder: Path) -> None:
    with Weights(Checkpoint.open(source_of(kind, folder)), FLOAT32) as weights:
        skeleton = Skeleton(weights)
        hidden = skeleton.embed(IDS)
        for layer in range(skeleton.num_blocks):
            with skeleton.block(layer) as block:
                hidden = block(hidden)
        with skeleton.head() as head:
            found = head.logits(hidden.flatten(0, 1)).view(*IDS.shape, -1)
    wanted = model_of(kind)(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


def hooked(model: Any) -> list[dict[str, np.ndarray]]:
    """REAP's sums of every layer with experts, in float64: the module itself is asked what an expert puts out."""
    found: list[dict[str, np.ndarray]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
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
        model(input_ids=IDS)
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


FORMATS = [(kind, name) for kind in RUN for name in CASES[kind].formats]


@pytest.mark.parametrize(("kind", "name"), FORMATS, ids=["-".join(each) for each in FORMATS])
def test_a_healed_and_tuned_output_is_better_and_loads(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    root, out = source_of(kind, folder), tmp_path / "out"
    source = Checkpoint.open(root)
    keep = {str(layer): list(ids) for layer, ids in keep_of(source).items()}
    (tmp_path / "keep.json").write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": keep}))
    command = ["quantize", str(root), str(out), "-m", str(tmp_path / "keep.json"), "--format", name, "-q"]
    command += ["--method", "auto-round", "--iters", "20", "--heal", "all", "--heal-iters", "8", "--heal-lr", "0.005"]
    command += ["--group-size", str(CASES[kind].group_size), "--data", str(few("calib.jsonl")), "--samples", "8"]
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
    """Logits of a quantized output are those of its own values, written as a 16-bit checkpoint."""
    plain = out.with_name("plain")
    result = CliRunner().invoke(main, ["convert", str(out), str(plain), "--to", "bf16", "-q"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model = loaded(plain, class_name).bfloat16()
    with torch.no_grad(), classes_put_back(model):
        wanted = getattr(model, "thinker", model)(input_ids=IDS, use_cache=False).logits.float()
        of = any_moe.class_of(class_name)
        quantized, told = of.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
        found = getattr(quantized.eval(), "thinker", quantized)(input_ids=IDS, use_cache=False).logits.float()
    assert not told["missing_keys"]
    # A weight in a wrong place moves every logit; bfloat16 alone flips a choice of experts here and there.
    assert float((found - wanted).abs().median()) < 0.02 * float(wanted.std())

"""Experts that lie otherwise: transposed, gate and up projection interleaved, with biases, or under other names.

The checkpoints are made by transformers, and its own modules are what ours are held against.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from texts import few

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.execution.runner import run  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.formats import rounding  # noqa: E402
from shardxform.formats.scheme import Grid  # noqa: E402
from shardxform.forward import attention  # noqa: E402
from shardxform.forward.skeleton import Skeleton  # noqa: E402
from shardxform.forward.weights import Precision, Weights  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
from shardxform.plan.view import pruned_view  # noqa: E402
from shardxform.tuning.block import install  # noqa: E402
from shardxform.tuning.modules import ExpertBiases, TunedExperts  # noqa: E402
from shardxform.tuning.workers import Workers  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

SMALL_MOE = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
FLOAT32 = Precision(torch.device("cpu"), torch.float32)
KINDS = ("gpt_oss", "mixtral")
EXPERTS, HIDDEN, INNER, VOCAB, LAYERS = 6, 64, 32, 2048, 3
KEEP = Manifest(keep=dict.fromkeys(range(LAYERS), (0, 2, 3, 5)))
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(kind: str, root: Path) -> Path:
    """A checkpoint as transformers saves it, of random numbers; biases and attention sinks are random too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5) + ("norm" in name))
    model.save_pretrained(root)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_MOE / name, root / name)
    return root


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: made(kind, tmp_path_factory.mktemp(kind) / "source") for kind in KINDS}


def loaded(root: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        root, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def ids() -> Any:
    return torch.randint(1, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def streamed(checkpoint: Checkpoint) -> Any:
    with Weights(checkpoint, FLOAT32) as weights:
        weights.check()
        skeleton = Skeleton(weights)
        hidden = skeleton.embed(ids())
        for layer in range(skeleton.num_blocks):
            with skeleton.block(layer) as block:
                hidden = block(hidden)
        with skeleton.head() as head:
            return head.logits(hidden.flatten(0, 1)).view(*ids().shape, -1)


# -- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_loaded_model(roots: dict[str, Path], kind: str) -> None:
    with torch.no_grad():
        wanted = loaded(roots[kind])(input_ids=ids()).logits
    torch.testing.assert_close(streamed(Checkpoint.open(roots[kind])), wanted, rtol=1e-4, atol=1e-4)


def test_attention_without_a_kernel_is_run_some_queries_at_a_time(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 positions by 7 rows; a window of 8 slides over some layers, and sinks take their share."""
    whole, calls = streamed(Checkpoint.open(roots["gpt_oss"])), []
    plain = modeling_gpt_oss.eager_attention_forward

    def counted(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return plain(module, query, *args, **kwargs)

    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", counted)
    monkeypatch.setattr(attention, "_ROWS", 7)
    torch.testing.assert_close(streamed(Checkpoint.open(roots["gpt_oss"])), whole, rtol=1e-3, atol=1e-3)
    assert calls == [7, 7, 7, 3] * LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_view_is_the_pruned_model(roots: dict[str, Path], tmp_path: Path, kind: str) -> None:
    source = Checkpoint.open(roots[kind])
    run(plan_prune(source, KEEP), tmp_path / "pruned")
    with torch.no_grad():
        wanted = loaded(tmp_path / "pruned")(input_ids=ids()).logits
    torch.testing.assert_close(streamed(pruned_view(source, KEEP).checkpoint), wanted, rtol=1e-4, atol=1e-4)


def test_experts_one_by_one_are_run_as_the_same_stacked(roots: dict[str, Path], tmp_path: Path) -> None:
    """As loaders of quantized checkpoints have those of gpt-oss: halves of rows in which gate and up take turns."""
    from safetensors.torch import load_file, save_file

    apart: dict[str, Any] = {}
    for name, value in load_file(roots["gpt_oss"] / "model.safetensors").items():
        stem, _, stack = name.rpartition(".")
        if ".experts." not in name:
            apart[name] = value
            continue
        both = {"gate_proj": slice(0, INNER), "up_proj": slice(INNER, None)}
        parts = both if "gate_up" in stack else {"down_proj": slice(None)}
        last = "bias" if stack.endswith("bias") else "weight"
        for expert in range(EXPERTS):
            for projection, run_of in parts.items():
                rows = (value if last == "bias" else value.mT)[expert][run_of]
                apart[f"{stem}.{expert}.{projection}.{last}"] = rows.contiguous()
    shutil.copytree(roots["gpt_oss"], tmp_path / "apart")
    save_file(apart, tmp_path / "apart" / "model.safetensors", {"format": "pt"})
    stacked = streamed(Checkpoint.open(roots["gpt_oss"]))
    torch.testing.assert_close(streamed(Checkpoint.open(tmp_path / "apart")), stacked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_those_of_hooks_on_the_loaded_model(roots: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model, sums = loaded(roots[kind]), []

    def look(module: Any, args: Any) -> None:
        """Norms of an expert's outputs: the module's own, with that expert's weight at 1 and no other's."""
        hidden, index, weights = args
        found = np.zeros(EXPERTS)
        for expert in range(EXPERTS):
            chosen = index == expert
            rows = chosen.any(-1)
            alone = torch.full((int(rows.sum()), 1), expert), torch.ones(int(rows.sum()), 1)
            if rows.any():
                norms = type(module).forward(module, hidden[rows], *alone).norm(dim=-1)
                found[expert] = float((norms * weights[chosen]).sum())
        sums.append(found)

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(look)
    with torch.no_grad():
        model(input_ids=ids())
    windows = Windows(ids_NT=ids().numpy().astype(np.int32), fingerprint="f", provenance={"data": "random"}, notes=())
    found = score(Checkpoint.open(roots[kind]), windows, ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))
    for stats, wanted in zip(found.layers.values(), sums, strict=True):
        assert stats.count_E.sum() == ids().numel() * 2
        np.testing.assert_allclose(stats.reap_E, wanted, rtol=1e-4)


# -- tuning -----------------------------------------------------------------------------------------------------------


class Recorded:
    """Weights [E, O, I] that stay, and add up the gradients that they are handed."""

    moves = True
    device = torch.device("cpu")

    def __init__(self, w_EOI: Any) -> None:
        self.w_RI, self.shape = w_EOI.reshape(-1, w_EOI.shape[2]), tuple(w_EOI.shape)
        self.gradient_RI = torch.zeros_like(self.w_RI)

    def values_into(self, first: int, out_RI: Any) -> None:
        out_RI.copy_(self.w_RI[first : first + len(out_RI)])

    def update(self, first: int, gradient_RI: Any, before_RI: Any = None) -> None:
        self.gradient_RI[first : first + len(gradient_RI)] += gradient_RI
        if before_RI is not None:
            self.values_into(first, before_RI)


@pytest.mark.parametrize("engine", ["loop", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_models_own_experts(roots: dict[str, Path], kind: str, engine: str) -> None:
    theirs: Any = loaded(roots[kind]).model.layers[1].mlp.experts.requires_grad_(True)
    hidden, target = torch.randn(2, 20, HIDDEN, generator=torch.Generator().manual_seed(2))
    index = torch.rand(20, EXPERTS - 1, generator=torch.Generator().manual_seed(3)).topk(2).indices
    weight = torch.rand(20, 2, generator=torch.Generator().manual_seed(4))
    with Weights(Checkpoint.open(roots[kind]), FLOAT32) as weights, Workers(2) as workers:
        stacks = Skeleton(weights).stacked(1)
        gate_up, down, *biases = stacks.values()
        recorded = Recorded(gate_up), Recorded(down)
        ours = TunedExperts(*recorded, theirs._apply_gate, workers, ExpertBiases(*biases) if biases else None)
        ours.grouped = engine == "grouped"
        results = []
        for module in (ours, theirs):
            inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            out = module(inputs[0], index, inputs[1])
            ((out - target) ** 2).sum().backward()
            results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for stack, parameter in zip(recorded, (theirs.gate_up_proj, theirs.down_proj), strict=True):
        wanted = parameter.grad.mT if kind == "gpt_oss" else parameter.grad
        torch.testing.assert_close(stack.gradient_RI.view(stack.shape), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_block_computes_as_before_and_is_stored_by_projection(roots: dict[str, Path], kind: str) -> None:
    """Eight bits are near enough; every matrix comes out by its own name."""
    grid = Grid(bits=8, group_size=32)
    source = loaded(roots[kind])
    with Weights(Checkpoint.open(roots[kind]), FLOAT32) as weights, Workers(1) as workers, torch.no_grad():
        skeleton = Skeleton(weights)
        hidden = skeleton.embed(ids())
        names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts")
        with skeleton.block(1) as block:
            wanted = block(hidden)
        with skeleton.tunable(1, names) as block:
            tuned = install(block.module, names, grid, workers)
            tuned.restart()
            tuned.settle()
            found = block(hidden)
            projections = weights.layout.family.experts.projections
            modules = {module.module: module for module in tuned.stored(projections)}
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    experts = source.model.layers[1].mlp.experts
    for expert in range(EXPERTS):
        both, down = experts.gate_up_proj[expert], experts.down_proj[expert]
        both, down = (both.T, down.T) if kind == "gpt_oss" else (both, down)
        for projection, matrix in zip(projections, (*both.chunk(2), down), strict=True):
            raw = matrix.detach().contiguous().numpy()
            codes = modules[f"mlp.experts.{expert}.{projection}"].codes
            wanted_codes = rounding.quantize(raw, "F32", grid, layout="row")[0]
            np.testing.assert_array_equal(codes.scale_OG, wanted_codes.scales)
            np.testing.assert_array_equal(codes.codes_OI, wanted_codes.words.view(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_is_healed(roots: dict[str, Path], tmp_path: Path, kind: str) -> None:
    keep = {"format": "shardxform.keep", "version": 1, "keep": {str(layer): [0, 2, 3, 5] for layer in range(LAYERS)}}
    (tmp_path / "keep.json").write_text(json.dumps(keep))
    text = ("--data", str(few("calib.jsonl")), "--samples", "6", "--seqlen", "32", "--dtype", "float32")
    heal = ("--heal", "all", "--heal-iters", "12", "--heal-lr", "0.01", "--batch-size", "3", *text)
    for name, more in (("pruned", ()), ("healed", heal)):
        command = ["prune", str(roots[kind]), str(tmp_path / name), "-m", str(tmp_path / "keep.json"), "-q", *more]
        result = CliRunner().invoke(main, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "healed" / "shardxform.json").read_text())
    blocks = record["facts"]["blocks"]
    assert any(block["healed"]["what"] == "all" for block in blocks)
    assert all(block["healed"]["healed_error"] <= block["healed"]["pruned_error"] for block in blocks)
    pruned, healed = (loaded(tmp_path / name).model.layers for name in ("pruned", "healed"))
    for block in blocks:
        one, other = (layers[block["layer"]].mlp.experts.gate_up_proj.detach() for layers in (pruned, healed))
        assert (0 < float((one - other).norm() / one.norm()) < 0.1) == (block["healed"]["what"] == "all")


@pytest.mark.parametrize("heal", [False, True], ids=["rounded", "healed and rounded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_is_tuned(roots: dict[str, Path], tmp_path: Path, kind: str, heal: bool) -> None:
    """The output is sound, its blocks no worse than plain rounding, and run from eight bits it is the pruned model."""
    keep = {"format": "shardxform.keep", "version": 1, "keep": {str(layer): [0, 2, 3, 5] for layer in range(LAYERS)}}
    (tmp_path / "keep.json").write_text(json.dumps(keep))
    text = ("--data", str(few("calib.jsonl")), "--samples", "6", "--seqlen", "32", "--dtype", "float32")
    scheme = ("--scheme", "W4A16" if heal else "W8A16", "--group-size", "32")
    scheme += ("--format", "compressed-tensors" if kind == "mixtral" else "auto-round")
    tune = ("--method", "auto-round", "--iters", "6", "--batch-size", "3", *text)
    more = ("--heal", "moe", "--heal-iters", "6", "--heal-lr", "0.01") if heal else ()
    command = ["quantize", str(roots[kind]), str(tmp_path / "out"), "-m", str(tmp_path / "keep.json"), "-q"]
    result = CliRunner().invoke(main, [*command, *scheme, *tune, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not verify(tmp_path / "out", source=roots[kind]).problems
    blocks = json.loads((tmp_path / "out" / "shardxform.json").read_text())["facts"]["blocks"]
    assert len(blocks) == LAYERS
    assert all(block["tuned_error"] <= block["rtn_error"] for block in blocks)
    whole = streamed(pruned_view(Checkpoint.open(roots[kind]), KEEP).checkpoint).log_softmax(-1)
    tuned = streamed(Checkpoint.open(tmp_path / "out")).log_softmax(-1)
    assert heal or float((whole.exp() * (whole - tuned)).sum(-1).mean()) < 0.3

"""Every command that takes `--device`, on a pretend accelerator: it runs, and its numbers are those of the CPU."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from build import read_checkpoint
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import pretend  # noqa: E402
from smaller import BLOCKS, ROUTED, WHOLE, smaller  # noqa: E402
from strategies import picked  # noqa: E402
from test_scoring import NAMES, windows_of  # noqa: E402
from texts import few  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.base.constants import STORED_TOKENS  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.cli import inputs, main  # noqa: E402
from shardxform.cli.options import ComputeFlags  # noqa: E402
from shardxform.errors import PlanError  # noqa: E402
from shardxform.evaluation.evaluate import EvaluateOptions, Evaluation, evaluate  # noqa: E402
from shardxform.experts import Saliency  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.formats import rounding_torch  # noqa: E402
from shardxform.formats.scheme import Grid  # noqa: E402
from shardxform.forward import passes, runtime  # noqa: E402
from shardxform.forward.skeleton import Skeleton  # noqa: E402
from shardxform.forward.weights import Precision, Weights  # noqa: E402
from shardxform.plan.view import pruned_view  # noqa: E402
from shardxform.tuning import session  # noqa: E402
from shardxform.tuning.block import TunedBlock  # noqa: E402
from shardxform.tuning.elementwise import Pace  # noqa: E402
from shardxform.tuning.heal import HealedStack  # noqa: E402
from shardxform.tuning.modules import TunedExperts  # noqa: E402
from shardxform.tuning.stacked import StackedWeight, stacked_weight  # noqa: E402
from shardxform.tuning.workers import Workers  # noqa: E402

pytestmark = pytest.mark.oracle


SMALL_MOE = smaller()  # one block of each kind of attention
TEXT = few("calib.jsonl")
CPU = torch.device("cpu")
DATA = ("--data", str(TEXT), "--dtype", "float32", "-q")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def there() -> Iterator[pretend.Counts]:
    with pretend.there() as counts:
        yield counts


def devices() -> tuple[Any, Any]:
    return CPU, torch.device(pretend.NAME)


def call(*args: str) -> Result:
    result = CliRunner().invoke(main, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def blocks_of(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((root / "shardxform.json").read_text())["facts"]["blocks"]
    return found


def test_every_command_with_a_device_is_run_here() -> None:
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in main.list_commands(context)}
    takes = {name for name, command in commands.items() if command and any(p.name == "device" for p in command.params)}
    assert takes == {"score", "evaluate", "quantize", "prune", "compress"}


# -- the double -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refused",
    [
        lambda there, here: here + there,
        lambda there, here: here[torch.zeros(1, dtype=torch.long, device=there.device)],
        lambda there, _: there.index_select(0, torch.tensor([0])),
        lambda there, here: there.index_put_((torch.tensor([0]),), here[:1]),
        lambda there, _: torch.mm(there, there, out=torch.empty(4, 4)),
        lambda there, here: here.add_(there),
        lambda there, _: torch.zeros(()).add_(there.sum()),
        lambda there, _: there.numpy(),
        lambda there, _: np.asarray(there),
        lambda there, _: there.to("cpu", non_blocking=True),
        lambda there, _: torch.randn(3, device=there.device, generator=torch.Generator()),
        lambda there, _: there.view(torch.uint32) & 1,
        lambda there, _: torch.nn.functional.grouped_mm(
            there[:, :3].contiguous(), there[None, :3], offs=torch.tensor([4], dtype=torch.int32, device=there.device)
        ),
        lambda there, _: torch.nn.functional.grouped_mm(
            there, there[None], offs=torch.tensor([4], device=there.device)
        ),
    ],
)
def test_the_double_refuses_what_a_gpu_refuses(
    there: pretend.Counts,  # noqa: ARG001
    refused: Callable[[Any, Any], object],
) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        refused(torch.ones(4, 4).to(pretend.NAME), torch.ones(4, 4))


def test_the_double_allows_what_a_gpu_allows(there: pretend.Counts) -> None:
    x = torch.ones(4, 4).to(pretend.NAME)
    assert (x * torch.tensor(2.0)).sum().item() == 32
    x[1] = torch.zeros(4)
    assert x[torch.tensor([False, True, False, False])].tolist() == [[0, 0, 0, 0]]
    y = torch.ones(4, 4, dtype=torch.bfloat16, device=pretend.NAME, requires_grad=True)
    y.view(2, 8)[0].clone().mul_(3).sum().backward()
    assert y.grad.device.type == "pretend"
    assert y.grad.cpu()[:, 0].tolist() == [3, 3, 0, 0]
    assert torch.isnan(torch.empty(3, device=pretend.NAME)).all()
    assert there.sent == 64 + 16
    assert there.waits


# -- score and evaluate -----------------------------------------------------------------------------------------------


def drawn(vocab: int, count: int, length: int) -> Windows:
    return windows_of(torch.randint(1, vocab, (count, length), generator=torch.Generator().manual_seed(3)))


def scored(path: Path, windows: Windows, device: Any, work: Path) -> Saliency:
    options = ScoreOptions(precision=Precision(device, torch.float32), work=work)
    return score(Checkpoint.open(path), windows, options)


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "deepseek_v3"])
def test_scores_are_those_of_the_cpu(
    kind: str,
    there: pretend.Counts,  # noqa: ARG001
    tiny_checkpoints: dict[str, Path],
    tmp_path: Path,
) -> None:
    windows = drawn(48, 3, 12)
    wanted, found = (scored(tiny_checkpoints[kind], windows, at, tmp_path / at.type) for at in devices())
    assert found.mtp_layers
    for layers, others in ((found.layers, wanted.layers), (found.mtp_layers, wanted.mtp_layers)):
        assert layers.keys() == others.keys()
        for layer, stats in layers.items():
            for name in NAMES:
                np.testing.assert_allclose(getattr(stats, name), getattr(others[layer], name), rtol=1e-5)


def test_a_block_is_sent_once_and_nothing_stays(
    there: pretend.Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "BATCH_TOKENS", 48)
    scored(WHOLE, drawn(2048, 6, 48), torch.device(pretend.NAME), tmp_path / "w")
    model = sum(path.stat().st_size for path in WHOLE.glob("*.safetensors"))
    assert there.sent < 1.3 * model
    assert there.peak < 1.2 * model / 4 + 4e6  # a block, and an expert in float32 with its tokens
    gc.collect()
    assert there.held < 1e4


def evaluated(windows: Windows, precision: Precision, work: Path, keep: int) -> Evaluation:
    source = Checkpoint.open(SMALL_MOE)
    view = pruned_view(source, Manifest(keep={n: tuple(range(keep)) for n in range(BLOCKS)})).checkpoint
    return evaluate(view, windows, EvaluateOptions(precision=precision, work=work), source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_are_those_of_the_cpu(
    dtype: Any,
    there: pretend.Counts,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    windows = drawn(2048, 2, 48)
    wanted, found = (evaluated(windows, Precision(device, dtype), tmp_path / "w", 6) for device in devices())
    assert found.against is not None
    assert wanted.against is not None
    near = 1e-4 if dtype == torch.float32 else 0.01  # the attention of the CPU is another one, and so are its last bits
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=near)
    assert found.against.kl == pytest.approx(wanted.against.kl, rel=near)
    assert found.against.top1 == pytest.approx(wanted.against.top1, abs=0.03 if near > 1e-3 else 0)
    assert found.against.block_errors == pytest.approx(wanted.against.block_errors, rel=near)


@pytest.mark.parametrize("place", [0, 1])
def test_the_head_is_computed_in_float32(
    place: int,
    there: pretend.Counts,  # noqa: ARG001
) -> None:
    """By hand, from bfloat16 states: what a head in bfloat16 gives is off by a hundredth."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for shard in SMALL_MOE.glob("*.safetensors"):
        tensors |= load_file(shard)
    hidden_NH = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = hidden_NH.double()
    normed = (
        wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (1 + tensors["model.norm.weight"].double())
    )
    wanted = normed @ tensors["lm_head.weight"].double().T
    precision = Precision(devices()[place], torch.bfloat16)
    with torch.no_grad(), Weights(Checkpoint.open(SMALL_MOE), precision) as weights, Skeleton(weights).head() as head:
        found = head.logits(hidden_NH)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: object, dtype: Any, **__: object) -> None:
        raise TypeError(f"Cannot convert a MPS Tensor to {dtype}")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(PlanError, match=r"--device mps: Cannot convert a MPS Tensor to torch\.float64"):
        inputs.make_precision(ComputeFlags(device="mps"))


# -- rounding, tuning, healing ----------------------------------------------------------------------------------------


def test_rounding_gives_the_same_bytes(
    there: pretend.Counts,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    for name, device in zip(("cpu", "there"), ("cpu", pretend.NAME), strict=True):
        call("quantize", str(SMALL_MOE), str(tmp_path / name), "--device", device, "-q")
    assert read_checkpoint(tmp_path / "cpu") == read_checkpoint(tmp_path / "there")


@pytest.mark.parametrize(
    ("block", "samples", "length", "iters", "stored"),
    picked(
        [
            ("0", 2, 40, 2, 4096),  # linear attention
            ("1", 2, 40, 2, 4096),
            ("1", 2, 300, 1, 512),  # more tokens a step than that: the attention is made again
            ("0", 2, 40, 1, 64),
        ],
        2,
    ),
)
def test_tuning_takes_the_steps_of_the_cpu(
    block: str,
    samples: int,
    length: int,
    iters: int,
    stored: int,
    there: pretend.Counts,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Signs of the same gradients; after many steps those that nearly cancel would have led elsewhere."""
    assert STORED_TOKENS == 4096
    monkeypatch.setattr(session, "STORED_TOKENS", stored)
    tune, settle, errors, moved = session.Tuner.tune, TunedBlock.settle, [], []

    def noted(*given: Any) -> dict[str, Any]:
        errors.extend((found := tune(*given))["blocks"])
        return found

    def settled(self: TunedBlock) -> None:
        moved.append([x.cpu().clone() for w in self.weights for x in (w._v_RI >> 2, w._clip_RG)])
        settle(self)

    monkeypatch.setattr(session.Tuner, "tune", noted)
    monkeypatch.setattr(TunedBlock, "settle", settled)
    size = ("--samples", str(samples), "--seqlen", str(length), "--iters", str(iters), "--batch-size", str(samples))
    one = ("--method", "auto-round", "--inputs", "fp", "--blocks", f"{block}-{block}")
    for name, device in zip(("cpu", "there"), ("cpu", pretend.NAME), strict=True):
        call("quantize", str(SMALL_MOE), str(tmp_path / name), "--device", device, *one, *size, *DATA)
    assert errors[1]["rtn_error"] == pytest.approx(errors[0]["rtn_error"], rel=1e-4)
    assert errors[1]["experts_never_reached"] == errors[0]["experts_never_reached"]
    for found, wanted in zip(moved[1], moved[0], strict=True):
        assert (found != 0).any()
        assert (found == wanted).float().mean() > 0.99


def keep_file(folder: Path) -> str:
    keep = {str(layer): list(range(0, ROUTED, 2)) for layer in range(BLOCKS)}
    (folder / "keep.json").write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": keep}))
    return str(folder / "keep.json")


def test_healing_gives_the_errors_of_the_cpu(
    there: pretend.Counts,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    heal = ("--merge", "--heal", "all", "--heal-iters", "3", "--heal-lr", "0.005", "--batch-size", "2")
    size = ("--samples", "3", "--seqlen", "40")
    for name, device in zip(("cpu", "there"), ("cpu", pretend.NAME), strict=True):
        given = ("prune", str(SMALL_MOE), str(tmp_path / name), "-m", keep_file(tmp_path), *heal, *size, *DATA)
        call(*given, "--device", device)
    for found, wanted in zip(blocks_of(tmp_path / "there"), blocks_of(tmp_path / "cpu"), strict=True):
        assert found["healed"]["pruned_error"] == pytest.approx(wanted["healed"]["pruned_error"], rel=0.01)
        assert found["healed"]["healed_error"] == pytest.approx(wanted["healed"]["healed_error"], rel=0.02)
        assert found["healed"]["healed_error"] < found["healed"]["pruned_error"]
        assert found["healed"]["merged_error"] == pytest.approx(wanted["healed"]["merged_error"], rel=0.01)
        assert found["healed"]["merged"] == wanted["healed"]["merged"]


def test_everything_in_one_command(
    there: pretend.Counts,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    """Scored, pruned, healed, tuned on the quantized chain, and measured, in the types that a GPU is given."""
    tune = ("--keep", "4", "--heal", "--heal-iters", "1", "--iters", "1", "--batch-size", "2")
    data = ("--data", str(TEXT), "--samples", "3", "--seqlen", "24", "--eval-data", str(TEXT))
    size = ("--eval-samples", "2", "--eval-seqlen", "24", "--device", pretend.NAME, "-q")
    call("compress", str(SMALL_MOE), str(tmp_path / "out"), *tune, *data, *size)
    facts = blocks_of(tmp_path / "out")
    assert [block["layer"] for block in facts] == [0, 1]
    assert all(block["healed"]["healed_error"] <= block["healed"]["pruned_error"] for block in facts)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "perplexity" in card.lower()
    healed = ("--method", "rtn", "--heal", "--heal-iters", "1", "--heal-lr", "0.005", "--batch-size", "2")
    rounded = ("quantize", str(SMALL_MOE), str(tmp_path / "rounded"), "-m", keep_file(tmp_path), *healed)
    call(*rounded, *data[:6], "--device", pretend.NAME, "-q")
    assert len(blocks_of(tmp_path / "rounded")) == 2


@pytest.mark.parametrize("where", ["score", "quantize", "tune"])
def test_memory_that_runs_out_is_said_in_a_line(
    where: str,
    there: pretend.Counts,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(passes, "_refuse_non_finite", full)
    monkeypatch.setattr(rounding_torch, "_scales", full)
    monkeypatch.setattr(session, "tune_block", full)
    data = ("--data", str(TEXT), "--samples", "2", "--seqlen", "16")
    command = {
        "score": ("score", str(SMALL_MOE), "-o", str(tmp_path / "out"), *data),
        "quantize": ("quantize", str(SMALL_MOE), str(tmp_path / "out")),
        "tune": ("quantize", str(SMALL_MOE), str(tmp_path / "out"), "--method", "auto-round", "--iters", "1", *data),
    }[where]
    result = CliRunner().invoke(main, [*command, "--device", pretend.NAME, "-q"], catch_exceptions=False)
    assert result.exit_code != 0
    assert "pretend:0: CUDA out of memory. Tried to allocate 2.00 GiB. " in result.output
    assert "See documentation" not in result.output


# -- the experts on a device ------------------------------------------------------------------------------------------

E, K, H, J = 6, 2, 64, 32


def routed(tokens: int, hidden: int) -> tuple[Any, Any, Any]:
    """Hidden states of tokens, their experts, and the router's weights; experts 1 and 4 get none."""
    random = torch.Generator().manual_seed(1)
    index_TK = torch.tensor([0, 2, 3, 5])[torch.randint(0, 4, (tokens, 1), generator=random) + torch.tensor([[0, -1]])]
    return torch.randn(tokens, hidden, generator=random), index_TK, torch.rand(tokens, K, generator=random)


def gate(between: Any) -> Any:
    first, second = between.chunk(2, dim=-1)
    return torch.nn.functional.silu(first) * second


def step(weights: list[Any], device: Any, hidden: int, dtype: Any, workers: Workers) -> list[Any]:
    """One forward and one backward pass of experts on a device: outputs, and gradients of both inputs."""
    experts = TunedExperts(*weights, gate, workers)
    hidden_TH, index_TK, weight_TK = routed(9, hidden)
    hidden_TH, weight_TK = (x.to(device, dtype).requires_grad_() for x in (hidden_TH, weight_TK))
    out_TH = experts(hidden_TH, index_TK.to(device), weight_TK)
    out_TH.backward(torch.ones_like(out_TH))
    assert experts.reached_E == [True, False, True, True, False, True]
    return [x.detach().float().cpu() for x in (out_TH, hidden_TH.grad, weight_TK.grad)]


def test_experts_without_tokens_do_not_move(there: pretend.Counts) -> None:  # noqa: ARG001
    """Where a grouped product leaves garbage for them."""
    random = torch.Generator().manual_seed(2)
    stacks = [torch.randn(shape, generator=random) / 8 for shape in ((E, 2 * J, H), (E, H, J))]
    results, moved = [], []
    with Workers(1) as workers:
        for device in devices():
            grid = Grid(search=False)
            tuned: list[StackedWeight] = [stacked_weight(w.to(device), grid, workers, "w") for w in stacks]
            for weight in tuned:
                weight.pace = Pace(1024.0, 1 / 128, 0.0, 1.2)
            results.append(step(tuned, device, H, torch.float32, workers))
            moved.append([(w._v_RI.cpu().view(w.shape), w._clip_RG.cpu().view(E, -1)) for w in tuned])
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for (v_EOI, clip_EG), (wanted_EOI, wanted_EG) in zip(moved[1], moved[0], strict=True):
        assert (v_EOI == wanted_EOI).float().mean() > 0.999  # signs of sums that nearly cancel
        torch.testing.assert_close(clip_EG, wanted_EG)
        assert not v_EOI[[1, 4]].any()
        assert (clip_EG[[1, 4]] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_width_are_multiplied(dtype: Any, there: pretend.Counts) -> None:  # noqa: ARG001
    """Rows that are no whole 16 bytes, which grouped products refuse."""
    random = torch.Generator().manual_seed(2)
    stacks = [torch.randn(shape, generator=random).bfloat16() / 4 for shape in ((E, 10, 13), (E, 13, 5))]
    results, values = [], []
    with Workers(1) as workers:
        for device in devices():
            healed = [HealedStack(w.clone().to(device), moves=True) for w in stacks]
            for stack in healed:
                stack.lr = 0.01
            results.append(step(healed, device, 13, dtype, workers))
            values.append([stack.stored(slice(None)).float().cpu() for stack in healed])
    for found, wanted in (*zip(results[1], results[0], strict=True), *zip(values[1], values[0], strict=True)):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    for value, stack in zip(values[1], stacks, strict=True):
        assert torch.equal(value[[1, 4]], stack[[1, 4]].float())
        assert not torch.equal(value[0], stack[0].float())


# -- how a device computes --------------------------------------------------------------------------------------------


@pytest.fixture
def fast() -> Iterator[None]:
    """Products in TF32, as an environment variable of containers has them."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def settings() -> tuple[object, ...]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        matmul.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.allow_tf32,
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.mark.usefixtures("fast")
def test_a_device_multiplies_exactly_and_adds_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    usual = settings()
    assert usual == (True, True, True, 0, True)
    with runtime.on_device(CPU), runtime.fixed_order(CPU):
        assert settings() == usual
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    cuda = torch.device("cuda")  # named, not used
    with contextlib.suppress(ZeroDivisionError), runtime.on_device(cuda):
        assert settings() == (False, False, False, 0, True)
        with runtime.fixed_order(cuda):
            assert settings() == (False, False, False, 2, False)
            with runtime.any_order():
                assert settings() == (False, False, False, 1, False)
        assert settings() == (False, False, False, 0, True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        1 / 0  # noqa: B018
    assert settings() == usual


@pytest.mark.usefixtures("fast")
def test_figures_and_tuning_compute_so(
    there: pretend.Counts,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[object, ...]] = []
    plain = Skeleton.call

    def call_(self: Skeleton, *given: Any) -> Any:
        seen.append((torch.is_grad_enabled(), *settings()))
        return plain(self, *given)

    monkeypatch.setattr(Skeleton, "call", call_)
    device = torch.device(pretend.NAME)
    scored(SMALL_MOE, drawn(2048, 2, 8), device, tmp_path / "w")
    evaluated(drawn(2048, 2, 8), Precision(device, torch.float32), tmp_path / "v", 4)
    call(
        *("quantize", str(SMALL_MOE), str(tmp_path / "out"), "--device", pretend.NAME, "--method", "auto-round", *DATA),
        *("--samples", "2", "--seqlen", "16", "--iters", "1", "--inputs", "fp", "--blocks", "1-1"),
    )
    assert {each[1:4] for each in seen} == {(False, False, False)}
    assert {each[4:] for each in seen if each[0]} == {(2, False)}  # what learns


# -- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    path = WHOLE.parents[1] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "bench_gpu", module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_measures_on_a_device(
    there: pretend.Counts,  # noqa: ARG001
    bench: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "CHECKS", {"evaluate": (0, bench.check_evaluate)})
    given = ["--device", pretend.NAME, "--small", "--json", str(tmp_path / "found.json")]
    assert bench.main(given) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: row["ok"] for name, row in found["checks"].items()} == {
        "evaluate: perplexity, relative": True,
        "evaluate: KL, relative": True,
        "evaluate: KL in bfloat16, relative": True,
    }
    kinds = [f"{what}, {kind}_attention" for what in ("tuning", "healing") for kind in ("linear", "full")]
    measured = {f"{each}: seconds an iteration" for each in kinds}
    measured |= {"scoring: tokens/s through a block", "sending weights, GB/s", "rounding: GB/s of bfloat16"}
    assert measured < found["measures"].keys()
    assert all(value > 0 for value in found["measures"].values())
    assert not found["skipped"]
    hours = bench.predicted(dict.fromkeys(found["measures"], 1.0))
    assert len(hours) == 4
    assert hours["in all"] == pytest.approx(sum(hours.values()) / 2)
    assert capsys.readouterr().out.count("| OK |") == 3


def test_the_benchmark_says_what_fails_and_what_it_leaves_out(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_run: Any) -> None:
        raise ValueError("no such thing")

    checks = {"far": (0, lambda run: bench.note(run, "far", 0.2, 0.1)), "broken": (0, breaks)}
    monkeypatch.setattr(bench, "CHECKS", {**checks, "slow": (1000, breaks)})
    monkeypatch.setattr(bench, "SMALL", None)  # nothing is measured
    assert bench.main(["--device", "cpu", "--small", "--minutes", "0.1"]) == 1
    out = capsys.readouterr().out
    assert "| far | 2.00e-01, at most 1e-01 | FAIL |" in out
    assert "| broken | ValueError: no such thing | FAIL |" in out
    assert "| slow | left out: wants about 1000 s, " in out
    assert bench.main(["--device", "abacus"]) == 2
    assert "gpu.py: --device abacus: " in capsys.readouterr().err
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "transformers" else True)
    assert bench.main([]) == 2
    assert capsys.readouterr().err == "gpu.py: transformers is not installed\n"

"""Perplexity, divergence and block errors against the loaded models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from shardxform.calibration import DataOptions, Windows, load_windows  # noqa: E402
from shardxform.checkpoint import Checkpoint  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.errors import Interrupted, PlanError  # noqa: E402
from shardxform.evaluation import EvaluateOptions, Evaluation, evaluate  # noqa: E402
from shardxform.forward.weights import Precision  # noqa: E402
from shardxform.manifest import Manifest  # noqa: E402
from shardxform.progress import Progress  # noqa: E402
from shardxform.prune import plan_prune  # noqa: E402
from shardxform.runner import run  # noqa: E402
from shardxform.view import pruned_view  # noqa: E402

pytestmark = pytest.mark.oracle

FLOAT32 = Precision(torch.device("cpu"), torch.float32)
KEEP = Manifest(keep=dict.fromkeys(range(4), (0, 1, 3, 4, 7, 9, 12, 14)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def windows() -> Windows:
    root = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
    return load_windows(root, DataOptions(data=str(root / "text/heldout.jsonl"), samples=10, seqlen=128))


def loaded(path: Path) -> Any:
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def block_outputs(model: Any, ids: Any) -> list[Any]:
    found: list[Any] = []
    hooks = [layer.register_forward_hook(lambda _m, _a, out: found.append(out[0])) for layer in model.model.layers]
    model(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def by_hand(model: Any, windows: Windows, shorter: dict[int, int] | None = None) -> tuple[float, list[Any], list[Any]]:
    """Perplexity, log-probabilities and block outputs of each window, one window at a time, without padding."""
    losses: list[float] = []
    logps, blocks = [], []
    for row, ids in enumerate(torch.from_numpy(windows.ids_NT).long()):
        ids = ids[: (shorter or {}).get(row, len(ids))]
        logp = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        losses += [-float(logp[t, ids[t + 1]]) for t in range(len(ids) - 1)]
        logps.append(logp)
        blocks.append(block_outputs(model, ids))
    return math.exp(sum(losses) / len(losses)), logps, blocks


def run_evaluate(checkpoint: Checkpoint, windows: Windows, work: Path, against: Checkpoint | None = None) -> Evaluation:
    return evaluate(checkpoint, windows, EvaluateOptions(precision=FLOAT32, work=work), against)


def test_perplexity_is_the_loaded_models(small_moe: Path, windows: Windows, tmp_path: Path) -> None:
    found = run_evaluate(Checkpoint.open(small_moe), windows, tmp_path / "w")
    assert found.perplexity == pytest.approx(by_hand(loaded(small_moe), windows)[0], rel=1e-5)
    assert (found.windows, found.tokens, found.against) == (10, 1280, None)
    assert not (tmp_path / "w").exists()


def test_against_a_reference(small_moe: Path, windows: Windows, tmp_path: Path) -> None:
    source = Checkpoint.open(small_moe)
    run(plan_prune(source, KEEP), tmp_path / "pruned")
    found = run_evaluate(Checkpoint.open(tmp_path / "pruned"), windows, tmp_path / "w", source)
    assert found.against is not None
    perplexity, logps, blocks = by_hand(loaded(tmp_path / "pruned"), windows)
    reference_perplexity, reference_logps, reference_blocks = by_hand(loaded(small_moe), windows)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.against.perplexity == pytest.approx(reference_perplexity, rel=1e-4)
    kls = [float((r.exp() * (r - t)).sum(-1).mean()) for r, t in zip(reference_logps, logps, strict=True)]
    assert found.against.kl == pytest.approx(np.mean(kls), rel=1e-3)
    assert found.against.kl_error == pytest.approx(np.std(kls, ddof=1) / math.sqrt(10), rel=1e-3)
    same = [float((r.argmax(-1) == t.argmax(-1)).double().mean()) for r, t in zip(reference_logps, logps, strict=True)]
    assert found.against.top1 == pytest.approx(np.mean(same), abs=2e-3)
    for layer, error in enumerate(found.against.block_errors):
        ours = torch.stack([b[layer].double() for b in blocks])
        theirs = torch.stack([b[layer].double() for b in reference_blocks])
        assert error == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-3)


def test_a_view_is_worth_what_the_written_checkpoint_is(small_moe: Path, windows: Windows, tmp_path: Path) -> None:
    source = Checkpoint.open(small_moe)
    run(plan_prune(source, KEEP), tmp_path / "pruned")
    written = run_evaluate(Checkpoint.open(tmp_path / "pruned"), windows, tmp_path / "w")
    assert run_evaluate(pruned_view(source, KEEP).checkpoint, windows, tmp_path / "w") == written


def test_a_checkpoint_against_itself_differs_nowhere(small_moe: Path, windows: Windows, tmp_path: Path) -> None:
    source = Checkpoint.open(small_moe)
    found = run_evaluate(source, windows, tmp_path / "w", source).against
    assert found is not None
    assert (found.kl, found.top1, found.block_errors) == (0, 1, (0, 0, 0, 0))


def test_padding_counts_nowhere(small_moe: Path, windows: Windows, tmp_path: Path) -> None:
    shorter = {0: 17, 4: 2, 9: 100}
    lengths = np.array([shorter.get(row, 128) for row in range(10)], np.int32)
    padded = Windows(ids_NT=windows.ids_NT, lengths_N=lengths, fingerprint="padded", provenance={}, notes=())
    found = run_evaluate(Checkpoint.open(small_moe), padded, tmp_path / "w")
    assert found.perplexity == pytest.approx(by_hand(loaded(small_moe), windows, shorter)[0], rel=1e-4)
    assert found.tokens == lengths.sum()


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_interrupted_it_goes_on_to_the_same_figures(
    small_moe: Path, windows: Windows, tmp_path: Path, stop_at: int
) -> None:
    source = Checkpoint.open(small_moe)
    pruned = pruned_view(source, KEEP).checkpoint
    whole = run_evaluate(pruned, windows, tmp_path / "w", source)
    seen: list[Progress] = []

    def stop(p: Progress) -> None:
        seen.append(p)
        if len(seen) == stop_at:
            raise KeyboardInterrupt

    options = EvaluateOptions(precision=FLOAT32, work=tmp_path / "w", on_progress=stop)
    with pytest.raises(Interrupted):
        evaluate(pruned, windows, options, source)
    options.on_progress = seen.append
    assert evaluate(pruned, windows, options, source) == whole
    assert seen[-1].done == seen[-1].total == 2 * 5 * 1280


def test_models_of_another_shape_are_refused(
    small_moe: Path, tiny_checkpoints: dict[str, Path], windows: Windows, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"num_blocks is 4, but .* same shape"):
        run_evaluate(
            Checkpoint.open(small_moe), windows, tmp_path / "w", Checkpoint.open(tiny_checkpoints["deepseek_v3"])
        )


def test_the_command(small_moe: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "keep.json"
    manifest.write_text(json.dumps(KEEP.to_dict()))
    data = ["--data", str(small_moe / "text/heldout.jsonl"), "--samples", "4", "--seqlen", "64"]
    base = ["evaluate", str(small_moe), *data, "--work", str(tmp_path / "w"), "-q"]
    runner = CliRunner()
    dry = runner.invoke(main, [*base, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keep.json"]
    plot = tmp_path / "p.png"
    args = [*base, "-m", str(manifest), "--against", str(small_moe), "--json", "--plot", str(plot)]
    result = runner.invoke(main, args)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["tokens"] == 256
    assert facts["perplexity"] > facts["against"]["perplexity"]
    assert len(facts["against"]["block_errors"]) == 4
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = runner.invoke(main, [*base, "-m", str(manifest), "--against", str(small_moe)])
    assert "KL divergence" in text.output
    assert runner.invoke(main, [*base, "--plot", str(plot)]).exit_code == 2  # nothing to draw without a reference


def test_no_data_no_device(small_moe: Path) -> None:
    runner = CliRunner()
    assert "'--data' or '--preset'" in runner.invoke(main, ["evaluate", str(small_moe)]).output
    data = ["--data", str(small_moe / "text/heldout.jsonl"), "--samples", "1", "--seqlen", "8"]
    result = runner.invoke(main, ["evaluate", str(small_moe), *data, "--device", "abacus"])
    assert result.exit_code == 1
    assert result.output.startswith("shardxform: --device abacus: ")

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
from smaller import BLOCKS, WHOLE, smaller
from strategies import picked
from texts import few

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.base.progress import Progress  # noqa: E402
from shardxform.base.standard_errors import Sampling, standard_error  # noqa: E402
from shardxform.calibration import DataOptions, Windows, load_windows  # noqa: E402
from shardxform.checkpoint.identity import identify  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.cli import evaluate as evaluate_module  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.errors import Interrupted, PlanError, ResumeError  # noqa: E402
from shardxform.evaluation.evaluate import Comparison, EvaluateOptions, Evaluation, evaluate  # noqa: E402
from shardxform.evaluation.plot import draw  # noqa: E402
from shardxform.evaluation.routing import Load, kept_ids, load_of  # noqa: E402
from shardxform.execution.runner import run  # noqa: E402
from shardxform.forward.weights import Precision  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
from shardxform.plan.view import pruned_view  # noqa: E402
from shardxform.publish.card.gathering import read_evaluation  # noqa: E402

pytestmark = pytest.mark.oracle

FLOAT32 = Precision(torch.device("cpu"), torch.float32)
KEEP = Manifest(keep=dict.fromkeys(range(BLOCKS), (0, 1, 3, 4, 7)))
HELDOUT = str(few("heldout.jsonl", 5))  # of both sources


@pytest.fixture(scope="module")
def small_moe() -> Path:
    return smaller()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def windows() -> Windows:
    return load_windows(WHOLE, DataOptions(data=HELDOUT, samples=10, seqlen=128))


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
def by_hand(model: Any, windows: Windows) -> tuple[float, list[Any], list[Any]]:
    """Perplexity, log-probabilities and block outputs of each window, one window at a time."""
    losses: list[float] = []
    logps, blocks = [], []
    for ids in torch.from_numpy(windows.ids_NT).long():
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
    apart = standard_error([128 * kl for kl in kls], [128.0] * 10, Sampling((range(10),), joined=True))
    assert found.against.kl_error == pytest.approx(apart, rel=1e-3)
    same = [float((r.argmax(-1) == t.argmax(-1)).double().mean()) for r, t in zip(reference_logps, logps, strict=True)]
    assert found.against.top1 == pytest.approx(np.mean(same), abs=2e-3)
    for layer, error in enumerate(found.against.block_errors):
        ours = torch.stack([b[layer].double() for b in blocks])
        theirs = torch.stack([b[layer].double() for b in reference_blocks])
        assert error == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-3)
    counts, reference_counts = (routed(loaded(path), windows) for path in (tmp_path / "pruned", small_moe))
    assert list(found.against.loads) == list(range(BLOCKS))
    for layer, load in found.against.loads.items():
        assert load.keep == KEEP.keep[layer]  # as the record of the output has it
        assert list(load.tested) == counts[layer]
        assert list(load.reference) == [reference_counts[layer][expert] for expert in load.keep]
        assert load.pruned == sum(reference_counts[layer]) - sum(load.reference)


def routed(model: Any, windows: Windows) -> list[list[int]]:
    """Tokens that each layer's router sends to each expert."""
    found: list[list[int]] = [[] for _ in model.model.layers]

    def look(layer: int, experts: Any, args: Any) -> None:
        count = args[1].flatten().bincount(minlength=experts.num_experts).tolist()
        found[layer] = [a + b for a, b in zip(found[layer], count, strict=True)] if found[layer] else count

    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_pre_hook(lambda module, args, layer=layer: look(layer, module, args))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(windows.ids_NT).long())
    return found


def test_loads_say_what_was_lost_and_what_moved() -> None:
    load = load_of([30, 10], [40, 20, 40], 0, {0: [0, 2]})
    assert load == Load(keep=(0, 2), tested=(30, 10), reference=(40, 40), pruned=20)
    assert (load.lost, load.moved, load.shares) == (0.2, 0.25, ((0.5, 0.75), (0.5, 0.25)))
    assert load.even == (pytest.approx(2.0), pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))))
    assert load_of([30, 10], [40, 20, 40], 0, {}) is None
    assert load_of([30, 10], [40, 20], 0, {0: [0, 2]}) is None


def test_experts_are_not_taken_for_others_of_the_same_number(small_moe: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(small_moe)
    run(plan_prune(source, KEEP), tmp_path / "pruned")
    pruned = Checkpoint.open(tmp_path / "pruned")
    assert kept_ids(pruned, source) == KEEP.keep
    assert kept_ids(pruned, pruned) is None
    assert kept_ids(source, source) == {}
    assert kept_ids(source, pruned) is None


def test_a_view_is_worth_what_the_written_checkpoint_is(small_moe: Path, windows: Windows, tmp_path: Path) -> None:
    source = Checkpoint.open(small_moe)
    run(plan_prune(source, KEEP), tmp_path / "pruned")
    written = run_evaluate(Checkpoint.open(tmp_path / "pruned"), windows, tmp_path / "w")
    assert run_evaluate(pruned_view(source, KEEP).checkpoint, windows, tmp_path / "w") == written


def test_a_checkpoint_against_itself_differs_nowhere(small_moe: Path, windows: Windows, tmp_path: Path) -> None:
    source = Checkpoint.open(small_moe)
    found = run_evaluate(source, windows, tmp_path / "w", source).against
    assert found is not None
    assert (found.kl, found.top1, found.block_errors) == (0, 1, (0,) * BLOCKS)


@pytest.mark.parametrize("stop_at", picked([3, 1, 2], 3))
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
    assert seen[-1].done == seen[-1].total == 2 * (BLOCKS + 1) * 1280


# -- sources of text --------------------------------------------------------------------------------------------------


def held_out(**options: Any) -> Windows:
    return load_windows(WHOLE, DataOptions(data=HELDOUT, samples=5, seqlen=96, **options))


def test_each_source_has_the_figures_of_its_windows(small_moe: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(small_moe)
    pruned = pruned_view(source, KEEP).checkpoint
    apart = held_out(by_source=True)
    found = run_evaluate(pruned, apart, tmp_path / "w", source)
    assert [*found.sources] == ["code", "kjv"]
    assert (found.windows, found.tokens) == (10, 960)
    assert found.against is not None
    mean = 0.0
    for name, each in found.sources.items():
        alone = run_evaluate(pruned, held_out(sources=(name,)), tmp_path / "w", source)
        assert each.against is not None
        assert alone.against is not None
        assert (each.windows, each.tokens, each.against.block_errors, dict(each.sources)) == (5, 480, (), {})
        assert each.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        assert each.ratio == pytest.approx(alone.perplexity / alone.against.perplexity, rel=1e-5)
        figures = [(c.perplexity, c.kl, c.kl_error, c.top1) for c in (each.against, alone.against)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4)
        mean += each.against.kl / 2
    assert found.against.kl == pytest.approx(mean, rel=1e-9)
    losses = [math.log(each.perplexity) for each in found.sources.values()]
    assert math.log(found.perplexity) == pytest.approx(sum(losses) / 2, rel=1e-9)
    assert len(found.against.block_errors) == BLOCKS


def test_the_perplexity_of_a_source_is_the_loaded_models(small_moe: Path, tmp_path: Path) -> None:
    found = run_evaluate(Checkpoint.open(small_moe), held_out(by_source=True), tmp_path / "w")
    expected = by_hand(loaded(small_moe), held_out(sources=("kjv",)))[0]
    assert found.sources["kjv"].perplexity == pytest.approx(expected, rel=1e-5)
    assert math.isnan(found.sources["kjv"].ratio)


def test_sources_go_on_after_an_interruption(small_moe: Path, tmp_path: Path) -> None:
    source, windows = Checkpoint.open(small_moe), held_out(by_source=True)
    whole = run_evaluate(source, windows, tmp_path / "w")
    seen: list[Progress] = []

    def stop(p: Progress) -> None:
        seen.append(p)
        if len(seen) == 3:
            raise KeyboardInterrupt

    options = EvaluateOptions(precision=FLOAT32, work=tmp_path / "w", on_progress=stop)
    with pytest.raises(Interrupted):
        evaluate(source, windows, options)
    with pytest.raises(ResumeError, match="`windows`: was"):
        run_evaluate(source, held_out(), tmp_path / "w")
    assert run_evaluate(source, windows, tmp_path / "w") == whole


def test_the_command_shows_each_source_and_the_card_too(small_moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan_prune(Checkpoint.open(small_moe), KEEP), out)
    data = ["--data", HELDOUT, "--samples", "2", "--seqlen", "64", "--by-text-source"]
    base = ["evaluate", str(out), *data, "--work", str(tmp_path / "w"), "-q"]
    runner, plot = CliRunner(), tmp_path / "p.png"
    assert "sources  code 2, kjv 2 windows" in runner.invoke(main, [*base, "--dry-run"]).output
    shown = runner.invoke(main, [*base, "--against", str(small_moe), "--plot", str(plot)]).output
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    again = [*base, "--against", str(small_moe), "--plot"]
    assert runner.invoke(main, [*again, str(plot)]).exit_code == 0  # its own picture
    for name, content in (
        ("text.png", b"mine"),
        ("photo.png", plot.read_bytes().replace(b"shardxform", b"GIMP 2.10_")),
    ):
        (tmp_path / name).write_bytes(content)
        done = runner.invoke(main, [*again, str(tmp_path / name)])
        assert done.exit_code == 1
        assert f"{tmp_path / name}: another file is there, and nothing is overwritten" in done.output
        assert (tmp_path / name).read_bytes() == content
    result = runner.invoke(main, [*base, "--against", str(small_moe), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    (tmp_path / "e.json").write_text(result.stdout)
    card = runner.invoke(main, ["card", str(out), "--evaluation", str(tmp_path / "e.json")]).output
    assert [*facts["sources"]] == ["code", "kjv"]
    for name, of in (*facts["sources"].items(), ("", facts)):
        ratio = of["perplexity"] / of["against"]["perplexity"]
        figures = [f"{of['perplexity']:.4f}", f"{of['against']['perplexity']:.4f}", f"{ratio:.4f}"]
        assert row(shown, name or "all")[:5] == [name or "all", str(of["windows"]), *figures]
        cells = f"| {f'`{name}`' if name else ''} | {of['tokens']} | {of['windows']} | {of['perplexity']:.3f} ± "
        line = next(line for line in card.splitlines() if line.startswith(f"| `heldout.jsonl` {cells}"))
        error = of["against"]["perplexity_ratio_standard_error"]
        assert f"| {ratio:.4f} ± {error:.4f} | {of['against']['kl']:.4f} ± " in line
        assert of["against"]["perplexity_ratio"] == ratio
    assert "A source of text is measured on windows of its documents alone" in card
    assert "The reference is the checkpoint that this one was made from, on the same windows" in card
    alone = runner.invoke(main, base).output
    assert row(alone, "kjv") == ["kjv", "2", row(shown, "kjv")[2]]


def row(output: str, first: str) -> list[str]:
    """The cells of the last line of a table that begins with a word."""
    return [line.split() for line in output.splitlines() if line.split()[:1] == [first]][-1]


def test_sources_that_are_not_there_are_refused(small_moe: Path, tmp_path: Path) -> None:
    data = ["--data", HELDOUT, "--samples", "1", "--seqlen", "8"]
    for command in (["evaluate", str(small_moe)], ["score", str(small_moe), "-o", str(tmp_path / "s")]):
        result = CliRunner().invoke(main, [*command, *data, "--text-sources", "kjv, cod", "--dry-run"])
        assert result.exit_code == 1
        assert "heldout.jsonl: expected documents of source 'cod', found 'code', 'kjv'\n" in result.output


def test_the_card_says_which_sources_were_calibrated_on(tmp_path: Path) -> None:
    keep = json.loads((WHOLE.parents[1] / "manifests/small-moe-keep8.json").read_text())
    digest = keep["provenance"]["runs"][0]["sha256"]
    keep["provenance"]["runs"][0]["sources"] = ["code"]
    manifest, path, out = tmp_path / "keep.json", tmp_path / "e.json", tmp_path / "out"
    manifest.write_text(json.dumps(keep))
    run(plan_prune(Checkpoint.open(WHOLE), Manifest.load(manifest)), out)
    for sources, flatters in (([], True), (["code"], True), (["kjv"], False)):
        data = {"data": "calib.jsonl", "sha256": digest, "sources": sources}
        identity = identify(Checkpoint.open(out)).described()
        path.write_text(json.dumps({"identity": identity, "data": data, "windows": 1, "tokens": 8, "perplexity": 2.5}))
        args = ["card", str(out), "--manifest", str(manifest), "--evaluation", str(path)]
        card = CliRunner().invoke(main, args, catch_exceptions=False).output
        assert "calibration text: `calib.jsonl` (source `code`)" in card
        named = f" (source `{sources[0]}`)" if sources else ""
        assert f"| `calib.jsonl`{named} | 8 | 1 | 2.500 |" in card
        assert ("`calib.jsonl` is both calibration and evaluation text" in card) is flatters


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ([], "sources: expected at most 100 names, each with its figures"),
        ({"\x1b[2J": {"windows": 1, "tokens": 2}}, "sources: expected at most 100 names, each with its figures"),
        ({"a": 3}, "windows: missing or malformed"),
        ({"a": {"windows": 1, "tokens": 2, "against": {"top1_agreement": 2}}}, "expected a share from 0 to 1, found 2"),
    ],
)
def test_malformed_figures_of_sources_are_refused(small_moe: Path, tmp_path: Path, sources: Any, told: str) -> None:
    path = tmp_path / "e.json"
    path.write_text(json.dumps({"data": {"data": "d"}, "windows": 1, "tokens": 2, "sources": sources}))
    with pytest.raises(PlanError) as caught:
        read_evaluation(path, Checkpoint.open(small_moe))
    assert told in str(caught.value)


def test_a_picture_shows_any_name_and_any_number_of_sources(tmp_path: Path) -> None:
    def drawn(sources: dict[str, Evaluation]) -> bytes:
        draw(total, tmp_path / "p.png", title="t", sources=sources)
        return (tmp_path / "p.png").read_bytes()

    total = Comparison(perplexity=2.0, kl=0.5, kl_error=math.nan, top1=0.5, block_errors=(0.1, 0.2))
    one = Evaluation(perplexity=math.inf, windows=1, tokens=8, against=total)
    names = [r"$\\frac{$", "x" * 100, "caf\u00e9"]
    pictures = [drawn({}), drawn(dict.fromkeys(names[:1], one)), drawn(dict.fromkeys(names, one))]
    assert len(set(pictures)) == 3
    assert drawn({}) == pictures[0]
    assert drawn(dict.fromkeys(map(str, range(100)), one))[:8] == b"\x89PNG\r\n\x1a\n"


def test_models_of_another_shape_are_refused(
    small_moe: Path, tiny_checkpoints: dict[str, Path], windows: Windows, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"num_blocks is 2, but .* same shape"):
        run_evaluate(
            Checkpoint.open(small_moe), windows, tmp_path / "w", Checkpoint.open(tiny_checkpoints["deepseek_v3"])
        )


def test_the_command(small_moe: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "keep.json"
    manifest.write_text(json.dumps(KEEP.to_dict()))
    data = ["--data", HELDOUT, "--samples", "4", "--seqlen", "64"]
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
    assert len(facts["against"]["block_errors"]) == BLOCKS
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = runner.invoke(main, [*base, "-m", str(manifest), "--against", str(small_moe)])
    assert "KL divergence" in text.output
    assert runner.invoke(main, [*base, "--plot", str(plot)]).exit_code == 2  # nothing to draw without a reference


def test_a_reference_in_another_type_shows_what_the_type_does(tmp_path: Path) -> None:
    """Of the whole small checkpoint: a router that chooses fewer experts changes more."""
    data = ["--data", HELDOUT, "--samples", "2", "--seqlen", "64"]
    base = ["evaluate", str(WHOLE), *data, "--work", str(tmp_path / "w"), "-q", "--dtype", "bfloat16"]
    both = [*base, "--against", str(WHOLE)]
    same = CliRunner().invoke(main, both)
    assert same.exit_code == 0, same.output
    assert "KL divergence  0.000000" in same.output
    assert "computed in    bfloat16, whose own rounding is in these figures" in same.output
    shown = CliRunner().invoke(main, [*both, "--against-dtype", "float32", "--json"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    assert (facts["dtype"], facts["against"]["dtype"]) == ("bfloat16", "float32")
    assert 1e-6 < facts["against"]["kl"] < 1e-2
    assert CliRunner().invoke(main, [*base, "--against-dtype", "float32"]).exit_code == 2  # of which reference?


def test_no_data_no_device(small_moe: Path) -> None:
    runner = CliRunner()
    assert "'--data'" in runner.invoke(main, ["evaluate", str(small_moe)]).output
    data = ["--data", HELDOUT, "--samples", "1", "--seqlen", "8"]
    result = runner.invoke(main, ["evaluate", str(small_moe), *data, "--device", "abacus"])
    assert result.exit_code == 1
    assert result.output.startswith("shardxform: --device abacus: ")


@pytest.mark.parametrize(
    ("perplexity", "errors", "lower", "shrinks"), [(9.0, (0.1, 0.05), True, True), (11.0, (0.1, 0.2), False, False)]
)
def test_figures_that_go_down_are_explained(
    capsys: pytest.CaptureFixture[str], perplexity: float, errors: tuple[float, ...], lower: bool, shrinks: bool
) -> None:
    against = Comparison(perplexity=10.0, kl=0.1, kl_error=0.01, top1=0.9, block_errors=errors)
    found = Evaluation(perplexity=perplexity, windows=2, tokens=4, against=against)
    evaluate_module._report(found, Path("a"), None, Path("b"), 1.0)
    told = capsys.readouterr().out
    assert ("compare by KL divergence" in told) is lower
    assert ("negative where" in told) is shrinks

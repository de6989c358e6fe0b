"""Who judges a block: windows that nobody learned from; what is said of them; and that no clock is in a record."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from smaller import BLOCKS, smaller
from strategies import picked
from texts import few

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_tuning_block import GRID, OPTIONS, SAMPLES, Layer, Watched, same, samples, tuned  # noqa: E402

from shardxform.ask.recipe import Heal, Recipe, held_out  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.cli.outputs import judged_on, tell_blocks  # noqa: E402
from shardxform.execution.journal import measured, recorded  # noqa: E402
from shardxform.formats import packing, rounding  # noqa: E402
from shardxform.tuning.block import install, tune_block  # noqa: E402
from shardxform.tuning.samples import Loss, Samples, choose_judges  # noqa: E402
from shardxform.tuning.workers import Workers  # noqa: E402

pytestmark = pytest.mark.oracle

SMALL_MOE = smaller()


def of(count: int, block: int = 0) -> Samples:
    hidden_NTH = np.zeros((count, 4, 2), np.float32)
    return Samples(block=block, hidden_NTH=hidden_NTH, target_NTH=hidden_NTH)


# -- the split --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "judges"), [(2, 1), (3, 1), (8, 1), (15, 1), (16, 2), (64, 8), (256, 32)])
def test_who_judges_does_not_learn(count: int, judges: int) -> None:
    found = choose_judges(of(count), seed=5)
    assert len(found.judges_N) == judges == held_out(count)
    assert sorted([*found.judges_N, *found.learned_N]) == list(range(count))
    judged = found.judged(of(count))
    assert (judged.windows, judged.tokens, judged.held_out) == (judges, 3 * judges, True)


def test_the_judges_are_the_same_for_every_block_and_others_with_another_seed() -> None:
    chosen = {tuple(choose_judges(of(64, block), seed=5).judges_N) for block in range(4)}
    assert len(chosen) == 1
    assert tuple(choose_judges(of(64), seed=6).judges_N) not in chosen


def test_a_single_window_learns_and_judges_and_says_so() -> None:
    found = choose_judges(of(1), seed=5)
    assert (list(found.learned_N), list(found.judges_N)) == ([0], [0])
    assert not found.judged(of(1)).held_out
    assert held_out(1) == 0


def test_the_work_that_is_planned_is_that_of_the_windows_that_learn() -> None:
    recipe = Recipe(windows="", data={}, samples=8, seqlen=10, iters=5, batch_size=8)
    assert recipe.block_tokens == 10 * (2 * 8 + 5 * 7)
    assert recipe.batch_tokens == 10 * 7
    assert replace(recipe, samples=1).block_tokens == 10 * (2 + 5)
    both = replace(recipe, heal=Heal(what="all", iters=3, lr=0.1, batch_size=2))
    assert both.block_tokens == 10 * (2 * 8 + 5 * 7 + 3 * 2)


# -- tuning -----------------------------------------------------------------------------------------------------------


def test_tuning_never_learns_from_the_window_that_judges() -> None:
    layer = Layer()
    learned, judged = set[int](), set[int]()
    data = samples(layer)
    watched: Any = Watched(data.hidden_NTH)

    def run(hidden_BTH: Any) -> Any:
        (learned if torch.is_grad_enabled() else judged).update(watched.last.tolist())
        return layer.run(hidden_BTH)

    with Workers(1) as workers:
        block = install(layer.module, layer.names, GRID, workers)
        layer.module.float()
        result = tune_block(block, run, replace(data, hidden_NTH=watched), OPTIONS)
    assert judged == {4}
    assert learned == set(range(SAMPLES)) - {4}
    assert (result.judged.windows, result.judged.tokens, result.judged.held_out) == (1, 11, True)


def test_rounding_is_kept_where_tuning_helps_the_windows_it_learns_from_alone() -> None:
    """The window that judges is of another kind, for which plain rounding is as good as can be."""

    def as_rounded(data: Samples) -> Samples:
        layer, target = Layer(), data.target_NTH.copy()
        with Workers(1) as workers, torch.no_grad():
            install(layer.module, layer.names, GRID, workers)
            layer.module.float()
            target[4] = layer.run(torch.from_numpy(data.hidden_NTH[4:5])).numpy()[0]
        return replace(data, target_NTH=target)

    _, result, codes = tuned(as_rounded)
    assert (result.iteration, result.loss) == (0, result.start_loss)
    layer = Layer()
    for name, w in layer.weights(layer.names).items():
        start = rounding.quantize(w, "BF16", GRID, layout="row")[0]
        np.testing.assert_array_equal(codes[name], np.hstack([packing.unpack(start.words, 4, "row"), start.scales]))
    assert not same(codes, tuned()[2])  # which the others alone would have moved


def test_how_far_a_ratio_may_be_off_is_of_the_windows_together() -> None:
    """Windows that lose alike in both say much of the ratio, however far they are from each other."""
    start = Loss((2.0, 8.0, 20.0), values=3)
    assert start.mean == 10.0
    assert Loss((1.0, 4.0, 10.0), values=3).ratio_error(start) == 0.0
    # ratio 0.5; residuals 1, 0, -1; 3 / 2 * 2 / 30^2; lag floor(4 * 0.03^(2/9)) = 1 adds 2 * 1/2 * 0
    assert Loss((2.0, 4.0, 9.0), values=3).ratio_error(start) == pytest.approx(3**0.5 / 30)
    assert math.isnan(Loss((1.0,), values=1).ratio_error(Loss((2.0,), values=1)))
    assert math.isnan(Loss((0.0, 0.0), values=1).ratio_error(Loss((0.0, 0.0), values=1)))


# -- what is said -----------------------------------------------------------------------------------------------------

BLOCK = {"layer": 0, "rtn_error": 0.5, "tuned_error": 0.25, "experts_never_reached": []}
APART = {"windows": 8, "tokens": 4088, "held_out": True}


def test_a_table_says_what_it_was_judged_on(capsys: pytest.CaptureFixture[str]) -> None:
    tell_blocks({"blocks": [{**BLOCK, "judged_on": APART}]})
    told = capsys.readouterr().out
    assert "errors: on 8 windows of 4,088 tokens that no block learned from" in told
    assert "flatter" not in told
    assert "time" not in told
    assert "50.0% " in told
    tell_blocks({"blocks": [{**BLOCK, "judged_on": APART, "ratio_standard_error": 0.021}]})
    assert "50.0% +- 2.1% " in capsys.readouterr().out
    tell_blocks({"blocks": [{**BLOCK, "judged_on": {**APART, "windows": 1}, "ratio_standard_error": None}]})
    assert "one window tells little" in capsys.readouterr().out
    tell_blocks({"blocks": [{**BLOCK, "judged_on": {"windows": 1, "tokens": 63, "held_out": False}}]})
    told = capsys.readouterr().out
    assert "errors: on 1 window of 63 tokens that the blocks also learned from" in told
    assert "they flatter" in told
    assert judged_on([BLOCK]) == ""  # of an earlier version


def test_time_and_memory_are_those_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    tell_blocks({"blocks": [BLOCK, {**BLOCK, "layer": 1}]}, [{"layer": 1, "seconds": 2.5, "peak_rss_bytes": 10**9}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split()[-4:] == ["2.5", "s", "1.00", "GB"]
    assert lines[-2].split()[-2:] == ["-", "-"]
    tell_blocks({"blocks": [{**BLOCK, "seconds": 3.0, "peak_rss_bytes": 10**9}]})  # a record of an earlier version
    assert "3.0 s" in capsys.readouterr().out


def test_what_was_measured_is_no_part_of_a_record() -> None:
    facts = {"blocks": [BLOCK], "measured": [{"layer": 0, "seconds": 1.0}, 7], "zero_modules": ["a"]}
    assert recorded(facts) == {"blocks": [BLOCK], "zero_modules": ["a"]}
    assert measured(facts) == ({"layer": 0, "seconds": 1.0},)
    assert measured({"measured": 7}) == measured({}) == ()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products of several threads may differ in their last bits from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("samples", picked([1, 2], 2))
def test_few_windows_are_enough_and_two_runs_write_the_same_record(tmp_path: Path, samples: int) -> None:
    def tune(out: Path) -> dict[str, Any]:
        data = ["--data", str(few("calib.jsonl")), "--samples", str(samples), "--seqlen", "16"]
        args = ["quantize", str(SMALL_MOE), str(out), "--method", "auto-round", *data, "--iters", "1", "--json", "-q"]
        result = CliRunner().invoke(main, [*args, "--dtype", "float32"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        report: dict[str, Any] = json.loads(result.stdout)["report"]
        return report

    report = tune(tmp_path / "a")
    assert [entry["layer"] for entry in report["measured"]] == list(range(BLOCKS))
    assert all(entry["seconds"] > 0 and entry["peak_rss_bytes"] > 0 for entry in report["measured"])
    tune(tmp_path / "b")
    record = (tmp_path / "a/shardxform.json").read_bytes()
    assert record == (tmp_path / "b/shardxform.json").read_bytes()
    blocks = json.loads(record)["facts"]["blocks"]
    assert all(block["judged_on"] == {"windows": 1, "tokens": 15, "held_out": samples > 1} for block in blocks)
    assert all(block["tuned_error"] <= block["rtn_error"] for block in blocks)
    assert all(block["ratio_standard_error"] is None for block in blocks)

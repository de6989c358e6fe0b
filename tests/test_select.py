"""Choosing experts: scores, the cut, super experts, router groups, the manifest, the picture; `select` as a command."""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from build import tiny, write_checkpoint
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from strategies import by_night
from test_manifest import deepseek

from shardxform import __version__
from shardxform.ask.manifest import Manifest, manifest_text
from shardxform.base import computing
from shardxform.cli.select import select_command
from shardxform.errors import CheckpointError, OutputError, PlanError
from shardxform.experts import CRITERIA, ExpertStats, Saliency, choose, decide, keep_of_ratio, super_experts
from shardxform.experts.plotting import plot_choice

PROJECTIONS = ("gate", "up", "down")
MANIFESTS = Path(__file__).parent.parent / "manifests"
PNG = b"\x89PNG\r\n\x1a\n"


def layer(reap: list[float], count: list[int] | None = None, peak: list[float] | None = None) -> ExpertStats:
    """Experts with these mean REAP scores, each reached by 4 tokens unless said otherwise."""
    count_E = np.array([4] * len(reap) if count is None else count, np.int64)
    reap_E = np.array(reap, np.float64) * count_E
    peak_E = np.array([1.0] * len(reap) if peak is None else peak) * (count_E > 0)
    known = {"reap_E": reap_E, "ean_E": 2 * reap_E, "gate_E": count_E * 0.25, "peak_E": peak_E}
    return ExpertStats(
        count_E=count_E, **known, square_E=4 * reap_E, energy_E=3 * reap_E, output_E=5 * reap_E, spread_E=1 + reap_E
    )


def saliency(*layers: ExpertStats, **changes: Any) -> Saliency:
    model = {
        "model_type": "qwen3_moe",
        "num_layers": len(layers),
        "num_experts": layers[0].count_E.size,
        "num_experts_per_tok": 2,
        "num_groups": 1,
        "source_fingerprint": "ab12",
        **changes.pop("model", {}),
    }
    parts = {"mtp_layers": {}, "tokens": 1000, "runs": ({"seed": 0},), **changes}
    return Saliency(model=model, layers=dict(enumerate(layers)), **parts)


# -- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("reap", [1.5, 0.0, 0.5]),
        ("reap-sum", [3.0, 0.0, 2.0]),
        ("ean", [3.0, 0.0, 2.0]),
        ("ean-sum", [6.0, 0.0, 8.0]),
        ("frequency", [2.0, 0.0, 4.0]),
        ("gate-sum", [1.0, 0.0, 0.5]),
        ("peak", [9.0, 0.0, 7.0]),
        ("energy", [5.0, 0.0, 6.0]),
        ("output-energy", [7.0, 0.0, 2.5]),
        ("msan", [4.0, 0.0, 3.0]),
        ("aimer", [1.25, 1.5, 1.0]),
    ],
)
def test_scores(criterion: str, expected: list[float]) -> None:
    stats = ExpertStats(
        count_E=np.array([2, 0, 4]),
        reap_E=np.array([3.0, 0.0, 2.0]),
        ean_E=np.array([6.0, 0.0, 8.0]),
        gate_E=np.array([1.0, 0.0, 0.5]),
        peak_E=np.array([9.0, 0.0, 7.0]),
        square_E=np.array([8.0, 0.0, 12.0]),
        energy_E=np.array([5.0, 0.0, 6.0]),
        output_E=np.array([7.0, 0.0, 2.5]),
        spread_E=np.array([1.25, 1.5, 1.0]),
    )
    score_E = CRITERIA[criterion](stats)
    assert (score_E.dtype, score_E.tolist()) == (np.float64, expected)


def test_every_criterion_is_tested_above() -> None:
    assert len(CRITERIA) == 11


# -- the cut ------------------------------------------------------------------------------------------------------


def test_the_highest_scores_stay_and_ties_go_to_the_lower_id() -> None:
    scored = saliency(layer([1, 3, 2, 3]), layer([0, 0, 0, 0], [0, 0, 0, 0]), layer([5, 1, 1, 1]))
    choice = decide(scored, 2, "reap")
    assert [kept.keep for kept in choice.layers.values()] == [(1, 3), (0, 1), (0, 1)]
    first = choice.layers[0]
    assert (first.last_kept, first.first_pruned) == (3.0, 2.0)
    assert (first.saliency_kept, first.routing_kept) == (6 / 9, 0.5)
    unreached = choice.layers[1]
    assert (unreached.unreached_kept, unreached.unreached_pruned) == (2, 2)
    assert (unreached.saliency_kept, unreached.routing_kept) == (None, None)
    assert (choice.layers[2].last_kept, choice.layers[2].first_pruned) == (1.0, 1.0)


def test_another_criterion_makes_another_choice() -> None:
    scored = saliency(layer([1, 2, 3, 4], [9, 8, 7, 6]))
    assert choose(scored, 2, "reap").keep == {0: (2, 3)}
    assert choose(scored, 2, "frequency").keep == {0: (0, 1)}
    with pytest.raises(PlanError, match=r"criterion: expected one of reap, reap-sum, .*, found 'magnitude'"):
        choose(scored, 2, "magnitude")


def test_the_sum_over_tokens_chooses_unless_another_criterion_is_named() -> None:
    scored = saliency(layer([4, 3, 2, 1], [1, 9, 9, 1]))
    assert choose(scored, 2).keep == choose(scored, 2, "reap-sum").keep == {0: (1, 2)}
    assert choose(scored, 2, "reap").keep == {0: (0, 1)}


def test_mtp_layers_are_chosen_from_as_well() -> None:
    manifest = choose(saliency(layer([1, 2, 3, 4]), mtp_layers={0: layer([4, 3, 2, 1])}), 2)
    assert (manifest.keep, manifest.mtp_keep) == ({0: (2, 3)}, {0: (0, 1)})


def test_all_may_stay() -> None:
    kept = decide(saliency(layer([1, 2, 3, 4])), 4).layers[0]
    assert (kept.keep, kept.first_pruned, kept.saliency_kept) == ((0, 1, 2, 3), None, 1.0)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (5, "`keep`: 5 experts per layer, but saliency has 4"),
        (1, "`keep`: 1 .*picks 2 per token"),
        (-1, "keep at least 2"),
    ],
)
def test_counts_that_no_router_works_with_are_refused(keep: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        choose(saliency(layer([1, 2, 3, 4])), keep)


@pytest.mark.parametrize(
    ("experts", "ratio", "keep"),
    [(256, 0.5, 128), (256, 0.0, 256), (10, 0.3, 7), (100, 0.29, 71), (16, 0.99, 1), (60, 0.45, 33), (256, 0.25, 192)],
)
def test_keep_of_ratio(experts: int, ratio: float, keep: int) -> None:
    assert keep_of_ratio(experts, ratio) == keep


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan"), 50.0])
def test_a_ratio_that_is_no_share_is_refused(ratio: float) -> None:
    with pytest.raises(PlanError, match="`ratio`: expected the share of experts to remove"):
        keep_of_ratio(256, ratio)


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=8, max_size=8), min_size=1, max_size=4),
    st.sampled_from(list(CRITERIA)),
    st.sampled_from([1, 2]),
    st.sampled_from([4, 6, 8]),
)
def test_no_pruned_expert_beats_a_kept_one_of_its_group(
    numbers: list[list[int]], criterion: str, groups: int, keep: int
) -> None:
    scored = saliency(*(layer([n % 3 for n in row], row) for row in numbers), model={"num_groups": groups})
    choice = decide(scored, keep, criterion)
    for number, kept in choice.layers.items():
        score_E = CRITERIA[criterion](scored.layers[number])
        assert len(kept.keep) == keep
        for first in range(0, 8, 8 // groups):
            ids = range(first, first + 8 // groups)
            inside = [expert for expert in ids if expert in kept.keep]
            outside = [expert for expert in ids if expert not in kept.keep]
            assert len(inside) == keep // groups
            assert all((score_E[a], -a) > (score_E[b], -b) for a in inside for b in outside)


@given(st.permutations(range(8)), st.integers(2, 8))
def test_the_choice_follows_the_experts_wherever_they_stand(order: list[int], keep: int) -> None:
    plain = [1.0, 5.0, 2.0, 8.0, 3.0, 0.5, 7.0, 4.0]
    straight = choose(saliency(layer(plain)), keep).keep[0]
    moved = choose(saliency(layer([plain[old] for old in order])), keep).keep[0]
    assert sorted(order[new] for new in moved) == list(straight)


# -- router groups ------------------------------------------------------------------------------------------------


def test_every_router_group_keeps_equally_many() -> None:
    scored = saliency(layer([9, 8, 7, 6, 1, 2, 3, 4]), model={"num_groups": 2})
    choice = decide(scored, 4, "reap")
    assert choice.layers[0].keep == (0, 1, 6, 7)
    assert (choice.layers[0].last_kept, choice.layers[0].first_pruned) == (3.0, 7.0)


def test_groups_that_cannot_keep_equally_many_are_refused() -> None:
    scored = saliency(layer([1] * 16), model={"num_groups": 4})
    with pytest.raises(PlanError, match="has 4 groups that must keep equally many; 8 or 12 would do"):
        choose(scored, 10)
    with pytest.raises(PlanError, match=r"1 expert in each of the 4 router groups, .* keep at least 8"):
        choose(scored, 4)


def test_the_manifest_of_a_grouped_router_fits_its_checkpoint() -> None:
    layout = deepseek()
    random = np.random.default_rng(0)
    scored = saliency(
        layer([0] * 16),
        layer(list(random.random(16))),
        layer(list(random.random(16))),
        mtp_layers={0: layer(list(random.random(16)))},
        model={"model_type": "deepseek_v3", "num_groups": 4, "num_experts_per_tok": 4},
    )
    scored = replace(scored, layers={n: stats for n, stats in scored.layers.items() if n})
    choose(scored, 8).check(layout)


# -- super experts ------------------------------------------------------------------------------------------------


def peaks(*rows: list[float], **changes: Any) -> Saliency:
    """Layers whose experts score by their ids, with these peaks."""
    return saliency(*(layer(list(range(len(row))), peak=row) for row in rows), **changes)


def test_super_experts_stand_out_in_the_first_three_quarters() -> None:
    rows = [[1.0] * 100 for _ in range(4)]
    rows[1][5] = 50.0  # of 400 peaks, the two largest are above the 99.5th percentile
    rows[3][6] = 90.0  # a last layer
    assert super_experts(peaks(*rows)) == {1: (5,)}


def test_a_peak_below_a_tenth_of_the_largest_is_not_super() -> None:
    rows = [[1.0] * 100 for _ in range(4)]
    rows[0][5], rows[2][7] = 50.0, 4.9
    assert super_experts(peaks(*rows)) == {0: (5,)}
    rows[2][7] = 5.1
    assert super_experts(peaks(*rows)) == {0: (5,), 2: (7,)}


def test_a_peak_among_many_large_ones_is_super_above_the_99_5th_percentile() -> None:
    falling = [500.0 - expert for expert in range(400)]  # the percentile lies between the second and the third
    assert super_experts(peaks(*(falling[at : at + 100] for at in range(0, 400, 100)))) == {0: (0, 1)}


def test_experts_that_are_all_alike_or_never_reached_are_not_super() -> None:
    assert super_experts(peaks(*[[2.0] * 8] * 4)) == {}
    assert super_experts(saliency(*[layer([0] * 8, [0] * 8)] * 4)) == {}


def test_a_super_expert_stays_whatever_its_score() -> None:
    rows = [[1.0] * 100 for _ in range(4)]
    rows[1][5] = 50.0
    scored = peaks(*rows)
    assert choose(scored, 4).keep[1] == (96, 97, 98, 99)
    choice = decide(scored, 4, "reap", protect=True)
    assert (choice.layers[1].keep, choice.layers[1].protected) == ((5, 97, 98, 99), (5,))
    assert (choice.layers[1].last_kept, choice.layers[1].first_pruned) == (97.0, 96.0)
    assert choice.layers[0].keep == (96, 97, 98, 99)
    assert choice.manifest().provenance["super_experts"] == {"1": [5]}


def test_more_super_experts_than_are_kept_are_refused() -> None:
    rows = [[1.0] * 400 for _ in range(4)]
    rows[0][:3] = [50.0, 51.0, 52.0]
    with pytest.raises(PlanError, match="layer 0: 3 super experts to protect, but only 2 experts are kept"):
        choose(peaks(*rows), 2, protect=True)
    with pytest.raises(PlanError, match="router group 0 of layer 0: 3 super experts to protect, but only 2"):
        choose(peaks(*rows, model={"num_groups": 4}), 8, protect=True)


# -- the manifest -------------------------------------------------------------------------------------------------


def test_the_manifest_says_where_it_comes_from() -> None:
    scored = saliency(layer([1, 2, 3, 0], [4, 4, 4, 0]), layer([4, 3, 2, 1]), mtp_layers={0: layer([1, 1, 1, 5])})
    value = choose(scored, 2, "reap").to_dict()
    assert value == {
        "format": "shardxform.keep",
        "version": 1,
        "model": dict(scored.model),
        "criterion": "reap",
        "ratio": 0.5,
        "provenance": {
            "tool": f"shardxform {__version__}",
            "tokens": 1000,
            "protect_super_experts": False,
            "layers": {
                "saliency_kept": [0.8333, 0.7],
                "routing_kept": [0.6667, 0.5],
                "never_reached_kept": [0, 0],
                "never_reached_pruned": [1, 0],
            },
            "mtp_layers": {
                "saliency_kept": [0.75],
                "routing_kept": [0.5],
                "never_reached_kept": [0],
                "never_reached_pruned": [0],
            },
            "runs": [{"seed": 0}],
        },
        "keep": {"0": [1, 2], "1": [0, 1]},
        "mtp_keep": {"0": [0, 3]},
    }
    jsonschema.validate(value, json.loads((MANIFESTS / "schema.json").read_text(encoding="utf-8")))


def test_the_text_of_a_manifest_has_one_list_a_line() -> None:
    path = MANIFESTS / "small-moe-keep8.json"
    assert manifest_text(Manifest.load(path)) == path.read_text(encoding="utf-8")


@pytest.mark.oracle
@pytest.mark.slow
@by_night
def test_the_manifest_of_the_quickstart_is_what_score_and_select_make(tmp_path: Path) -> None:
    import torch

    from shardxform.calibration import DataOptions, load_windows
    from shardxform.checkpoint.table import Checkpoint
    from shardxform.experts.scoring import ScoreOptions, score
    from shardxform.forward.weights import Precision

    root = MANIFESTS.parent / "examples" / "small-moe"
    windows = load_windows(root, DataOptions(data=str(root / "text" / "calib.jsonl"), samples=64, seqlen=512))
    options = ScoreOptions(precision=Precision(torch.device("cpu"), torch.float32), work=tmp_path / "work")
    made = choose(score(Checkpoint.open(root), windows, options), 8, "reap")
    kept = Manifest.load(MANIFESTS / "small-moe-keep8.json")
    assert (kept.keep, kept.model, kept.criterion, kept.ratio) == (made.keep, made.model, made.criterion, made.ratio)
    # What computed it is of the machine where the file was made.
    runs = [[computing.without(run) for run in manifest.provenance["runs"]] for manifest in (kept, made)]
    assert all(computing.KEY in run for manifest in (kept, made) for run in manifest.provenance["runs"])
    assert runs[0] == runs[1]


def test_only_lists_of_plain_values_are_one_line() -> None:
    text = manifest_text(Manifest(keep={0: (1, 2)}, provenance={"mixed": [1, [2, 3], {}], "empty": []}))
    assert '    "mixed": [\n      1,\n      [2, 3],\n      {}\n    ],\n    "empty": []\n' in text


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_the_text_of_a_manifest_is_its_json(anything: Any) -> None:
    manifest = Manifest(keep={0: (1, 2), 10: (0, 3)}, provenance={"anything": anything}, criterion="é")
    assert json.loads(manifest_text(manifest)) == manifest.to_dict()


# -- the picture --------------------------------------------------------------------------------------------------


def picture_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(PNG)
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_the_same_choice_gives_the_same_picture() -> None:
    pytest.importorskip("matplotlib")
    scored = saliency(layer([4, 3, 2, 1]), layer([1, 2, 3, 0], [4, 4, 4, 0]), mtp_layers={0: layer([1, 1, 1, 5])})
    one = plot_choice(decide(scored, 2))
    assert picture_size(one) == (1650, 570)
    assert plot_choice(decide(scored, 2)) == one
    assert plot_choice(decide(scored, 3)) != one
    assert b"matplotlib" not in one.lower()


def test_the_users_settings_have_no_say_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    choice = decide(saliency(layer([4, 3, 2, 1])), 2)
    plain = plot_choice(choice)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    assert plot_choice(choice) == plain
    assert matplotlib.rcParams["font.size"] == 30.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "scored",
    [
        saliency(layer([0, 0, 0, 0], [0, 0, 0, 0])),
        saliency(layer([0, 0, 0])),
        saliency(layer([1e-300, 1e250, 0, 1])),
        saliency(*[layer([4, 3, 2, 1])] * 100, mtp_layers={0: layer([4, 3, 2, 1])}),
        saliency(layer([4, 3, 2, 1]), model={"model_type": "$\\frac$ 模型 {" + "x" * 150}),
    ],
    ids=["never reached", "all zero", "wide", "deep", "strange name"],
)
def test_everything_can_be_drawn(scored: Saliency) -> None:
    pytest.importorskip("matplotlib")
    width, height = picture_size(plot_choice(decide(scored, 3)))
    assert width == 1650
    assert 500 < height <= 1800


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    path = tmp_path / "scored"
    first = layer([4, 3, 2, 0], [4, 4, 4, 0])
    saliency(first, layer([1, 2, 0, 0], [4, 4, 0, 0]), mtp_layers={0: layer([1, 1, 1, 5])}).save(path)
    return path


def select(*arguments: object) -> Any:
    return CliRunner().invoke(select_command, [str(argument) for argument in arguments])


def test_select_writes_the_manifest_and_says_what_it_costs(scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "keep.json"
    result = select(scored, "--keep", 3, "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"select {scored} -> {out}",
        "  model    qwen3_moe, top-2",
        "  experts  4 -> 3 per layer, by reap-sum",
        "  tokens   1,000 in 1 run",
        "  layer  saliency kept  routing kept  never reached  last kept  first pruned",
        "  0            100.0 %       100.0 %              1          8             0",
        "  1            100.0 %       100.0 %      2, 1 kept          0             0",
        "  MTP 0         87.5 %        75.0 %              0          4             4",
    ]
    assert result.stderr.splitlines() == [
        "note: kept 1 expert in 1 layer that no token reached, by id and not by worth; score more data",
        "note: pruned 2 experts that no token reached, of which nothing is known",
    ]
    assert out.read_text(encoding="utf-8") == manifest_text(choose(Saliency.load(scored), 3))
    assert Manifest.load(out).keep == {0: (0, 1, 2), 1: (0, 1, 2)}


def test_select_again_changes_nothing_and_another_choice_is_refused(scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "keep.json"
    assert select(scored, "--ratio", 0.5, "-o", out).exit_code == 0
    written = out.read_bytes()
    assert json.loads(written)["ratio"] == 0.5
    assert select(scored, "--ratio", 0.5, "-o", out).exit_code == 0
    refused = select(scored, "--keep", 3, "-o", out)
    assert isinstance(refused.exception, OutputError)
    assert str(refused.exception) == (
        f"{out}: another file is there, and nothing is overwritten; name a file that does not exist yet"
    )
    assert out.read_bytes() == written


def test_the_ratio_that_was_asked_for_is_recorded(scored: Path, tmp_path: Path) -> None:
    assert select(scored, "--ratio", 0.3, "-o", tmp_path / "keep.json").exit_code == 0
    read = Manifest.load(tmp_path / "keep.json")
    assert (read.ratio, read.num_kept) == (0.3, 3)


def test_a_checkpoint_tells_of_its_weights_alone(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    source = write_checkpoint(tmp_path / "source", tensors, config)
    refused = select(source, "--keep", 4, "-o", tmp_path / "k.json")
    assert isinstance(refused.exception, PlanError)
    assert "of which only aimer can be told; give a file of `shardxform score`" in str(refused.exception)
    result = select(source, "--keep", 4, "--criterion", "aimer", "-o", tmp_path / "k.json")
    assert result.exit_code == 0, result.output
    read = Manifest.load(tmp_path / "k.json")
    assert (read.criterion, read.num_kept, len(read.keep)) == ("aimer", 4, config["num_hidden_layers"])
    for layer, keep in read.keep.items():
        spread = []
        for expert in range(config["num_experts"]):
            stem = f"model.layers.{layer}.mlp.experts.{expert}"
            w = np.concatenate([tensors[f"{stem}.{each}_proj.weight"].float32().ravel() for each in PROJECTIONS])
            spread.append(np.sqrt(np.mean(w**2)) / np.mean(np.abs(w)))
        assert keep == tuple(sorted(np.argsort(-np.array(spread), kind="stable")[:4]))


def test_a_saliency_of_text_knows_nothing_of_weights(scored: Path) -> None:
    known = replace(Saliency.load(scored), layers={0: ExpertStats(energy_E=np.arange(4.0))}, mtp_layers={})
    with pytest.raises(PlanError, match=r"`criterion` aimer: .* only energy; .* give the checkpoint itself"):
        choose(known, 2, "aimer")
    with pytest.raises(PlanError, match=r"`protect`: .* has no peaks"):
        choose(known, 2, "energy", protect=True)
    assert choose(known, 2, "energy").keep == {0: (2, 3)}


def test_a_dry_run_writes_nothing(scored: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = select(scored, "--keep", 2, "-o", tmp_path / "k.json", "--plot", tmp_path / "p.png", "--dry-run")
    assert result.stdout.startswith(f"select {scored}  (dry run: nothing is written)\n")
    assert sorted(tmp_path.iterdir()) == before
    assert select(scored, "--keep", 2, "--dry-run").exit_code == 0


def test_select_prints_json(scored: Path, tmp_path: Path) -> None:
    out = tmp_path / "keep.json"
    value = json.loads(select(scored, "--keep", 2, "-o", out, "--criterion", "peak", "--json").stdout)
    assert (value["manifest"], value["kept"], value["experts"]) == (str(out), 2, 4)
    assert (value["criterion"], value["ratio"], value["super_experts"]) == ("peak", 0.5, {})
    assert value["layers"]["1"] == {
        "saliency_kept": 1.0,
        "routing_kept": 1.0,
        "never_reached_kept": 0,
        "never_reached_pruned": 2,
        "last_kept": 1.0,
        "first_pruned": 0.0,
    }


def test_protected_experts_are_named(tmp_path: Path) -> None:
    rows = [[1.0] * 100 for _ in range(4)]
    rows[1][5] = 50.0
    peaks(*rows).save(tmp_path / "s")
    shown = select(tmp_path / "s", "--keep", 4, "--protect-super-experts", "--dry-run").stdout
    assert "  super    layer 1: 5\n" in shown
    assert "super" not in select(tmp_path / "s", "--keep", 4, "--dry-run").stdout


def test_select_draws(scored: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "keep.json", tmp_path / "p.png"
    assert select(scored, "--keep", 2, "-o", out, "--plot", png).exit_code == 0
    assert png.read_bytes() == plot_choice(decide(Saliency.load(scored), 2))
    assert select(scored, "--keep", 2, "-o", out, "--plot", png).exit_code == 0


def test_nothing_is_written_when_one_of_two_files_is_refused(scored: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "p.png"
    png.write_bytes(b"holiday")
    result = select(scored, "--keep", 2, "-o", tmp_path / "keep.json", "--plot", png)
    assert str(result.exception).startswith(f"{png}: another picture is there")
    assert not (tmp_path / "keep.json").exists()
    assert png.read_bytes() == b"holiday"


def test_a_picture_needs_matplotlib_and_a_name(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "keep.json"
    result = select(scored, "--keep", 2, "-o", out, "--plot", tmp_path / "p.pdf")
    assert str(result.exception) == f"{tmp_path}/p.pdf: expected a name that ends in .png"
    result = select(scored, "--keep", 2, "-o", tmp_path / "x.png", "--plot", tmp_path / "x.png")
    assert isinstance(result.exception, OutputError)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = select(scored, "--keep", 2, "-o", out, "--plot", tmp_path / "p.png")
    assert isinstance(result.exception, PlanError)
    assert str(result.exception) == "`plot` needs matplotlib: pip install 'shardxform[plot]'"
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [(), ("--keep", 2), ("-o", "x"), ("--keep", 2, "--ratio", 0.5, "-o", "x"), ("--keep", 0, "-o", "x")],
)
def test_what_select_cannot_do_without_is_asked_for(arguments: tuple[object, ...], scored: Path) -> None:
    result = select(scored, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage:")


def test_a_file_that_is_no_saliency_file_is_refused(tmp_path: Path) -> None:
    result = select(MANIFESTS / "small-moe-keep8.json", "--keep", 2, "-o", tmp_path / "keep.json")
    assert isinstance(result.exception, CheckpointError)
    assert not (tmp_path / "keep.json").exists()

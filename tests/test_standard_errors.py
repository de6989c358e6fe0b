"""Standard errors of figures: formulas by literals, and against resampling and simulation, which know no formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shardxform.base.standard_errors import Sampling, mean, standard_error


def apart(count: int) -> Sampling:
    return Sampling((range(count),), joined=False)


def joined(count: int) -> Sampling:
    return Sampling((range(count),), joined=True)


def test_windows_of_one_length_have_the_error_of_a_mean() -> None:
    sums, counts = [1.0, 2.0, 3.0, 6.0], [10.0] * 4
    assert mean(sums, counts) == 0.3
    # deviations of the windows' means 0.1, 0.2, 0.3, 0.6: squares 0.04 + 0.01 + 0 + 0.09; 0.14 / 3 / 4
    assert standard_error(sums, counts, apart(4)) == pytest.approx(math.sqrt(0.14 / 12))


def test_windows_of_other_lengths_count_by_their_residuals() -> None:
    sums, counts = [3.0, 1.0, 8.0], [2.0, 2.0, 4.0]
    # mean 1.5; residuals 0, -2, 2; 3 / 2 * 8 / 8^2
    assert mean(sums, counts) == 1.5
    assert standard_error(sums, counts, apart(3)) == pytest.approx(math.sqrt(1.5 * 8) / 8)


def test_neighbours_that_go_together_make_the_error_larger() -> None:
    sums, counts = [1.0, 1.0, 0.0, -1.0, -1.0], [1.0] * 5
    # lag floor(4 * 0.05^(2/9)) = 2: 4 + 2 * (2/3 * (1 + 0 + 0 + 1) + 1/3 * (0 - 1 + 0)) = 6; 5 / 4 * 6 / 5^2
    assert standard_error(sums, counts, joined(5)) == pytest.approx(math.sqrt(5 / 4 * 6) / 5)
    assert standard_error(sums, counts, apart(5)) == pytest.approx(math.sqrt(5 / 4 * 4) / 5)


def test_neighbours_that_take_turns_do_not_make_it_smaller() -> None:
    sums, counts = [1.0, -1.0] * 8, [1.0] * 16
    assert standard_error(sums, counts, joined(16)) == standard_error(sums, counts, apart(16))


def test_how_far_sources_are_apart_is_no_error() -> None:
    sums, counts = [1.0, 3.0, 101.0, 105.0], [1.0] * 4
    strata = Sampling((range(2), range(2, 4)), joined=False)
    # within: deviations 1, 1 and 2, 2; each stratum n / (n - 1) = 2: 2 * 2 + 2 * 8 = 20
    assert standard_error(sums, counts, strata) == pytest.approx(math.sqrt(20) / 4)
    assert standard_error(sums, counts, apart(4)) > 20


@pytest.mark.parametrize("sampling", [apart, joined])
def test_of_a_single_window_nothing_is_known(sampling: Callable[[int], Sampling]) -> None:
    assert math.isnan(standard_error([1.0], [2.0], sampling(1)))
    assert standard_error([1.0, 3.0], [1.0, 1.0], sampling(2)) == 1.0
    assert math.isnan(standard_error([1.0, 2.0, 3.0], [1.0] * 3, Sampling((range(2), range(2, 3)), joined=True)))


def test_what_is_the_same_in_all_windows_has_no_error() -> None:
    assert standard_error([0.0] * 9, [7.0] * 9, joined(9)) == 0.0


# -- against what knows no formula ------------------------------------------------------------------------------------


def losses(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of two models on windows of different lengths, and their positions; most of what varies is common."""
    random = np.random.default_rng(seed)
    counts = random.integers(40, 120, count).astype(float)
    common = random.normal(3.0, 0.6, count)
    reference = counts * (common + random.normal(0, 0.02, count))
    tested = counts * (common + 0.05 + random.normal(0, 0.02, count))
    return tested, reference, counts


def bootstrap(figure: Callable[[np.ndarray], float], count: int, turns: int = 4000) -> float:
    random = np.random.default_rng(1)
    return float(np.std([figure(random.integers(0, count, count)) for _ in range(turns)]))


def jackknife(figure: Callable[[np.ndarray], float], count: int) -> float:
    left_out = np.array([figure(np.delete(np.arange(count), n)) for n in range(count)])
    return float(np.sqrt((count - 1) * np.var(left_out)))


def test_a_ratio_of_perplexities_varies_as_its_resamples_do() -> None:
    """The delta method of paired differences, against both models' perplexities of windows drawn anew."""
    tested, reference, counts = losses(200)

    def ratio(rows: Any) -> float:
        a, b = (math.exp(x[rows].sum() / counts[rows].sum()) for x in (tested, reference))
        return a / b

    found = ratio(slice(None)) * standard_error(list(tested - reference), list(counts), apart(200))
    assert found == pytest.approx(bootstrap(ratio, 200), rel=0.08)
    assert found == pytest.approx(jackknife(ratio, 200), rel=0.02)
    assert found < 0.1 * standard_error(list(tested), list(counts), apart(200))  # unpaired, it would drown


def test_a_mean_over_windows_of_other_lengths_varies_as_its_resamples_do() -> None:
    tested, _, counts = losses(150, seed=2)
    agree = counts * np.random.default_rng(3).uniform(0.7, 1.0, 150)
    for sums in (tested, agree):

        def figure(rows: Any, sums: np.ndarray = sums) -> float:
            return float(sums[rows].sum() / counts[rows].sum())

        found = standard_error(list(sums), list(counts), apart(150))
        assert found == pytest.approx(bootstrap(figure, 150), rel=0.08)
        assert found == pytest.approx(jackknife(figure, 150), rel=0.02)


def series(count: int, turns: int, hold: float) -> np.ndarray:
    """[turns, count]: each value keeps a share of the one before."""
    noise = np.random.default_rng(4).standard_normal((turns, count))
    out = np.empty_like(noise)
    out[:, 0] = noise[:, 0]
    for n in range(1, count):
        out[:, n] = hold * out[:, n - 1] + math.sqrt(1 - hold * hold) * noise[:, n]
    return out


@pytest.mark.parametrize(("hold", "least", "most"), [(0.0, 0.95, 1.15), (0.4, 0.8, 1.05), (0.6, 0.7, 1.0)])
def test_windows_of_one_stream_err_about_as_much_as_they_say(hold: float, least: float, most: float) -> None:
    """Simulated 500 times: the mean square of what is said against the variance of the means themselves.

    Independent windows would say 1, 0.65 and 0.5 of it.
    """
    drawn = series(128, 500, hold)
    truth = float(np.std(drawn.mean(1)))
    told = math.sqrt(np.mean([standard_error(list(row), [1.0] * 128, joined(128)) ** 2 for row in drawn]))
    naive = math.sqrt(np.mean([standard_error(list(row), [1.0] * 128, apart(128)) ** 2 for row in drawn]))
    assert least < told / truth < most
    assert told >= naive


# -- an evaluation ----------------------------------------------------------------------------------------------------


def test_every_figure_of_an_evaluation_has_the_error_of_its_windows() -> None:
    """Sums of windows as the heads give them; errors against a jackknife of the figures themselves."""
    pytest.importorskip("torch")
    from shardxform.evaluation import evaluate

    count, random = 60, np.random.default_rng(5)
    tested, reference, predicted = losses(count, seed=5)
    positions = predicted + 1
    columns = {
        "loss tested": tested,
        "loss reference": reference,
        "kl": positions * random.gamma(2.0, 0.01, count),
        "agree": np.floor(positions * random.uniform(0.8, 1.0, count)),
        "positions": positions,
    }

    def figures(rows: Any) -> np.ndarray:
        sums = {name: column[rows].sum() for name, column in columns.items()}
        ours, theirs = (math.exp(sums[f"loss {name}"] / predicted[rows].sum()) for name in ("tested", "reference"))
        shares = (sums[name] / sums["positions"] for name in ("kl", "agree"))
        return np.array([ours, theirs, ours / theirs, *shares])

    def found(windows: Any) -> Any:
        cuts = range(0, count, 7)
        batches = [{name: column[at : at + 7].tolist() for name, column in columns.items()} for at in cuts]
        return evaluate._evaluation(windows, [], batches)

    whole = found(windows_of(count, pack=False))
    against = whole.against
    told = (whole.perplexity, against.perplexity, whole.ratio, against.kl, against.top1)
    assert told == pytest.approx(figures(slice(None)), rel=1e-12)
    errors = (whole.perplexity_error, against.perplexity_error, against.ratio_error)
    errors = (*errors, against.kl_error, against.top1_error)
    for n, error in enumerate(errors):
        assert error == pytest.approx(jackknife(lambda rows, n=n: figures(rows)[n], count), rel=0.03)
    facts = evaluate.evaluation_facts(whole, windows_of(count, pack=False))
    assert facts["perplexity_standard_error"] == errors[0]
    compared = facts["against"]
    assert compared["perplexity_ratio"] == whole.ratio
    names = ("perplexity", "perplexity_ratio", "kl", "top1")
    assert tuple(compared[f"{name}_standard_error"] for name in names) == errors[1:]
    apart = found(windows_of(count, pack=False, rows=(("a", range(20)), ("b", range(20, 60)))))
    parts = {name: each.against for name, each in apart.sources.items()}
    share = {name: positions[rows].sum() / positions.sum() for name, rows in (("a", slice(20)), ("b", slice(20, 60)))}
    together = math.sqrt(sum((share[name] * part.kl_error) ** 2 for name, part in parts.items()))
    assert apart.against.kl_error == pytest.approx(together, rel=0.02)


def windows_of(count: int, *, pack: bool, rows: tuple[tuple[str, range], ...] = ()) -> Any:
    from shardxform.calibration import Windows

    ids_NT = np.zeros((count, 2), np.int32)
    provenance = {"pack": pack}
    return Windows(ids_NT=ids_NT, fingerprint="", provenance=provenance, notes=(), rows=rows)

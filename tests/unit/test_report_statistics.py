"""Numbers of the report against independent references."""

from __future__ import annotations

import math
import statistics
from itertools import combinations, product

import numpy as np
import pytest

from powerflow_lit.metrics.bootstrap import bootstrap
from powerflow_lit.reporting.files import Scores
from powerflow_lit.reporting.statistics import (
    band,
    correct_counts,
    deviation,
    mean,
    over_seeds,
    pass_at_k,
    running_mean,
)


def scores(prompts: str, **columns: list[float]) -> Scores:
    return Scores(tuple(prompts), tuple(columns), np.array(list(columns.values())).T)


def test_an_interval_over_many_problems_is_the_normal_one() -> None:
    values = np.random.default_rng(7).exponential(size=(400, 1))
    low, high = bootstrap(values, draws=20_000, level=0.95, seed=0)[0]
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_an_interval_over_three_problems_is_that_of_all_27_resamples() -> None:
    problems = [0.0, 0.4, 1.0]
    resamples = [sum(r) / 3 for r in product(problems, repeat=3)]
    low, high = bootstrap(np.array([problems]).T, draws=200_000, level=0.8, seed=1)[0]
    assert low == pytest.approx(np.percentile(resamples, 10), abs=1e-9)
    assert high == pytest.approx(np.percentile(resamples, 90), abs=1e-9)


def test_intervals_are_the_same_every_time_and_narrow_with_the_level() -> None:
    values = np.random.default_rng(3).random((50, 2))
    one = bootstrap(values, draws=500, level=0.95, seed=0)
    assert np.array_equal(one, bootstrap(values, draws=500, level=0.95, seed=0))
    assert not np.array_equal(one, bootstrap(values, draws=500, level=0.95, seed=1))
    half = bootstrap(values, draws=500, level=0.5, seed=0)
    assert np.all(np.diff(half) < 0.6 * np.diff(one))


def test_a_problem_without_a_figure_has_no_weight_and_one_problem_no_interval() -> None:
    values = np.array([[0.2, 1.0], [np.nan, 1.0], [0.2, np.nan], [0.2, np.nan]])
    values[1:, 1] = np.nan
    interval = bootstrap(values, draws=300, level=0.95, seed=0)
    assert interval[0] == pytest.approx([0.2, 0.2])
    assert np.isnan(interval[1]).all()


def test_seeds_are_averaged_problem_by_problem_whatever_their_order() -> None:
    together = over_seeds([scores("abc", x=[0, 1, 5], y=[9, 9, 9]), scores("cba", x=[7, 3, 2])])
    assert together is not None
    assert together.prompts == ("a", "b", "c")
    assert together.names == ("x",)
    assert together.column("x").tolist() == [1.0, 2.0, 6.0]
    assert over_seeds([scores("a", x=[1]), scores("b", x=[1])]) is None


@pytest.mark.parametrize("n", [1, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int) -> None:
    for correct in range(n + 1):
        samples = [True] * correct + [False] * (n - correct)
        (curve,) = pass_at_k(np.array([correct]), n)
        for k in range(1, n + 1):
            subsets = list(combinations(samples, k))
            assert curve[k - 1] == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_counts_come_back_from_shares_and_other_shares_are_refused() -> None:
    shares = np.array([0.0, 0.3125, 1.0])
    assert correct_counts(shares, 16).tolist() == [0, 5, 16]
    for wrong in (0.33, 1.0625, float("nan")):
        with pytest.raises(ValueError, match="no multiple"):
            correct_counts(np.array([0.5, wrong]), 16)


def test_mean_and_deviation_are_the_standard_library_s() -> None:
    values = [0.2, 0.9, 0.4, 0.4]
    assert mean(values) == pytest.approx(statistics.fmean(values))
    assert deviation(values) == pytest.approx(statistics.stdev(values))
    assert math.isnan(deviation([1.0]))
    assert math.isnan(mean([]))


def test_a_band_holds_where_all_runs_have_a_value() -> None:
    refills, means, least, greatest = band([{0: 1, 1: 2, 2: 9}, {0: 3, 2: 1, 4: 5}, {}])
    assert (refills, means, least, greatest) == ([0, 2], [2, 5], [1, 1], [3, 9])
    assert band([]) == ([], [], [], [])


def test_smoothing_keeps_a_line_and_a_constant_and_halves_a_zigzag() -> None:
    assert running_mean([1, 2, 3, 4], 1) == [1, 2, 3, 4]
    assert running_mean([1, 2, 3, 4], 3)[1:3] == [2, 3]
    assert running_mean([5, 5, 5], 3) == [5, 5, 5]
    assert max(running_mean([0, 3, 0, 3, 0, 3, 0], 3)[1:-1]) == 2

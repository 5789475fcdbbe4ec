"""Dual ascent: where it ends, how it keeps its bounds, and what it remembers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from powerflow_lit.dual import Ascent, Dual, State


def ascent(**changes: Any) -> Ascent:
    settings = {"rate": 0.2, "gain": 0.0, "smoothing": 0.0, "low": -math.inf, "high": math.inf}
    return Ascent(**{**settings, **changes})


def led(dual: Dual, gap_at: Callable[[float], float], refills: int, lag: float) -> list[float]:
    """Gaps of a plant that follows the multiplier over `lag` refills, one a refill."""
    level, gaps = dual.value, []
    for _ in range(refills):
        level += (dual.value - level) / lag
        gaps.append(gap_at(level))
        dual.step(gaps[-1])
    return gaps


def test_without_a_lag_it_ends_where_the_gap_is_zero() -> None:
    dual = Dual(ascent(), start=0.0)
    led(dual, lambda level: 3.0 - level**2, 100, lag=1.0)
    assert dual.value == pytest.approx(math.sqrt(3.0), abs=1e-6)


def test_a_gain_beside_the_sum_takes_the_overshoot_out_of_a_lagging_plant() -> None:
    """A sum alone at this rate swings; how far is known in closed form for this linear plant.

    level' = (x - level) / 20, x' = 0.05 (1 - level): damping 1 / (2 sqrt(20 * 0.05)) = 0.5, for
    which the overshoot is exp(-pi 0.5 / sqrt(0.75)) = 16%.
    """
    summed = led(Dual(ascent(rate=0.05), start=0.0), lambda x: 1.0 - x, 300, lag=20.0)
    assert -min(summed) == pytest.approx(0.163, abs=0.02)
    damped = led(Dual(ascent(rate=0.05, gain=1.0), start=0.0), lambda x: 1.0 - x, 300, lag=20.0)
    assert -min(damped) < 0.01
    assert abs(damped[80]) < 0.05 < abs(summed[80])


def test_a_value_stays_within_its_bounds_and_leaves_them_as_soon_as_the_gap_turns() -> None:
    dual = Dual(ascent(rate=0.5, high=2.0), start=0.0)
    for _ in range(50):
        dual.step(1.0)
        assert dual.value <= 2.0
    assert dual.value == 2.0
    assert dual.state.at_bound >= 40
    dual.step(-0.1)
    assert dual.value == pytest.approx(1.95), "nothing was wound up beyond the bound"
    assert dual.state.at_bound == 0


def test_a_gap_that_the_gain_alone_drives_to_the_bound_is_not_summed_up() -> None:
    dual = Dual(ascent(rate=0.1, gain=5.0, high=2.0), start=1.0)
    for _ in range(30):
        dual.step(1.0)
    assert dual.value == 2.0
    dual.step(0.0)
    assert dual.value == pytest.approx(1.0)


def test_the_lower_bound_is_the_mirror_of_the_upper_one() -> None:
    up = Dual(ascent(rate=0.3, gain=1.0, smoothing=0.4, high=1.5), start=0.5)
    down = Dual(ascent(rate=0.3, gain=1.0, smoothing=0.4, low=-1.5), start=-0.5)
    for gap in (0.2, 1.0, 1.0, 1.0, -0.3, -0.1, 0.4, 2.0):
        up.step(gap)
        down.step(-gap)
        assert down.value == pytest.approx(-up.value, abs=1e-12)
        assert down.state.at_bound == up.state.at_bound


def test_smoothing_is_a_moving_average_that_begins_with_the_first_gap() -> None:
    dual = Dual(ascent(rate=1.0, smoothing=0.75), start=0.0)
    dual.step(4.0)
    assert dual.value == 4.0
    dual.step(0.0)
    assert dual.value == 4.0 + 3.0


def test_a_gap_is_cut_after_it_was_smoothed_so_that_skewed_noise_leaves_no_bias() -> None:
    """Nine gaps of 0.1 and one of -0.9 have mean 0; each cut at 0.2 alone they would not."""
    dual = Dual(ascent(rate=0.1, smoothing=0.95, largest=0.2), start=0.0)
    for _ in range(400):
        for gap in [0.1] * 9 + [-0.9]:
            dual.step(gap)
    drift = dual.value
    for _ in range(100):
        for gap in [0.1] * 9 + [-0.9]:
            dual.step(gap)
    assert dual.value == pytest.approx(drift, abs=1e-6)
    far = Dual(ascent(rate=0.1, gain=1.0, largest=0.2), start=0.0)
    far.step(5.0)
    assert far.value == pytest.approx(0.1 * 0.2 + 0.2)


def test_a_prompt_begins_where_all_stood_and_then_goes_its_own_way() -> None:
    dual = Dual(ascent(rate=1.0), start=0.0)
    dual.step(0.5, {7: 1.0, 8: 0.0})
    assert (dual.value, dual.value_of(7), dual.value_of(8)) == (0.5, 1.0, 0.0)
    assert dual.value_of(9) == 0.5, "never seen: that of all"
    dual.step(0.5, {7: -0.25, 9: 0.25})
    assert (dual.value, dual.value_of(7), dual.value_of(8)) == (1.0, 0.75, 0.0)
    assert dual.value_of(9) == 0.75
    assert sorted(dual.values) == [0.0, 0.75, 0.75]


def test_its_state_is_plain_and_a_copy_goes_on_bit_by_bit() -> None:
    chosen = ascent(rate=0.3, gain=0.7, smoothing=0.6, low=-1.0, high=1.2)
    whole, half = Dual(chosen, start=0.1), Dual(chosen, start=0.1)
    steps = [(0.1 * k - 0.3, {k % 3: 0.17 * k}) for k in range(12)]
    for gap, gaps in steps:
        whole.step(gap, gaps)
    for gap, gaps in steps[:5]:
        half.step(gap, gaps)
    resumed = Dual(chosen, start=0.9)
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    for gap, gaps in steps[5:]:
        resumed.step(gap, gaps)
    assert resumed.state == whole.state
    assert resumed.of_prompt == whole.of_prompt
    assert all(isinstance(state, State) for state in resumed.of_prompt.values())

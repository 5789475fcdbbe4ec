"""Importance weights: bounded, detached, exact, and safe where the ratio itself would overflow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powerflow_lit.objectives import ImportanceWeight, LossInputs, powerflow
from powerflow_lit.objectives.weights import weight_metrics
from tests.reference import Ragged, assert_near, padded, random_batch, weight_of

ROUNDING = 1e-12
LOG_RATIO = st.floats(-800.0, 800.0)  # nats per token, far beyond exp's range when summed
KINDS = ("seq_sum", "seq_geo", "token")


def inputs_with(log_ratios: list[list[float]]) -> LossInputs:
    """log pi_theta - log pi_old per token, given; rows may differ in length."""
    n, width = len(log_ratios), max(map(len, log_ratios)) + 1
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in log_ratios])
    log_pf = torch.full((n, width), math.nan, dtype=torch.float64)
    log_pf[mask] = torch.tensor([x for row in log_ratios for x in row], dtype=torch.float64)
    zeros = torch.zeros(n, width, dtype=torch.float64)
    return LossInputs(
        log_pf=log_pf.requires_grad_(),
        log_p_base=zeros,
        log_p_old=zeros,
        mask=mask,
        log_z=torch.zeros(n, dtype=torch.float64),
        format_penalty=torch.zeros(n, dtype=torch.float64),
        prompt_index=torch.zeros(n, dtype=torch.long),
    )


ROWS = st.lists(st.lists(LOG_RATIO, min_size=1, max_size=5), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, low=st.floats(0.001, 0.999), high=st.floats(0.001, 5.0))
@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_within_the_clip_range_and_carry_no_gradient(
    kind: str, rows: list[list[float]], low: float, high: float
) -> None:
    weights = ImportanceWeight(kind, low, high)(inputs_with(rows))
    assert not weights.value.requires_grad
    assert float(weights.value.min()) >= 1.0 - low - ROUNDING
    assert float(weights.value.max()) <= 1.0 + high + ROUNDING * (1.0 + high)
    assert ((weights.clipped >= 0.0) & (weights.clipped <= 1.0)).all()


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, epsilon=st.floats(0.01, 0.9))
def test_every_logged_weight_metric_is_finite_and_ess_is_a_share(
    rows: list[list[float]], epsilon: float
) -> None:
    weights = ImportanceWeight("seq_sum", epsilon, epsilon)(inputs_with(rows))
    metrics = {name: float(value) for name, value in weight_metrics(weights).items()}
    assert all(map(math.isfinite, metrics.values())), metrics
    assert 1.0 / len(rows) - 1e-9 <= metrics["ess"] <= 1.0 + 1e-9
    low, mean, high = (metrics[f"is_weight_{name}"] for name in ("min", "mean", "max"))
    assert 1.0 - epsilon - ROUNDING <= low <= mean + ROUNDING
    assert mean - ROUNDING <= high <= 1.0 + epsilon + ROUNDING
    quantiles = [metrics[f"is_log_ratio_q{q}"] for q in ("05", "50", "95")]
    assert quantiles == sorted(quantiles)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-0.3, 0.3), min_size=1, max_size=5), min_size=1, max_size=6),
    low=st.one_of(st.none(), st.floats(0.05, 0.9)),
    high=st.one_of(st.none(), st.floats(0.05, 0.9)),
)
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_weights_equal_the_plain_clip_of_the_plain_ratio(
    kind: str, rows: list[list[float]], low: float | None, high: float | None
) -> None:
    zeros = [[0.0] * len(row) for row in rows]
    n = len(rows)
    batch = Ragged(rows, zeros, zeros, log_z=[0.0] * n, psi=[0.0] * n, prompt=[0] * n)
    weights = ImportanceWeight(kind, low, high)(inputs_with(rows))
    expected = [weight_of(kind, low, high)(batch, i) for i in range(len(rows))]
    assert_near(weights.value, [w.value for w in expected], 1e-12)
    assert_near(weights.log_ratio, [w.log_ratio for w in expected], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_each_side_is_clipped_on_its_own_and_null_leaves_it_open(kind: str) -> None:
    rows = inputs_with([[-1.0], [-0.1], [0.1], [1.0]])
    below, above = math.exp(-1.0), math.exp(1.0)
    near = [math.exp(-0.1), math.exp(0.1)]
    both = ImportanceWeight(kind, 0.2, 0.28)(rows)
    assert_near(both.value, [0.8, *near, 1.28], 1e-12)
    assert both.clipped.tolist() == [1.0, 0.0, 0.0, 1.0]
    truncated = ImportanceWeight(kind, None, 0.28)(rows)
    assert_near(truncated.value, [below, *near, 1.28], 1e-12)
    assert truncated.clipped.tolist() == [0.0, 0.0, 0.0, 1.0]
    floored = ImportanceWeight(kind, 0.2, None)(rows)
    assert_near(floored.value, [0.8, *near, above], 1e-12)
    free = ImportanceWeight(kind, None, None)(rows)
    assert_near(free.value, [below, *near, above], 1e-12)
    assert free.clipped.tolist() == [0.0] * 4


def test_the_sequence_weight_multiplies_tokens_and_the_geometric_one_averages_them() -> None:
    rows = inputs_with([[0.1, 0.2, 0.3], [0.1]])
    assert_near(
        ImportanceWeight("seq_sum", None, None)(rows).value, [math.exp(0.6), math.exp(0.1)], 1e-12
    )
    assert_near(
        ImportanceWeight("seq_geo", None, None)(rows).value, [math.exp(0.2), math.exp(0.1)], 1e-12
    )
    tokens = (math.exp(0.1) + math.exp(0.2) + 1.28) / 3
    weights = ImportanceWeight("token", 0.2, 0.28)(rows)
    assert_near(weights.value, [tokens, math.exp(0.1)], 1e-12)
    assert_near(weights.clipped, [1.0 / 3.0, 0.0], 1e-12)


def test_the_summed_ratio_of_a_long_response_saturates_where_the_geometric_does_not() -> None:
    """1e-3 nats a token over 1,000 tokens is a factor e (the paper's eq. 10, off-policy)."""
    rows = inputs_with([[1e-3] * 1000, [-1e-3] * 1000])
    assert_near(ImportanceWeight("seq_sum", 0.2, 0.2)(rows).value, [1.2, 0.8], 1e-12)
    assert_near(
        ImportanceWeight("seq_geo", 0.2, 0.2)(rows).value,
        [math.exp(1e-3), math.exp(-1e-3)],
        1e-12,
    )


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_on_policy_every_weight_is_exactly_one_and_nothing_is_clipped(kind: str) -> None:
    inputs = padded(random_batch(3), filler="nan")
    weights = ImportanceWeight(kind, 0.2, 0.2)(replace(inputs, log_p_old=inputs.log_pf.detach()))
    assert torch.equal(weights.value, torch.ones(12, dtype=torch.float64))
    metrics = weight_metrics(weights)
    assert float(metrics["is_clip_frac"]) == 0.0
    assert float(metrics["ess"]) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_weight_does_not_read_the_padding(kind: str) -> None:
    noise, nan = (padded(random_batch(3), filler=f) for f in ("noise", "nan"))
    weight = ImportanceWeight(kind, 0.2, 0.2)
    assert torch.equal(weight(noise).value, weight(nan).value)


def test_ess_falls_to_one_in_n_where_one_trajectory_dominates() -> None:
    weights = ImportanceWeight("seq_sum", 0.2, 0.2)(inputs_with([[900.0], [0.0], [0.0], [-900.0]]))
    assert float(weight_metrics(weights)["ess"]) == pytest.approx(0.25, abs=1e-12)


def test_ess_is_that_of_the_raw_ratios_not_of_the_clipped_ones() -> None:
    weights = ImportanceWeight("seq_sum", 0.2, 0.2)(inputs_with([[1.0], [-1.0]]))
    a, b = math.exp(1.0), math.exp(-1.0)
    expected = (a + b) ** 2 / (2 * (a * a + b * b))
    assert float(weight_metrics(weights)["ess"]) == pytest.approx(expected, abs=1e-12)


def test_the_weight_scales_the_gradient_without_taking_part_in_it() -> None:
    """d loss / d log_pf = 2 w d / (N L): the derivative of w is absent, clipped or not."""
    inputs = padded(random_batch(3))
    output = powerflow(inputs, alpha=2.0, epsilon=0.2)
    (gradient,) = torch.autograd.grad(output.loss, inputs.log_pf)
    w = ImportanceWeight("seq_sum", 0.2, 0.2)(inputs)
    assert (w.clipped == 0.0).any()
    assert (w.clipped == 1.0).any()
    per_row = 2.0 * w.value * output.residual / (12 * inputs.mask.sum(1))
    expected = torch.where(inputs.mask, per_row[:, None], 0.0)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-12)

"""Every objective equals the plain-Python reference: loss, gradients, residuals and metrics."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from powerflow_lit.objectives import (
    BalanceObjective,
    ImportanceWeight,
    LossInputs,
    LossOutput,
    PolicyGradientObjective,
    la_tb,
    la_tb_mismatch,
    powerflow,
    rl_token,
    rl_traj,
    tb_token,
    tb_token_mismatch,
    tb_traj,
    tb_traj_mismatch,
    token_variance,
)
from tests.reference import (
    FILLERS,
    Filler,
    Objective,
    Reference,
    assert_loss_and_gradient,
    assert_metrics,
    assert_near,
    gradients,
    la_tb_reference,
    padded,
    per_token_reference,
    policy_gradient_reference,
    powerflow_reference,
    random_batch,
    reference_gradients,
    reference_loss,
    reference_metrics,
    tb_token_reference,
    tb_traj_reference,
    weight_of,
)

EPSILON = 0.2
SCALE = 3.7  # tokens
NONE = ImportanceWeight("none", None, None)
SEQUENCE = ImportanceWeight("seq_sum", EPSILON, 0.28)

Case = tuple[Objective, Reference]


def balance_cases(alpha: float) -> dict[str, Case]:
    cases: dict[str, Case] = {
        "powerflow": (
            partial(powerflow, alpha=alpha, epsilon=EPSILON),
            powerflow_reference(alpha, EPSILON),
        ),
        "la_tb": (partial(la_tb, alpha=alpha), la_tb_reference(alpha)),
        "tb_traj": (partial(tb_traj, alpha=alpha), tb_traj_reference(alpha)),
        "tb_traj assembled": (
            partial(BalanceObjective(tb_traj_mismatch, NONE), alpha=alpha),
            tb_traj_reference(alpha),
        ),
        "tb_token per_token": (
            partial(tb_token, alpha=alpha, scale=SCALE, reading="per_token"),
            per_token_reference(alpha),
        ),
        "tb_token per_token assembled": (
            partial(BalanceObjective(la_tb_mismatch, SEQUENCE, token_variance), alpha=alpha),
            per_token_reference(alpha, weight_of("seq_sum", EPSILON, 0.28)),
        ),
    }
    for reading in ("energy", "power"):
        reference = tb_token_reference(alpha, SCALE, reading)
        mismatch = partial(tb_token_mismatch, reading=reading)
        cases[f"tb_token {reading}"] = (
            partial(tb_token, alpha=alpha, scale=SCALE, reading=reading),
            reference,
        )
        cases[f"tb_token {reading} assembled"] = (
            partial(BalanceObjective(mismatch, NONE), alpha=alpha, scale=SCALE),
            reference,
        )
    for kind, low, high in (
        ("seq_sum", None, None),
        ("seq_sum", None, 0.1),
        ("seq_geo", 0.05, 0.1),
        ("token", 0.2, 0.28),
    ):
        weighted = BalanceObjective(la_tb_mismatch, ImportanceWeight(kind, low, high))
        cases[f"la_tb {kind} {low} {high}"] = (
            partial(weighted, alpha=alpha),
            la_tb_reference(alpha, weight_of(kind, low, high)),
        )
    return cases


def rl_cases(alpha: float) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for energy, kl, advantage, reduction in itertools.product(
        ("traj", "token"),
        ("in_reward", "k3_loss"),
        ("rloo", "group", "grpo"),
        ("sequence_sum", "token_mean"),
    ):
        options = {"kl": kl, "advantage": advantage, "reduction": reduction}
        function = {"traj": rl_traj, "token": rl_token}[energy]
        cases[f"rl_{energy} {kl} {advantage} {reduction}"] = (
            partial(function, alpha=alpha, weight=SEQUENCE, **options),
            policy_gradient_reference(
                energy, alpha, weight=weight_of("seq_sum", EPSILON, 0.28), **options
            ),
        )
    for energy in ("traj", "token"):
        assembled = PolicyGradientObjective(energy, "in_reward", "rloo", "sequence_sum", NONE)
        cases[f"rl_{energy} assembled, unweighted"] = (
            partial(assembled, alpha=alpha),
            policy_gradient_reference(energy, alpha),
        )
    return cases


CASES: dict[str, Case] = {
    f"{name} alpha={alpha}": case
    for cases, alphas in ((balance_cases, (0.5, 2.0, 4.0)), (rl_cases, (1.5, 4.0)))
    for alpha in alphas
    for name, case in cases(alpha).items()
}


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_reference_whatever_the_padding_holds(
    name: str, filler: Filler
) -> None:
    objective, reference = CASES[name]
    for seed, with_psi in ((1, True), (2, True), (3, False)):
        batch = random_batch(seed, with_psi=with_psi)
        assert_loss_and_gradient(objective, reference, batch, filler=filler)


@pytest.mark.parametrize("name", CASES)
def test_metrics_and_residuals_equal_the_reference(name: str) -> None:
    objective, reference = CASES[name]
    for seed, with_psi in ((4, True), (5, False)):
        assert_metrics(objective, reference, random_batch(seed, with_psi=with_psi), filler="mixed")


@pytest.mark.parametrize("name", CASES)
def test_psi_changes_the_loss(name: str) -> None:
    """Otherwise the agreement with the reference would say nothing about psi."""
    objective, _ = CASES[name]
    inputs = padded(random_batch(1))
    without = replace(inputs, format_penalty=torch.zeros_like(inputs.format_penalty))
    assert abs(float(objective(inputs).loss - objective(without).loss)) > 1e-6


def test_the_random_batches_clip_on_both_sides_and_leave_some_ratios_alone() -> None:
    for seed in (1, 2, 3, 4, 5):
        batch = random_batch(seed)
        values = [weight_of("seq_sum", EPSILON, EPSILON)(batch, i).value for i in range(len(batch))]
        assert min(values) == 1.0 - EPSILON
        assert max(values) == 1.0 + EPSILON
        assert sum(1.0 - EPSILON < v < 1.0 + EPSILON for v in values) >= 3
        assert len({len(row) for row in batch.log_pf}) >= 3


def test_the_reference_gradient_is_that_of_the_reference_loss() -> None:
    """The complex step, confirmed by central differences, exact for a quadratic."""
    batch, reference, h = random_batch(7), tb_traj_reference(2.0), 0.5
    by_token, by_z = reference_gradients(reference, batch)
    flat = iter(by_token)
    for row in batch.log_pf:
        for t, value in enumerate(list(row)):
            row[t] = value + h
            above = reference_loss(reference, batch)
            row[t] = value - h
            below = reference_loss(reference, batch)
            row[t] = value
            assert next(flat) == pytest.approx((above - below) / (2 * h), abs=1e-10)
    assert sum(by_z) == pytest.approx(sum(by_token[i] for i in first_tokens(batch.log_pf)))


def first_tokens(rows: list[list[float]]) -> list[int]:
    return [sum(map(len, rows[:i])) for i in range(len(rows))]


# --- values worked out by hand -------------------------------------------------------------------


def one_trajectory(**changes: object) -> LossInputs:
    """S = -3, B = -5 over two tokens; psi = -0.5; on-policy; log Z = 0."""
    pf = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    values: dict[str, object] = {
        "log_pf": pf,
        "log_p_base": torch.tensor([[-2.0, -3.0]], dtype=torch.float64),
        "log_p_old": pf.clone(),
        "mask": torch.ones(1, 2, dtype=torch.bool),
        "log_z": torch.zeros(1, dtype=torch.float64),
        "format_penalty": torch.full((1,), -0.5, dtype=torch.float64),
        "prompt_index": torch.zeros(1, dtype=torch.long),
    }
    return LossInputs(**{**values, **changes})


def test_residuals_of_a_trajectory_worked_out_by_hand() -> None:
    inputs = one_trajectory()
    # tb_traj: -3 - 2 (-5 + 2 * -0.5) = 9;  la_tb: -1.5 - 2 (-2.5 - 0.5) = 4.5
    # tb_token energy, k = 10: -3 + 5 - 10 (2 - 1) (-2.5 - 0.5) = 32;  power: -3 - 2 (-3) = 3
    assert float(tb_traj(inputs, alpha=2.0).loss) == 81.0
    assert float(la_tb(inputs, alpha=2.0).loss) == 20.25
    assert float(powerflow(inputs, alpha=2.0, epsilon=0.2).loss) == 20.25
    assert float(tb_token(inputs, alpha=2.0, scale=10.0, reading="energy").loss) == 32.0**2
    assert float(tb_token(inputs, alpha=2.0, scale=10.0, reading="power").loss) == 9.0


def test_an_end_of_sequence_alone_is_a_response_of_length_one() -> None:
    inputs = one_trajectory(mask=torch.tensor([[True, False]]))
    assert float(la_tb(inputs, alpha=2.0).residual) == -1.0 - 2.0 * (-2.0 - 0.5)
    assert torch.equal(la_tb(inputs, alpha=2.0).loss, tb_traj(inputs, alpha=2.0).loss)


def test_the_residual_correlation_with_length_is_zero_where_lengths_are_equal() -> None:
    inputs = padded(random_batch(1, longest=1))
    output = powerflow(inputs, alpha=2.0, epsilon=EPSILON)
    assert float(output.metrics["corr_residual_length"]) == 0.0
    assert float(output.metrics["residual_abs"]) > 0.0


# --- narrow types --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["powerflow", "la_tb", "tb_traj", "tb_token energy"])
def test_narrow_log_probs_are_widened_before_they_are_summed(name: str, dtype: torch.dtype) -> None:
    objective, reference = balance_cases(2.0)[name]
    batch = random_batch(11, longest=400)
    narrow = padded(batch, dtype=dtype)
    wide = {
        field: [
            getattr(narrow, field)[i, : len(row)].double().tolist()
            for i, row in enumerate(batch.log_pf)
        ]
        for field in ("log_pf", "log_p_base", "log_p_old")
    }
    rounded = replace(
        batch, log_z=narrow.log_z.double().tolist(), psi=narrow.format_penalty.tolist(), **wide
    )
    output = objective(narrow)
    expected = reference_loss(reference, rounded)
    assert output.loss.dtype == torch.float32
    assert float(output.loss) == pytest.approx(expected, rel=2e-5)
    for metric, value in reference_metrics(reference, rounded).items():
        assert float(output.metrics[metric]) == pytest.approx(value, rel=2e-3, abs=2e-4), metric

    summed_narrowly = replace(
        narrow,
        log_pf=sum_in_first_token(narrow.log_pf, narrow.mask),
        log_p_base=sum_in_first_token(narrow.log_p_base, narrow.mask),
    )
    assert float(objective(summed_narrowly).loss) != pytest.approx(expected, rel=1e-4)


def sum_in_first_token(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The whole sum on the first token, accumulated in x's own narrow type."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for t in range(x.shape[1]):
        total = torch.where(mask[:, t], total + x[:, t].detach(), total)
    out = torch.zeros_like(x)
    out[:, 0] = total
    return out.requires_grad_()


def test_float64_inputs_stay_float64() -> None:
    output: LossOutput = powerflow(padded(random_batch(1)), alpha=2.0, epsilon=EPSILON)
    assert output.loss.dtype == torch.float64
    assert {m.dtype for m in output.metrics.values()} == {torch.float64}


# --- which padding side --------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_mask_alone_says_where_the_response_is(name: str) -> None:
    objective, reference = CASES[name]
    batch = random_batch(6)
    assert_loss_and_gradient(objective, reference, batch, filler="noise", side="left")


# --- where gradients go --------------------------------------------------------------------------


def test_the_gradient_of_a_frozen_base_example_is_two_d_over_n_and_length() -> None:
    batch = random_batch(9)
    inputs = padded(batch)
    output = la_tb(inputs, alpha=2.0)
    by_pf, by_z = gradients(output, inputs)
    lengths = inputs.mask.sum(1, keepdim=True)
    expected = torch.where(inputs.mask, (2 * output.residual / len(batch))[:, None] / lengths, 0.0)
    torch.testing.assert_close(by_pf, expected, atol=1e-12, rtol=1e-12)
    assert_near(by_z, (2 * output.residual / len(batch)).tolist(), 1e-12)

"""Every objective reaches its exact target on a language that can be enumerated.

Total variations and constants are measured against closed forms and roots, never against another
trained run. Learning is seen twice: on all strings at once, and on samples of the current policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from powerflow_lit.enumerable import Language, total_variation
from powerflow_lit.enumerable_training import (
    ClosedForm,
    Frozen,
    LearnedScalar,
    Objective,
    Recipe,
    inputs_for,
)
from powerflow_lit.objectives import (
    BalanceObjective,
    ImportanceWeight,
    LossInputs,
    LossOutput,
    la_tb,
    la_tb_mismatch,
    powerflow,
    rl_token,
    rl_traj,
    tb_token,
    tb_traj,
    tb_traj_mismatch,
)
from tests.language import minimise_on_all_strings, train_on_all_strings, train_on_samples

LANGUAGE = Language.build()
BASE = LANGUAGE.bigram_base(seed=3)
PSI = torch.where(LANGUAGE.lacks(letter=0), -0.5, 0.0).double()  # (N,)
NO_PSI = torch.zeros(len(LANGUAGE), dtype=torch.float64)
TOKEN_SCALE = 2.0

ON_POLICY = ImportanceWeight("none", None, None)  # rollouts come from the policy itself
EXACT = ImportanceWeight("seq_sum", None, None)  # N pi(y): a mean over all strings is E_pi
SAMPLED = Recipe(steps=1000, lr=0.02, lr_z=0.1)
SAMPLED_LONGER = Recipe(steps=1500, lr=0.02, lr_z=0.1)
SAMPLED_WIDELY = Recipe(steps=1600, lr=0.01, lr_z=0.1, samples=1024)
EXPECTED = Recipe(steps=1000, lr=0.3, lr_z=0.3)

Target = Callable[[float, Tensor], tuple[Tensor, float]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def length_averaged(alpha: float, psi: Tensor) -> tuple[Tensor, float]:
    return LANGUAGE.length_averaged_target(BASE, alpha, psi)


def power(alpha: float, psi: Tensor) -> tuple[Tensor, float]:
    return LANGUAGE.power_target(BASE, alpha, psi)


def token_average(alpha: float, psi: Tensor, scale: float = 1.0) -> tuple[Tensor, float]:
    return LANGUAGE.token_target(BASE, scale * (alpha - 1.0), psi)


BALANCE: dict[str, tuple[Callable[..., LossOutput], Target]] = {
    "powerflow": (partial(powerflow, epsilon=0.2), length_averaged),
    "la_tb": (la_tb, length_averaged),
    "tb_traj": (tb_traj, power),
    "tb_token": (
        partial(tb_token, scale=TOKEN_SCALE, reading="energy"),
        partial(token_average, scale=TOKEN_SCALE),
    ),
}
RL: dict[str, tuple[Callable[..., LossOutput], Target]] = {
    "rl_traj": (rl_traj, power),
    "rl_token": (rl_token, token_average),
}
FRAME = {"kl": "in_reward", "advantage": "rloo", "reduction": "sequence_sum"}


def at(objective: Callable[..., LossOutput], alpha: float, **options: object) -> Objective:
    return partial(objective, alpha=alpha, **options)


def tolerance(alpha: float) -> float:
    return 0.03 if alpha == 4.0 else 0.01


def sampling(alpha: float) -> Recipe:
    return SAMPLED_LONGER if alpha == 4.0 else SAMPLED


# --- the bench itself ----------------------------------------------------------------------------


def test_the_language_holds_every_string_once_and_its_base_sums_to_one() -> None:
    strings = {tuple(t[m].tolist()) for t, m in zip(LANGUAGE.token, LANGUAGE.mask, strict=True)}
    assert len(strings) == len(LANGUAGE) == 2**7 - 1
    assert float(LANGUAGE.log_probs(BASE).exp().sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("psi", [NO_PSI, PSI], ids=["plain", "psi"])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_the_targets_are_distributions_far_apart_and_far_from_the_base(
    alpha: float, psi: Tensor
) -> None:
    base = LANGUAGE.log_probs(BASE)
    log_p = [target(alpha, psi)[0] for _, target in BALANCE.values()]
    for target in log_p:
        assert float(target.exp().sum()) == pytest.approx(1.0, abs=1e-12)
        assert total_variation(target, base) > 0.1
    averaged, _, plain, token = log_p
    assert total_variation(averaged, plain) > 0.2
    assert total_variation(token, plain) > 0.1


@pytest.mark.parametrize("name", BALANCE)
def test_no_objective_starts_within_its_tolerance(name: str) -> None:
    for alpha in (0.5, 2.0, 4.0):
        target, _ = BALANCE[name][1](alpha, NO_PSI)
        assert total_variation(LANGUAGE.log_probs(BASE), target) > 10 * tolerance(2.0)


# --- fixed points: exact, without training -------------------------------------------------------


@pytest.mark.parametrize("psi", [NO_PSI, PSI], ids=["plain", "psi"])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("name", BALANCE)
def test_a_balance_loss_vanishes_at_its_target_and_only_with_the_exact_log_z(
    name: str, alpha: float, psi: Tensor
) -> None:
    objective, target = BALANCE[name]
    log_p, log_z = target(alpha, psi)
    logits = LANGUAGE.logits_of(log_p)
    there = inputs_for(LANGUAGE, logits, BASE, log_z=log_z, psi=psi)
    beside = inputs_for(LANGUAGE, logits, BASE, log_z=log_z + 0.1, psi=psi)
    assert float(objective(there, alpha=alpha).loss) < 1e-20
    assert float(objective(beside, alpha=alpha).loss) > 1e-3


@pytest.mark.parametrize("psi", [NO_PSI, PSI], ids=["plain", "psi"])
@pytest.mark.parametrize("alpha", [2.0, 4.0])
@pytest.mark.parametrize("name", RL)
def test_rewards_less_kl_are_constant_at_the_rl_target(
    name: str, alpha: float, psi: Tensor
) -> None:
    objective, target = RL[name]
    log_p, _ = target(alpha, psi)
    inputs = inputs_for(LANGUAGE, LANGUAGE.logits_of(log_p), BASE, psi=psi)
    residual = objective(inputs, alpha=alpha, weight=EXACT, **FRAME).residual
    torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-10, rtol=0.0)
    elsewhere = inputs_for(LANGUAGE, BASE, BASE, psi=psi)
    assert (
        float(objective(elsewhere, alpha=alpha, weight=EXACT, **FRAME).residual.abs().max()) > 0.1
    )


# --- learning on all strings ---------------------------------------------------------------------


@pytest.mark.parametrize("psi", [NO_PSI, PSI], ids=["plain", "psi"])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("name", BALANCE)
def test_a_balance_loss_over_all_strings_ends_at_its_target_and_exact_log_z(
    name: str, alpha: float, psi: Tensor
) -> None:
    objective, target = BALANCE[name]
    log_p, log_z = target(alpha, psi)
    trained = minimise_on_all_strings(
        LANGUAGE, BASE, at(objective, alpha), LearnedScalar(), psi=psi
    )
    report(f"all strings {name}", alpha, trained.log_p, log_p, trained.log_z, log_z)
    assert total_variation(trained.log_p, log_p) < 1e-3
    assert trained.log_z == pytest.approx(log_z, abs=1e-3)


@pytest.mark.parametrize("psi", [NO_PSI, PSI], ids=["plain", "psi"])
@pytest.mark.parametrize("alpha", [2.0, 4.0])
@pytest.mark.parametrize("name", RL)
def test_the_exact_policy_gradient_ends_at_the_rl_target(
    name: str, alpha: float, psi: Tensor
) -> None:
    objective, target = RL[name]
    log_p, _ = target(alpha, psi)
    ascent = at(objective, alpha, weight=EXACT, **FRAME)
    trained = train_on_all_strings(LANGUAGE, BASE, ascent, Frozen(0.0), EXPECTED, psi=psi)
    report(f"expected {name}", alpha, trained.log_p, log_p)
    assert total_variation(trained.log_p, log_p) < tolerance(alpha)


# --- learning on the policy's own samples --------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("name", BALANCE)
def test_a_balance_loss_on_own_samples_ends_at_its_target_and_exact_log_z(
    name: str, alpha: float
) -> None:
    objective, target = BALANCE[name]
    log_p, log_z = target(alpha, NO_PSI)
    trained = train_on_samples(
        LANGUAGE, BASE, at(objective, alpha), LearnedScalar(), sampling(alpha), seed=len(name)
    )
    report(f"samples {name}", alpha, trained.log_p, log_p, trained.log_z, log_z)
    assert total_variation(trained.log_p, log_p) < tolerance(alpha)
    assert trained.log_z == pytest.approx(log_z, abs=0.02)


@pytest.mark.parametrize("alpha", [2.0, 4.0])
@pytest.mark.parametrize("name", RL)
def test_a_policy_gradient_on_own_samples_ends_at_its_target(name: str, alpha: float) -> None:
    objective, target = RL[name]
    log_p, _ = target(alpha, NO_PSI)
    ascent = at(objective, alpha, weight=ON_POLICY, **FRAME)
    trained = train_on_samples(LANGUAGE, BASE, ascent, Frozen(0.0), sampling(alpha))
    report(f"samples {name}", alpha, trained.log_p, log_p)
    assert total_variation(trained.log_p, log_p) < tolerance(alpha)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_powerflow_with_psi_on_samples_updated_four_times_ends_at_the_penalised_target(
    alpha: float,
) -> None:
    log_p, log_z = length_averaged(alpha, PSI)
    recipe = Recipe(steps=1200, lr=0.02, lr_z=0.1, updates_per_refill=4)
    objective = at(powerflow, alpha, epsilon=0.2)
    trained = train_on_samples(LANGUAGE, BASE, objective, LearnedScalar(), recipe, psi=PSI)
    report("samples x4 powerflow psi", alpha, trained.log_p, log_p, trained.log_z, log_z)
    assert total_variation(trained.log_p, log_p) < tolerance(alpha)
    assert total_variation(trained.log_p, length_averaged(alpha, NO_PSI)[0]) > 0.05
    assert trained.log_z == pytest.approx(log_z, abs=0.02)


# --- log Z: learned, closed form, frozen ---------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("trajectories", ["all strings", "samples"])
def test_a_learned_log_z_and_the_group_closed_form_share_the_fixed_point(
    alpha: float, trajectories: str
) -> None:
    log_p, log_z = length_averaged(alpha, NO_PSI)
    for source in (LearnedScalar(), ClosedForm(partial(la_tb_mismatch, alpha=alpha))):
        if trajectories == "samples":
            end = train_on_samples(LANGUAGE, BASE, at(la_tb, alpha), source, SAMPLED)
        else:
            end = minimise_on_all_strings(LANGUAGE, BASE, at(la_tb, alpha), source)
        report(f"{trajectories} {type(source).__name__}", alpha, end.log_p, log_p, end.log_z, log_z)
        assert total_variation(end.log_p, log_p) < 0.01
        assert end.log_z == pytest.approx(log_z, abs=0.01)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_log_z_frozen_at_zero_ends_on_policy_at_a_length_squared_tilt(alpha: float) -> None:
    exact = LANGUAGE.frozen_zero_target(BASE, alpha)
    assert total_variation(exact, length_averaged(alpha, NO_PSI)[0]) > 0.05

    followed = at(BalanceObjective(la_tb_mismatch, EXACT), alpha)
    expected = train_on_all_strings(LANGUAGE, BASE, followed, Frozen(0.0), EXPECTED)
    sampled = train_on_samples(LANGUAGE, BASE, at(la_tb, alpha), Frozen(0.0), SAMPLED_WIDELY)
    report("frozen, expected gradient", alpha, expected.log_p, exact)
    report("frozen, samples", alpha, sampled.log_p, exact)
    assert total_variation(expected.log_p, exact) < 1e-3
    assert total_variation(sampled.log_p, exact) < 0.03


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_the_expected_gradient_with_log_z_zero_vanishes_at_the_length_squared_tilt(
    alpha: float,
) -> None:
    objective = at(BalanceObjective(la_tb_mismatch, EXACT), alpha)
    tilted = LANGUAGE.logits_of(LANGUAGE.frozen_zero_target(BASE, alpha))
    averaged = LANGUAGE.logits_of(length_averaged(alpha, NO_PSI)[0])
    assert gradient_in_logits(objective, tilted, 0.0).abs().max() < 1e-10
    assert gradient_in_logits(objective, averaged, 0.0).abs().max() > 1e-3


# --- gradients that theory names -----------------------------------------------------------------


@pytest.mark.parametrize("log_z", [-3.0, 0.0, 7.0])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_the_on_policy_gradient_of_tb_is_that_of_twice_the_kl_whatever_z(
    alpha: float, log_z: float
) -> None:
    expected = kl_gradient(power(alpha, NO_PSI)[0])
    actual = gradient_in_logits(at(BalanceObjective(tb_traj_mismatch, EXACT), alpha), BASE, log_z)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def test_the_on_policy_gradient_of_la_tb_does_depend_on_z() -> None:
    objective = at(BalanceObjective(la_tb_mismatch, EXACT), 2.0)
    at_zero, at_one = (gradient_in_logits(objective, BASE, z) for z in (0.0, 1.0))
    assert (at_zero - at_one).abs().max() > 0.01


@pytest.mark.parametrize("alpha", [2.0, 4.0])
@pytest.mark.parametrize("name", RL)
def test_the_expected_policy_gradient_is_the_reverse_kl_to_the_rl_target(
    name: str, alpha: float
) -> None:
    """-grad(E[r] - beta KL(pi || base)) = beta grad KL(pi || target); leave-one-out over all N
    strings at once stretches every advantage by N / (N - 1)."""
    objective, target = RL[name]
    n, beta = len(LANGUAGE), 1.0 / (alpha - 1.0)
    expected = 0.5 * beta * n / (n - 1) * kl_gradient(target(alpha, NO_PSI)[0])
    actual = gradient_in_logits(at(objective, alpha, weight=EXACT, **FRAME), BASE, 0.0)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


# --- a base without memory -----------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.25, 0.5, 2.0, 4.0])
def test_on_a_memoryless_base_la_tb_is_sampling_at_temperature_one_over_alpha(
    alpha: float,
) -> None:
    probabilities = [0.5, 0.35, 0.15]  # of a token, the end symbol last
    base = LANGUAGE.memoryless_base(probabilities)
    tempered = alpha * base  # token logits divided by the temperature
    log_z = math.log(sum(p**alpha for p in probabilities))
    target, log_z_root = LANGUAGE.length_averaged_target(base, alpha)

    assert total_variation(LANGUAGE.log_probs(tempered), target) < 1e-6
    assert log_z_root == pytest.approx(log_z, abs=1e-12)
    inputs = inputs_for(LANGUAGE, tempered, base, log_z=log_z)
    assert float(la_tb(inputs, alpha=alpha).loss) < 1e-25
    assert float(powerflow(inputs, alpha=alpha, epsilon=0.2).loss) < 1e-25
    assert float(tb_traj(inputs, alpha=alpha).loss) > 1e-3  # trajectory balance wants another one


def test_on_a_base_with_memory_la_tb_is_not_temperature_sampling() -> None:
    tempered = LANGUAGE.log_probs(4.0 * BASE.log_softmax(-1))
    assert total_variation(tempered, length_averaged(4.0, NO_PSI)[0]) > 0.1


# --- helpers -------------------------------------------------------------------------------------


def gradient_in_logits(objective: Objective, logits: Tensor, log_z: float) -> Tensor:
    logits = logits.clone().requires_grad_()
    inputs: LossInputs = inputs_for(LANGUAGE, logits, BASE, log_z=log_z)
    (gradient,) = torch.autograd.grad(objective(inputs).loss, logits)
    return gradient


def kl_gradient(target: Tensor) -> Tensor:
    """Of 2 KL(pi || target) at the base, in the logits."""
    logits = BASE.clone().requires_grad_()
    log_p = LANGUAGE.log_probs(logits)
    (gradient,) = torch.autograd.grad(2.0 * (log_p.exp() * (log_p - target)).sum(), logits)
    return gradient


def report(
    title: str, alpha: float, found: Tensor, exact: Tensor, z: float = 0.0, exact_z: float = 0.0
) -> None:
    """Shown by `pytest -s` and beside a failure."""
    distance = total_variation(found, exact)
    print(f"{title} alpha={alpha}: TV {distance:.5f}, log Z {z:.4f} (exact {exact_z:.4f})")

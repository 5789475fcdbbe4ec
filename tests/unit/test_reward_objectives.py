"""The rivals' losses equal plain loops over their definitions: values, gradients and metrics."""

from __future__ import annotations

import cmath
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from powerflow_lit.objectives import (
    BalanceObjective,
    EntropyObjective,
    ImportanceWeight,
    LossInputs,
    LossOutput,
    NonFiniteInputError,
    ObjectiveError,
    PpoClip,
    RewardObjective,
    flowrl_mismatch,
    format_only_mismatch,
)
from powerflow_lit.objectives.advantages import advantages
from tests.reference import (
    Objective,
    Ragged,
    Reference,
    Row,
    assert_loss_and_gradient,
    assert_metrics,
    assert_near,
    balance,
    la_tb_reference,
    padded,
    random_batch,
    weight_of,
)

LOW, HIGH, LONGEST = 0.2, 0.28, 9
ADVANTAGES = ("grpo", "group", "rloo")
REDUCTIONS = ("token_mean", "all_tokens", "constant_length", "sequence_sum")
SCALE = 15.0


def off_policy(seed: int, *, with_psi: bool = True) -> Ragged:
    """A batch whose token ratios leave the clip range on both sides."""
    batch, rng = random_batch(seed, with_psi=with_psi), random.Random(seed)
    old = [[x - rng.gauss(0.0, 0.4) for x in row] for row in batch.log_pf]
    return replace(batch, log_p_old=old)


def rewards_of(batch: Ragged) -> list[float]:
    """Some equal within a prompt, and one prompt whose rollouts all got the same."""
    rng = random.Random(len(batch))
    flat = min(batch.prompt)
    return [0.3 if p == flat else rng.choice([0.0, 1.0, 0.25]) for p in batch.prompt]


def with_rewards(objective: Callable[..., LossOutput], batch: Ragged) -> Objective:
    reward = torch.tensor(rewards_of(batch), dtype=torch.float64)
    return lambda inputs: objective(replace(inputs, reward=reward), alpha=3.0)


def advantage_by_hand(batch: Ragged, i: int, kind: str, *, with_psi: bool = True) -> float:
    """(r - mean) / (std + 1e-6) over the prompt's rollouts, and its two variants."""
    of = [r + (p if with_psi else 0.0) for r, p in zip(rewards_of(batch), batch.psi, strict=True)]
    group = [j for j in range(len(batch)) if batch.prompt[j] == batch.prompt[i]]
    if kind == "rloo":
        return of[i] - statistics.fmean(of[j] for j in group if j != i)
    centred = of[i] - statistics.fmean(of[j] for j in group)
    spread = statistics.stdev([of[j] for j in group])
    return centred / (spread + 1e-6) if kind == "grpo" else centred


def grpo_reference(
    advantage: str, reduction: str, ratio: str, kl: float, weight: str = "token"
) -> Reference:
    """Minus PPO's clipped gain of each token plus kl times k3, summed as the reduction says."""

    def share(batch: Ragged, i: int) -> float:
        lengths = [len(row) for row in batch.log_pf]
        return {
            "token_mean": 1 / lengths[i],
            "all_tokens": len(lengths) / sum(lengths),
            "constant_length": 1 / LONGEST,
            "sequence_sum": 1.0,
        }[reduction]

    def term(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        A = advantage_by_hand(batch, i, advantage)
        gaps = [a - b for a, b in zip(x, batch.log_p_old[i], strict=True)]
        if ratio == "sequence":
            gaps = [sum(gaps) / len(gaps)] * len(gaps)
        total: complex = 0.0
        for t, gap in enumerate(gaps):
            rho = cmath.exp(gap)
            inside = 1 - LOW <= rho.real <= 1 + HIGH
            clipped = rho if inside else min(max(rho.real, 1 - LOW), 1 + HIGH)
            total -= min(rho * A, clipped * A, key=lambda v: complex(v).real)
            k = batch.log_p_base[i][t] - x[t]
            total += kl * (cmath.exp(k) - 1 - k)
        return total * share(batch, i)

    def residual(batch: Ragged, i: int) -> float:
        return advantage_by_hand(batch, i, "group")

    return Reference(term, residual)


CASES = {
    f"{advantage} {reduction} {ratio} kl={kl}": (
        RewardObjective(advantage, reduction, PpoClip(ratio, LOW, HIGH), kl, LONGEST),  # type: ignore[arg-type]
        grpo_reference(advantage, reduction, ratio, kl),
        weight_of("token" if ratio == "token" else "seq_geo", LOW, HIGH),
    )
    for advantage, reduction, ratio, kl in product(
        ADVANTAGES, REDUCTIONS, ("token", "sequence"), (0.0, 0.05)
    )
}


@pytest.mark.parametrize("name", CASES)
def test_reward_strategies_equal_ppos_loss_token_by_token(name: str) -> None:
    objective, reference, _ = CASES[name]
    for seed, with_psi in ((1, True), (2, False)):
        batch = off_policy(seed, with_psi=with_psi)
        assert_loss_and_gradient(with_rewards(objective, batch), reference, batch, filler="mixed")


@pytest.mark.parametrize("name", [name for name in CASES if "grpo token_mean" in name])
def test_what_they_log_equals_the_reference(name: str) -> None:
    objective, reference, weight = CASES[name]
    batch = off_policy(4)
    logged = replace(reference, weight=weight)
    assert_metrics(with_rewards(objective, batch), logged, batch, filler="mixed")


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("clip", [(LOW, 99.0), (0.99, HIGH)], ids=["below", "above"])
def test_the_batches_clip_on_both_sides_and_the_minimum_matters(
    ratio: str, clip: tuple[float, float]
) -> None:
    changed = 0.0
    for batch in map(off_policy, (1, 2)):
        clipped, loose = (
            RewardObjective("rloo", "token_mean", PpoClip(ratio, *bounds), 0.0, None)  # type: ignore[arg-type]
            for bounds in (clip, (0.99, 99.0))
        )
        losses = [with_rewards(o, batch)(padded(batch)).loss for o in (clipped, loose)]
        changed += abs(float(losses[0] - losses[1]))
    assert changed > 1e-3


def test_plain_reinforce_takes_the_same_path_with_a_detached_weight() -> None:
    """As the RL twins do: -w A S."""
    batch = random_batch(3)
    surrogate = ImportanceWeight("seq_sum", LOW, HIGH)
    objective = RewardObjective("rloo", "sequence_sum", surrogate, 0.0, None)

    def term(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        return -advantage_by_hand(batch, i, "rloo") * sum(x)

    reference = Reference(
        term, lambda b, i: advantage_by_hand(b, i, "group"), weight_of("seq_sum", LOW, HIGH)
    )
    assert_loss_and_gradient(with_rewards(objective, batch), reference, batch, filler="nan")
    assert_metrics(with_rewards(objective, batch), reference, batch, filler="nan")


def test_rollouts_that_all_got_the_same_teach_nothing_however_large_the_reward() -> None:
    """In float32 the mean of equal rewards is off by a rounding, which a division would blow up."""
    reward = torch.full((7,), 14.7849912, dtype=torch.float32)
    for kind in ("grpo", "group"):
        found = advantages(reward, torch.zeros(7, dtype=torch.long), kind)  # type: ignore[arg-type]
        assert found.abs().max() < 1e-5


def test_on_policy_the_gradient_of_grpo_is_that_of_reinforce() -> None:
    batch = random_batch(5)
    inputs = padded(batch, filler="noise")
    inputs = replace(inputs, log_p_old=inputs.log_pf.detach())
    found = []
    for surrogate in (PpoClip("token", LOW, HIGH), ImportanceWeight("none", None, None)):
        objective = RewardObjective("grpo", "token_mean", surrogate, 0.0, None)
        loss = with_rewards(objective, batch)(inputs).loss
        found.append(torch.autograd.grad(loss, inputs.log_pf)[0])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.25, 1.0, 4.0])
def test_alpha_changes_nothing_where_a_strategy_does_not_use_it(alpha: float) -> None:
    batch = random_batch(2, with_psi=False)
    inputs = replace(
        padded(batch, filler="noise"),
        reward=torch.tensor(rewards_of(batch), dtype=torch.float64),
    )
    inputs = replace(inputs, token_entropy=inputs.log_pf.detach().abs())
    weight = ImportanceWeight("seq_sum", LOW, HIGH)
    objectives: list[Callable[..., LossOutput]] = [
        CASES["grpo token_mean token kl=0.05"][0],
        EntropyObjective(0.5, "all_tokens"),
        BalanceObjective(partial(flowrl_mismatch, scale=SCALE), weight),
        BalanceObjective(format_only_mismatch, weight),
    ]
    for objective in objectives:
        assert torch.equal(objective(inputs, alpha=alpha).loss, objective(inputs, alpha=2.0).loss)


# --- FlowRL and Format-only: balance, as PowerFlow -----------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(LOW, LOW), (None, None)], ids=["clipped", "unclipped"])
def test_flowrl_is_a_length_averaged_balance_with_the_standardised_reward(
    low: float | None, high: float | None
) -> None:
    def residual(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        b = sum(batch.log_p_base[i]) / len(x) + batch.psi[i]
        A = advantage_by_hand(batch, i, "grpo", with_psi=False)
        return z + sum(x) / len(x) - b - SCALE * A

    mismatch = partial(flowrl_mismatch, scale=SCALE)
    objective = BalanceObjective(mismatch, ImportanceWeight("seq_sum", low, high))
    reference = balance(residual, weight_of("seq_sum", low, high))
    for seed, with_psi in ((1, True), (2, False)):
        batch = random_batch(seed, with_psi=with_psi)
        chosen = with_rewards(objective, batch)
        assert_loss_and_gradient(chosen, reference, batch, filler="mixed", atol=1e-8)
    assert_metrics(chosen, reference, batch, filler="mixed")


def test_format_only_is_powerflow_at_alpha_1() -> None:
    objective = BalanceObjective(format_only_mismatch, ImportanceWeight("seq_sum", LOW, LOW))
    reference = la_tb_reference(1.0, weight_of("seq_sum", LOW, LOW))
    for alpha in (0.5, 4.0):
        chosen = partial(objective, alpha=alpha)
        assert_loss_and_gradient(chosen, reference, random_batch(1), filler="mixed")


# --- One-shot EM ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["all_tokens", "token_mean", "sequence_sum"])
def test_one_shot_em_is_the_mean_entropy_of_the_tokens(reduction: str) -> None:
    """Entropies as given (their own values: test_linear_log_prob.py), and their gradient."""
    batch = random_batch(6, with_psi=False)
    inputs = padded(batch, filler="mixed")
    entropy = torch.where(inputs.mask, inputs.log_pf.detach().abs() + 0.1, math.nan)
    entropy.requires_grad_()
    output = EntropyObjective(0.5, reduction)(  # type: ignore[arg-type]
        replace(inputs, token_entropy=entropy), alpha=4.0
    )
    rows = [[abs(x) + 0.1 for x in row] for row in batch.log_pf]
    tokens = sum(map(len, rows))
    expected = {
        "all_tokens": sum(map(sum, rows)) / tokens,
        "token_mean": statistics.fmean(map(statistics.fmean, rows)),
        "sequence_sum": sum(map(sum, rows)) / len(rows),
    }[reduction]
    assert_near(output.loss, expected, 1e-12)
    assert_near(output.residual, [statistics.fmean(row) for row in rows], 1e-12)
    (gradient,) = torch.autograd.grad(output.loss, entropy)
    share = {
        "all_tokens": [1 / tokens for row in rows for _ in row],
        "token_mean": [1 / len(row) / len(rows) for row in rows for _ in row],
        "sequence_sum": [1 / len(rows) for row in rows for _ in row],
    }[reduction]
    assert_near(gradient[inputs.mask], share, 1e-12)
    assert (gradient[~inputs.mask] == 0).all()


# --- refusals ------------------------------------------------------------------------------------


def plain() -> LossInputs:
    return padded(random_batch(1, with_psi=False))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PpoClip("word", LOW, HIGH), "ratio 'word'"),  # type: ignore[arg-type]
        (lambda: PpoClip("token", 1.5, HIGH), "epsilon=1.5"),
        (lambda: PpoClip("token", LOW, 0.0), "epsilon_high=0.0"),
        (lambda: EntropyObjective(0.0, "all_tokens"), "entropy_temperature=0.0"),
        (lambda: EntropyObjective(0.5, "constant_length"), "take all_tokens"),
        (
            lambda: RewardObjective("grpo", "token_mean", PpoClip("token", LOW, HIGH), -0.1, 9),
            "kl=-0.1",
        ),
    ],
)
def test_values_outside_their_domain_are_refused_when_built(
    build: Callable[[], object], message: str
) -> None:
    with pytest.raises(ObjectiveError, match=message):
        build()


def test_a_loss_without_what_it_is_made_of_says_what_is_missing() -> None:
    surrogate = PpoClip("token", LOW, HIGH)
    with pytest.raises(ObjectiveError, match=r"set strategy\.reward"):
        RewardObjective("grpo", "token_mean", surrogate, 0.0, None)(plain(), alpha=1.0)
    with pytest.raises(ObjectiveError, match="token_entropy, which is None"):
        EntropyObjective(0.5, "all_tokens")(plain(), alpha=1.0)
    rewarded = replace(plain(), reward=torch.zeros(12))
    with pytest.raises(ObjectiveError, match="longest=None"):
        RewardObjective("grpo", "constant_length", surrogate, 0.0, None)(rewarded, alpha=1.0)
    with pytest.raises(ObjectiveError, match="reduction 'mean' is none of"):
        RewardObjective("grpo", "mean", surrogate, 0.0, None)(rewarded, alpha=1.0)  # type: ignore[arg-type]
    with pytest.raises(ObjectiveError, match="flowrl scale=0"):
        flowrl_mismatch(rewarded, alpha=1.0, scale=0)
    penalised = replace(plain(), token_entropy=plain().log_pf, format_penalty=-torch.ones(12))
    with pytest.raises(ObjectiveError, match=r"strategy\.format_penalty=0"):
        EntropyObjective(0.5, "all_tokens")(penalised, alpha=1.0)
    broken = replace(rewarded, reward=torch.full((12,), math.nan))
    with pytest.raises(NonFiniteInputError, match="reward holds a NaN"):
        RewardObjective("grpo", "token_mean", surrogate, 0.0, None)(broken, alpha=1.0)
    with pytest.raises(ObjectiveError, match=r"reward has shape \(3,\)"):
        replace(plain(), reward=torch.zeros(3))

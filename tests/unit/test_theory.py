"""What the paper says about its targets, on a language where every number is known.

`docs/theory.md` names the claim of each test. Bases are random bigram tables; all is float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from powerflow_lit.enumerable import Language, exact_inversion_rate, kl, total_variation
from powerflow_lit.enumerable_training import inputs_for
from powerflow_lit.metrics.inversion import inversion_rate
from powerflow_lit.objectives import la_tb, tb_traj

LANGUAGE = Language.build()
LENGTHS = LANGUAGE.lengths
BASE = LANGUAGE.bigram_base(seed=3)
LOG_P = LANGUAGE.log_probs(BASE)
PSI = torch.where(LANGUAGE.lacks(letter=0), -0.5, 0.0).double()  # (N,)
BASES = range(40)


def expected(log_p: Tensor, x: Tensor) -> float:
    return float((log_p.exp() * x).sum())


# --- Prop. 3.2: LA-TB's target as an information projection -------------------------------------


def nearest_of_mean_length(log_p: Tensor, start: Tensor) -> Tensor:
    """argmin of KL(q || p) over the q with the mean length of `start`, as log q, (N,).

    Newton's method along directions that keep sum and mean length, from `start`; it knows of no
    exponential tilt.
    """
    kept = torch.stack([torch.ones_like(LENGTHS), LENGTHS])  # (2, N)
    free = torch.linalg.svd(kept).Vh[2:].T  # (N, N - 2), orthogonal to both
    q = start.clone()
    for _ in range(200):
        slope = free.T @ (q.log() + 1 - log_p)
        curve = free.T @ (free / q[:, None])
        step = -free @ torch.linalg.solve(curve, slope)
        scale = 1.0
        while bool((q + scale * step <= 0).any()):
            scale *= 0.5
        value = kl(q.log(), log_p)
        while kl((q + scale * step).log(), log_p) > value and scale > 1e-9:
            scale *= 0.5
        q = q + scale * step
        if float((scale * step).abs().max()) < 1e-15:
            break
    return q.log()


def of_mean_length(mean: float, q: Tensor) -> Tensor:
    """q mixed with the shortest or the longest strings until its mean length is `mean`, (N,)."""
    now = float((q * LENGTHS).sum())
    extreme = LENGTHS.min() if mean < now else LENGTHS.max()
    end = (extreme == LENGTHS).double()
    end = end / end.sum()
    share = (mean - now) / (float((end * LENGTHS).sum()) - now)
    return (1 - share) * q + share * end


@pytest.mark.parametrize("psi", [torch.zeros_like(PSI), PSI], ids=["plain", "psi"])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_la_tbs_target_is_the_least_change_of_p_alpha_among_those_of_its_mean_length(
    alpha: float, psi: Tensor
) -> None:
    power, _ = LANGUAGE.power_target(BASE, alpha, psi)
    target, _ = LANGUAGE.length_averaged_target(BASE, alpha, psi)
    mean = expected(target, LENGTHS)
    start = of_mean_length(mean, torch.full_like(LENGTHS, 1 / len(LENGTHS)))
    assert float((start * LENGTHS).sum()) == pytest.approx(mean)
    assert total_variation(start.log(), target) > 0.1
    found = nearest_of_mean_length(power, start)
    assert expected(found, LENGTHS) == pytest.approx(mean, abs=1e-9)
    assert total_variation(found, target) < 1e-6
    assert kl(found, power) == pytest.approx(kl(target, power), abs=1e-9)
    assert total_variation(power, target) > 0.05  # it is a change


@given(st.integers(0, 2**31), st.floats(0.02, 1.0))
@settings(max_examples=30, deadline=None)
def test_every_other_distribution_of_that_mean_length_is_further_by_its_kl_to_the_target(
    seed: int, share: float
) -> None:
    """KL(q || p) = KL(q || target) + KL(target || p), the Pythagorean theorem of projections."""
    power, _ = LANGUAGE.power_target(BASE, 2.0)
    target, _ = LANGUAGE.length_averaged_target(BASE, 2.0)
    noise = torch.rand(len(LANGUAGE), generator=torch.Generator().manual_seed(seed)).double()
    q = (1 - share) * target.exp() + share * noise / noise.sum()
    q = of_mean_length(expected(target, LENGTHS), q).log()
    assert expected(q, LENGTHS) == pytest.approx(expected(target, LENGTHS))
    assert kl(q, power) == pytest.approx(kl(q, target) + kl(target, power), abs=1e-9)
    assert kl(q, power) > kl(target, power)


# --- Prop. 3.3: how far it lies from p^alpha -----------------------------------------------------


def distortion(alpha: float) -> tuple[float, float, float, float]:
    """lambda, the formula of second order, and the true KLs of either direction."""
    power, _ = LANGUAGE.power_target(BASE, alpha)
    target, price = LANGUAGE.length_averaged_target(BASE, alpha)
    variance = expected(power, LENGTHS**2) - expected(power, LENGTHS) ** 2
    return price, 0.5 * price**2 * variance, kl(target, power), kl(power, target)


def test_the_distortion_is_half_lambda_squared_var_length_with_an_error_of_third_order() -> None:
    """The error over lambda^3 tends to a third (a sixth, for the other direction) of minus the
    third cumulant of the length."""
    power, _ = LANGUAGE.power_target(BASE, 1.0)
    third = expected(power, (LENGTHS - expected(power, LENGTHS)) ** 3)
    assert abs(third) > 0.5
    previous = math.inf
    for distance in (0.04, 0.02, 0.01, 0.005):
        for alpha in (1 - distance, 1 + distance):
            price, formula, of_target, of_power = distortion(alpha)
            for found, order in ((of_target, 3), (of_power, 6)):
                cubic = (found - formula) / price**3
                assert cubic == pytest.approx(-third / order, rel=4 * distance)
        error = abs(of_target - formula)
        assert error < 0.15 * previous  # an eighth
        previous = error


def test_the_distortion_formula_is_of_no_use_at_large_lambda() -> None:
    price, formula, of_target, of_power = distortion(4.0)
    assert price < -2
    assert of_target > 2.5 * formula
    assert of_power > 2.5 * formula


# --- the fixed point -----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9, 1.1, 2.0, 4.0, 8.0])
def test_log_z_has_the_sign_of_1_minus_alpha(alpha: float) -> None:
    for seed in BASES:
        _, price = LANGUAGE.length_averaged_target(LANGUAGE.bigram_base(seed), alpha)
        assert math.copysign(1.0, price) == math.copysign(1.0, 1 - alpha)
    assert abs(LANGUAGE.length_averaged_target(BASE, 1.0)[1]) < 1e-12


def test_psi_shifts_log_z_and_can_turn_its_sign() -> None:
    for alpha in (0.5, 1.0, 2.0):
        plain = LANGUAGE.length_averaged_target(BASE, alpha)[1]
        assert LANGUAGE.length_averaged_target(BASE, alpha, PSI)[1] < plain - 0.03
    assert LANGUAGE.length_averaged_target(BASE, 0.97)[1] > 0
    assert LANGUAGE.length_averaged_target(BASE, 0.97, PSI)[1] < 0


def test_sharpening_by_la_tb_lengthens_on_some_bases_and_shortens_on_others() -> None:
    longer = []
    for seed in BASES:
        base = LANGUAGE.bigram_base(seed)
        target, _ = LANGUAGE.length_averaged_target(base, 4.0)
        longer.append(expected(target, LENGTHS) > expected(LANGUAGE.log_probs(base), LENGTHS))
        plain, _ = LANGUAGE.power_target(base, 4.0)
        assert expected(target, LENGTHS) > expected(plain, LENGTHS)  # than p^alpha, always here
    assert 0.25 < sum(longer) / len(longer) < 0.75


# --- majority voting as alpha grows --------------------------------------------------------------


def test_p_alpha_puts_all_mass_on_the_most_probable_trajectory_as_alpha_grows() -> None:
    mode = int(LOG_P.argmax())
    masses = [float(LANGUAGE.power_target(BASE, a)[0][mode].exp()) for a in (1, 4, 16, 64)]
    assert masses == sorted(masses)
    assert masses[0] < 0.2
    assert masses[-1] > 1 - 1e-3


def test_la_tb_puts_it_on_the_trajectory_of_the_best_mean_log_prob_instead() -> None:
    """lambda / alpha tends to the greatest B / |y|: every pi(y) <= 1 bounds it from below, and one
    pi(y) >= 1 / N from above. So all mass goes where B / |y| is greatest, and that need not be the
    mode."""
    elsewhere = 0
    for seed in BASES:
        base = LANGUAGE.bigram_base(seed)
        B = LANGUAGE.log_probs(base)
        average = B / LENGTHS
        best, second = average.topk(2).values
        alpha = 40 / float(best - second)
        target, price = LANGUAGE.length_averaged_target(base, alpha)
        assert price / alpha == pytest.approx(float(best), abs=math.log(len(B)) / alpha)
        assert int(target.argmax()) == int(average.argmax())
        assert float(target.max().exp()) > 0.999
        elsewhere += int(average.argmax()) != int(B.argmax())
    assert elsewhere >= 5


def voting(votes: dict[int, float]) -> tuple[Tensor, Tensor]:
    """A base with these chances of a few strings, and a trace of every other; (prefixes, V) logits
    and (N,) log-probs."""
    p = torch.full((len(LANGUAGE),), 1e-6, dtype=torch.float64)
    for string, chance in votes.items():
        p[string] = chance
    log_p = (p / p.sum()).log()
    return LANGUAGE.logits_of(log_p), log_p


def test_the_modes_answer_need_not_be_the_majoritys() -> None:
    """Two trajectories with the answer A (their last letter) have 0.3 each, one with B has 0.4: a
    vote over answers says A, and p^alpha goes to B."""
    two = [row for row in range(len(LANGUAGE)) if int(LENGTHS[row]) == 3]
    answer = LANGUAGE.token[:, 1]  # the last letter of strings of two letters and the end symbol
    a = [row for row in two if int(answer[row]) == 0]
    b = [row for row in two if int(answer[row]) == 1]
    base, log_p = voting({a[0]: 0.3, a[1]: 0.3, b[0]: 0.4})
    p = log_p.exp()
    assert float(p[a].sum()) > float(p[b].sum())
    power, _ = LANGUAGE.power_target(base, 64.0)
    averaged, _ = LANGUAGE.length_averaged_target(base, 64.0)
    for target in (power, averaged):
        assert float(target[b[0]].exp()) > 0.999
    # the limit of RL with the majority's answer as reward keeps all of its trajectories
    reward = torch.zeros_like(p)
    reward[a] = 1.0
    kept = (log_p + 64.0 * reward).softmax(0)
    assert float(kept[a[0]]) == pytest.approx(0.5, abs=1e-4)
    assert float(kept[a[1]]) == pytest.approx(0.5, abs=1e-4)


# --- pairwise inversions -------------------------------------------------------------------------


ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=12
)


@given(ROWS)
@settings(max_examples=60, deadline=None)
def test_the_inversion_rate_is_the_share_of_pairs_that_two_rankings_order_differently(
    rows: list[tuple[int, int, int]],
) -> None:
    pairs = inverted = 0
    for i, (group, x, y) in enumerate(rows):
        for other, u, v in rows[:i]:
            if group == other:
                pairs += 1
                inverted += (x < u and y > v) or (x > u and y < v)
    group, x, y = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = inversion_rate(x.double(), y.double(), group, tie=0.5)
    assert float(found) == pytest.approx(inverted / max(pairs, 1))


def test_rounding_is_no_inversion() -> None:
    x, y, group = torch.tensor([1.0, 1.0 + 1e-6]), torch.tensor([2.0, 2.0 - 1e-6]), torch.zeros(2)
    assert float(inversion_rate(x.double(), y.double(), group, tie=1e-3)) == 0.0
    assert float(inversion_rate(x.double(), y.double(), group, tie=0.0)) == 1.0


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_a_power_of_the_base_inverts_no_pair_and_la_tbs_target_does(alpha: float) -> None:
    """Of its own ideal ranking alpha B - lambda |y| it inverts none either."""
    power, _ = LANGUAGE.power_target(BASE, alpha)
    target, price = LANGUAGE.length_averaged_target(BASE, alpha)
    ideal = alpha * LOG_P - price * LENGTHS
    assert exact_inversion_rate(power, LOG_P, power) == 0.0
    assert exact_inversion_rate(target, ideal, target) == 0.0
    assert exact_inversion_rate(target, LOG_P, target) > 0.02


def test_the_rate_on_samples_is_that_of_all_pairs_of_strings() -> None:
    target, _ = LANGUAGE.length_averaged_target(BASE, 2.0)
    exact = exact_inversion_rate(target, LOG_P, target)
    brute = sum(
        float(target[i].exp() * target[j].exp())
        for i in range(len(LANGUAGE))
        for j in range(len(LANGUAGE))
        if float((LOG_P[i] - LOG_P[j]) * (target[i] - target[j])) < -1e-15
    )
    assert exact == pytest.approx(brute, abs=1e-12)
    drawn = torch.multinomial(target.exp(), 8 * 4000, True, generator=torch.Generator())
    groups = torch.arange(len(drawn)) // 8
    rates = [
        inversion_rate(LOG_P[rows], target[rows], group, tie=1e-9)
        for rows, group in zip(drawn.split(800), groups.split(800), strict=True)
    ]
    assert float(torch.stack(rates).mean()) == pytest.approx(exact, abs=0.01)


# --- the weight of a token -----------------------------------------------------------------------


def test_la_tb_gives_each_token_of_a_long_response_less_weight_and_tb_does_not() -> None:
    """d loss / d log pi_t = 2 d / (N L) against 2 d / N: the objection to 1 / |y| of Dr. GRPO. The
    fixed point is the same for a policy that can reach it; the way there, and the best of a policy
    that cannot, are not."""
    inputs = inputs_for(LANGUAGE, LANGUAGE.bigram_base(5), BASE, log_z=0.3)
    log_pf = inputs.log_pf.clone().requires_grad_()
    for objective, power in ((la_tb, 1), (tb_traj, 0)):
        output = objective(type(inputs)(**{**vars(inputs), "log_pf": log_pf}), alpha=2.0)
        (gradient,) = torch.autograd.grad(output.loss, log_pf)
        weight = 2 * output.residual / (len(LANGUAGE) * LENGTHS**power)
        wanted = torch.where(inputs.mask, weight[:, None], 0.0)
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-12)

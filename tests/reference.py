"""A second implementation of every objective, slow and plain, to hold the real one against.

Formulas in nats over ragged Python lists: no padding, no mask, no tensor arithmetic, and no code
shared with `powerflow_lit.objectives`, whose dataclasses are used as containers only. Gradients
come from the complex step f'(x) = Im f(x + ih) / h, which is exact to rounding; what the method
treats as data (importance weights, rewards) is computed from the real part and so stays frozen.
"""

from __future__ import annotations

import cmath
import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from powerflow_lit.objectives import LossInputs, LossOutput

Filler = Literal["nan", "minus_inf", "mixed", "noise"]
FILLERS: tuple[Filler, ...] = ("nan", "minus_inf", "mixed", "noise")
Objective = Callable[[LossInputs], LossOutput]


# --- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ragged:
    """Trajectories without padding; one inner list per trajectory."""

    log_pf: list[list[float]]
    log_p_base: list[list[float]]
    log_p_old: list[list[float]]
    log_z: list[float]
    psi: list[float]
    prompt: list[int]

    def __len__(self) -> int:
        return len(self.log_pf)

    def select(self, rows: Sequence[int]) -> Ragged:
        return Ragged(
            log_pf=[self.log_pf[i] for i in rows],
            log_p_base=[self.log_p_base[i] for i in rows],
            log_p_old=[self.log_p_old[i] for i in rows],
            log_z=[self.log_z[i] for i in rows],
            psi=[self.psi[i] for i in rows],
            prompt=[self.prompt[i] for i in rows],
        )


def random_batch(
    seed: int, *, prompts: int = 3, rollouts: int = 4, longest: int = 6, with_psi: bool = True
) -> Ragged:
    """Random lengths 1..longest; the behaviour policy is near for even rows and far for odd."""
    rng = random.Random(seed)
    n = prompts * rollouts
    lengths = [1, longest, *(1 + rng.randrange(longest) for _ in range(n))][:n]

    def log_probs() -> list[list[float]]:
        return [[-rng.expovariate(1.5) for _ in range(length)] for length in lengths]

    log_pf = log_probs()
    drift = [(0.0, 0.5, 0.0, -0.5)[i % 4] for i in range(n)]  # nats, over the whole response
    order = list(range(prompts))
    rng.shuffle(order)
    z = {q: rng.gauss(0.0, 1.0) for q in order}
    prompt = [10 * order[i % prompts] for i in range(n)]  # interleaved, with gaps in the numbering
    return Ragged(
        log_pf=log_pf,
        log_p_base=log_probs(),
        log_p_old=[
            [x - d / len(row) + rng.gauss(0.0, 0.05) for x in row]
            for row, d in zip(log_pf, drift, strict=True)
        ],
        log_z=[z[q // 10] for q in prompt],
        psi=[rng.choice([0.0, -0.5]) if with_psi else 0.0 for _ in range(n)],
        prompt=prompt,
    )


def padded(
    batch: Ragged,
    *,
    filler: Filler = "mixed",
    extra: int = 2,
    side: Literal["right", "left"] = "right",
    dtype: torch.dtype = torch.float64,
) -> LossInputs:
    """The batch as the objectives take it: `extra` more columns than needed, padding `filler`."""
    width = max(map(len, batch.log_pf)) + extra
    mask = torch.zeros(len(batch), width, dtype=torch.bool)
    for i, row in enumerate(batch.log_pf):
        start = 0 if side == "right" else width - len(row)
        mask[i, start : start + len(row)] = True
    noise = torch.Generator().manual_seed(width)

    def fill(rows: list[list[float]]) -> Tensor:
        out = torch.randn(mask.shape, generator=noise, dtype=torch.float64)
        if filler == "nan":
            out.fill_(math.nan)
        elif filler == "minus_inf":
            out.fill_(-math.inf)
        elif filler == "mixed":
            nan, plus, minus = (torch.full_like(out, v) for v in (math.nan, math.inf, -math.inf))
            out = torch.where(out > 0.3, nan, torch.where(out < -0.3, minus, plus))
        out[mask] = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
        return out.to(dtype)

    return LossInputs(
        log_pf=fill(batch.log_pf).requires_grad_(),
        log_p_base=fill(batch.log_p_base),
        log_p_old=fill(batch.log_p_old),
        mask=mask,
        log_z=torch.tensor(batch.log_z, dtype=dtype).requires_grad_(),
        format_penalty=torch.tensor(batch.psi, dtype=dtype),
        prompt_index=torch.tensor(batch.prompt),
    )


# --- importance weights --------------------------------------------------------------------------


@dataclass(frozen=True)
class RowWeight:
    value: float  # multiplies the trajectory's term
    log_ratio: float  # raw, at the kind's scale
    clipped: float  # share of ratios outside the range


WeightOf = Callable[[Ragged, int], RowWeight]


def weight_of(kind: str, low: float | None, high: float | None) -> WeightOf:
    """w = clip(pi / pi_old, 1 - low, 1 + high) over the sequence, its geometric mean, or tokens."""
    floor = 0.0 if low is None else 1.0 - low
    ceiling = math.inf if high is None else 1.0 + high

    def clip(ratio: float) -> float:
        return min(max(ratio, floor), ceiling)

    def outside(ratio: float) -> float:
        return float(ratio < floor or ratio > ceiling)

    def weight(batch: Ragged, i: int) -> RowWeight:
        new, old = batch.log_pf[i], batch.log_p_old[i]
        ratios = [math.exp(a - b) for a, b in zip(new, old, strict=True)]
        whole = math.prod(ratios)
        if kind == "none":
            return RowWeight(1.0, math.log(whole), 0.0)
        if kind == "seq_sum":
            return RowWeight(clip(whole), math.log(whole), outside(whole))
        if kind == "seq_geo":
            mean = whole ** (1.0 / len(ratios))
            return RowWeight(clip(mean), math.log(mean), outside(mean))
        assert kind == "token"
        value = sum(map(clip, ratios)) / len(ratios)
        return RowWeight(value, math.log(whole), sum(map(outside, ratios)) / len(ratios))

    return weight


UNWEIGHTED = weight_of("none", None, None)


# --- terms: one trajectory's contribution to the mean --------------------------------------------

Row = Sequence[complex]
Term = Callable[[Ragged, int, Row, complex], complex]


@dataclass(frozen=True)
class Reference:
    """term(batch, i, log_pf_i, log_z_i) before the weight, and the residual that is logged."""

    term: Term
    residual: Callable[[Ragged, int], float]
    weight: WeightOf = UNWEIGHTED
    has_parts: bool = False  # its term is more than the residual squared


def balance(residual: Term, weight: WeightOf = UNWEIGHTED, term: Term | None = None) -> Reference:
    def square(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        return residual(batch, i, x, z) ** 2

    def logged(batch: Ragged, i: int) -> float:
        return complex(residual(batch, i, batch.log_pf[i], batch.log_z[i])).real

    return Reference(term or square, logged, weight)


def tb_traj_reference(alpha: float) -> Reference:
    """z + S - alpha (B + |y| psi)."""

    def residual(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        energy = sum(batch.log_p_base[i]) + len(x) * batch.psi[i]
        return z + sum(x) - alpha * energy

    return balance(residual)


def la_tb_reference(alpha: float, weight: WeightOf = UNWEIGHTED) -> Reference:
    """z' + S/|y| - alpha (B/|y| + psi)."""

    def residual(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        b = sum(batch.log_p_base[i]) / len(x)
        return z + sum(x) / len(x) - alpha * (b + batch.psi[i])

    return balance(residual, weight)


def powerflow_reference(alpha: float, epsilon: float) -> Reference:
    return la_tb_reference(alpha, weight_of("seq_sum", epsilon, epsilon))


def tb_token_reference(alpha: float, scale: float, reading: str) -> Reference:
    def energy(batch: Ragged, i: int) -> float:
        return sum(batch.log_p_base[i]) / len(batch.log_p_base[i]) + batch.psi[i]

    def as_energy(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        base = sum(batch.log_p_base[i])
        return z + sum(x) - base - scale * (alpha - 1.0) * energy(batch, i)

    def as_power(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        return z + sum(x) - alpha * energy(batch, i)

    return balance({"energy": as_energy, "power": as_power}[reading])


def per_token_reference(alpha: float, weight: WeightOf = UNWEIGHTED) -> Reference:
    """Mean over tokens of (z + log pi_t - alpha (log p_base_t + psi))^2."""

    def deviations(batch: Ragged, i: int, x: Row, z: complex) -> list[complex]:
        psi = batch.psi[i]
        return [z + a - alpha * (b + psi) for a, b in zip(x, batch.log_p_base[i], strict=True)]

    def term(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        d = deviations(batch, i, x, z)
        return sum(v * v for v in d) / len(d)

    def residual(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        d = deviations(batch, i, x, z)
        return sum(d) / len(d)

    return replace(balance(residual, weight, term), has_parts=True)


def policy_gradient_reference(
    energy: str,
    alpha: float,
    *,
    kl: str = "in_reward",
    advantage: str = "rloo",
    reduction: str = "sequence_sum",
    weight: WeightOf = UNWEIGHTED,
) -> Reference:
    """-A S with A from R = r - beta (S - B), beta = 1/(alpha - 1), all of it data but S."""
    beta = 1.0 / (alpha - 1.0)

    def reward(batch: Ragged, i: int) -> float:
        B, L = sum(batch.log_p_base[i]), len(batch.log_p_base[i])
        r = B / L + batch.psi[i]
        if energy == "traj":
            r = B + L * batch.psi[i] * alpha / (alpha - 1.0)
        return r - beta * (sum(batch.log_pf[i]) - B) if kl == "in_reward" else r

    def group(batch: Ragged, i: int) -> list[int]:
        return [j for j in range(len(batch)) if batch.prompt[j] == batch.prompt[i]]

    def centred(batch: Ragged, i: int) -> float:
        rewards = [reward(batch, j) for j in group(batch, i)]
        return reward(batch, i) - sum(rewards) / len(rewards)

    def advantage_of(batch: Ragged, i: int) -> float:
        if advantage == "rloo":
            others = [reward(batch, j) for j in group(batch, i) if j != i]
            return reward(batch, i) - sum(others) / len(others)
        if advantage == "group":
            return centred(batch, i)
        assert advantage == "grpo"
        rewards = [reward(batch, j) for j in group(batch, i)]
        deviation = float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0
        return centred(batch, i) / (deviation + 1e-6)

    def term(batch: Ragged, i: int, x: Row, z: complex) -> complex:
        share = 1.0 if reduction == "sequence_sum" else 1.0 / len(x)
        value = -advantage_of(batch, i) * sum(x) * share
        if kl == "k3_loss":
            gaps = [b - a for a, b in zip(x, batch.log_p_base[i], strict=True)]
            value += beta * share * sum(cmath.exp(g) - 1.0 - g for g in gaps)
        return value

    return Reference(term, centred, weight)


# --- what the reference says ---------------------------------------------------------------------


def reference_loss(reference: Reference, batch: Ragged) -> float:
    terms = [
        reference.weight(batch, i).value
        * complex(reference.term(batch, i, batch.log_pf[i], batch.log_z[i])).real
        for i in range(len(batch))
    ]
    return sum(terms) / len(batch)


def reference_gradients(reference: Reference, batch: Ragged) -> tuple[list[float], list[float]]:
    """d loss / d log_pf, token after token, and d loss / d log_z, by the complex step."""
    h, n = 1e-30, len(batch)
    by_token: list[float] = []
    by_z: list[float] = []
    for i in range(n):
        w, row, z = reference.weight(batch, i).value, batch.log_pf[i], batch.log_z[i]
        for t in range(len(row)):
            stepped = [complex(x, h if s == t else 0.0) for s, x in enumerate(row)]
            by_token.append(w * reference.term(batch, i, stepped, complex(z)).imag / h / n)
        stepped_z = reference.term(batch, i, [complex(x) for x in row], complex(z, h))
        by_z.append(w * complex(stepped_z).imag / h / n)
    return by_token, by_z


def reference_metrics(reference: Reference, batch: Ragged) -> dict[str, float]:
    residuals = [reference.residual(batch, i) for i in range(len(batch))]
    weights = [reference.weight(batch, i) for i in range(len(batch))]
    lengths = [len(row) for row in batch.log_pf]
    tokens = sum(lengths)
    S, B = sum(map(sum, batch.log_pf)), sum(map(sum, batch.log_p_base))
    ratios = [math.exp(w.log_ratio) for w in weights]
    log_ratios = [w.log_ratio for w in weights]
    within = {}
    if reference.has_parts:
        terms = [
            complex(reference.term(batch, i, row, batch.log_z[i])).real
            for i, row in enumerate(batch.log_pf)
        ]
        variances = [term - d * d for term, d in zip(terms, residuals, strict=True)]
        within["residual_std_within"] = math.sqrt(sum(variances) / len(batch))
    return {
        **within,
        "residual_mean": sum(residuals) / len(batch),
        "residual_abs": sum(map(abs, residuals)) / len(batch),
        "residual_std": statistics.pstdev(residuals),
        "log_z": sum(batch.log_z) / len(batch),
        "corr_residual_length": float(np.corrcoef(residuals, lengths)[0, 1]),
        "inversion_rate": _inversion_rate(batch),
        "entropy": -S / tokens,
        "kl_base": (S - B) / tokens,
        "is_weight_mean": sum(w.value for w in weights) / len(batch),
        "is_weight_min": min(w.value for w in weights),
        "is_weight_max": max(w.value for w in weights),
        "is_clip_frac": sum(w.clipped for w in weights) / len(batch),
        "is_log_ratio_q05": float(np.quantile(log_ratios, 0.05)),
        "is_log_ratio_q50": float(np.quantile(log_ratios, 0.5)),
        "is_log_ratio_q95": float(np.quantile(log_ratios, 0.95)),
        "ess": sum(ratios) ** 2 / (len(batch) * sum(r * r for r in ratios)),
    }


def _inversion_rate(batch: Ragged) -> float:
    """Pairs of a prompt's trajectories that policy and base order differently, as a share."""
    S, B = ([sum(row) for row in rows] for rows in (batch.log_pf, batch.log_p_base))
    pairs = [
        (S[i] - S[j]) * (B[i] - B[j])
        for i, j in itertools.combinations(range(len(batch)), 2)
        if batch.prompt[i] == batch.prompt[j]
    ]
    return sum(product < 0 for product in pairs) / len(pairs)


# --- checks --------------------------------------------------------------------------------------


def gradients(output: LossOutput, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """d loss / d log_pf (N, T) and d loss / d log_z (N,); zero where the loss does not depend."""
    sources = (inputs.log_pf, inputs.log_z)
    found = torch.autograd.grad(output.loss, sources, allow_unused=True)
    pairs = zip(found, sources, strict=True)
    by_pf, by_z = [torch.zeros_like(x) if g is None else g for g, x in pairs]
    return by_pf, by_z


def assert_loss_and_gradient(
    objective: Objective,
    reference: Reference,
    batch: Ragged,
    *,
    filler: Filler,
    side: Literal["right", "left"] = "right",
    atol: float = 1e-9,
) -> None:
    """Loss, gradient in log_pf (exactly 0 on padding) and in log_z equal the reference's."""
    inputs = padded(batch, filler=filler, side=side)
    output = objective(inputs)
    by_pf, by_z = gradients(output, inputs)
    expected_pf, expected_z = reference_gradients(reference, batch)
    assert output.loss.shape == ()
    assert_near(output.loss, reference_loss(reference, batch), atol)
    assert_near(by_pf[inputs.mask], expected_pf, atol)
    assert_near(by_z, expected_z, atol)
    on_padding = by_pf[~inputs.mask]
    torch.testing.assert_close(on_padding, torch.zeros_like(on_padding), atol=0.0, rtol=0.0)


def assert_metrics(
    objective: Objective, reference: Reference, batch: Ragged, *, filler: Filler
) -> None:
    """The logged metrics, no more and no fewer, and the residuals equal the reference's."""
    output = objective(padded(batch, filler=filler))
    expected = reference_metrics(reference, batch)
    assert set(output.metrics) == set(expected)
    for name, value in expected.items():
        assert not output.metrics[name].requires_grad, name
        assert_near(output.metrics[name], value, 1e-9, name)
    assert not output.residual.requires_grad
    assert_near(output.residual, [reference.residual(batch, i) for i in range(len(batch))], 1e-9)


def assert_near(actual: Tensor, expected: float | list[float], atol: float, name: str = "") -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        actual.detach().double(), wanted, atol=atol, rtol=1e-9, msg=lambda m: f"{name} {m}"
    )

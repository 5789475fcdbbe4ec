"""Trajectory-balance objectives: eq. 5 (TB), eq. 7 (LA-TB), eq. 9 (PowerFlow), and TB-token.

Notation (nats): S = sum_t log pi_theta(y_t), B = sum_t log p_base(y_t), |y| the response length,
s = S/|y|, b = B/|y|, psi the format penalty. Every objective is `mean(w * (log_z + mismatch)^2)`
with its own mismatch and weight w. With psi all of them share one target,
p_base(y)^alpha * exp(alpha |y| psi). Source: arXiv 2603.18363 (equation numbers of v1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from powerflow_lit.objectives.inputs import (
    LossInputs,
    LossOutput,
    ObjectiveError,
    check_alpha,
    check_epsilon,
    checked,
    lengths,
    masked_sum,
)
from powerflow_lit.objectives.weights import ImportanceWeight, Weights, weight_metrics

Reading = Literal["energy", "power", "per_token"]
UNWEIGHTED = ImportanceWeight("none", None, None)


# --- mismatches: the residual without log Z, (N,) ------------------------------------------------


def tb_traj_mismatch(inputs: LossInputs, *, alpha: float) -> Tensor:
    """S - alpha (B + |y| psi), eq. 5 without log Z on p_base^alpha exp(alpha |y| psi)."""
    check_alpha(alpha)
    S, B, L = sums(inputs)
    return S - alpha * (B + L * inputs.format_penalty)


def la_tb_mismatch(inputs: LossInputs, *, alpha: float) -> Tensor:
    """s - alpha (b + psi), eq. 7 without log Z': the energy surface averaged over the length."""
    check_alpha(alpha)
    S, B, L = sums(inputs)
    return S / L - alpha * (B / L + inputs.format_penalty)


def tb_token_mismatch(
    inputs: LossInputs, *, alpha: float, scale: float, reading: Reading
) -> Tensor:
    """TB on a token-averaged energy; the paper leaves its form open, so three readings stand.

    `energy`: S - B - k (alpha - 1)(b + psi), the TB twin of RL-token, with k = `scale` (tokens;
    the mean length of the first refill by default). `power`: S - alpha (b + psi).
    `per_token`: the mismatch of LA-TB, its spread over tokens added by `token_variance`.
    """
    check_alpha(alpha)
    if reading not in get_args(Reading):
        raise ObjectiveError(f"tb_token reading '{reading}': choose one of {get_args(Reading)}")
    if not scale > 0:
        raise ObjectiveError(f"tb_token scale={scale} must be positive (tokens)")
    S, B, L = sums(inputs)
    energy = B / L + inputs.format_penalty
    if reading == "energy":
        return S - B - scale * (alpha - 1) * energy
    if reading == "power":
        return S - alpha * energy
    return S / L - alpha * energy


def token_variance(inputs: LossInputs, *, alpha: float) -> Tensor:
    """Variance over a response's tokens of log pi_theta - alpha log p_base, (N,), nats squared."""
    ratio = inputs.log_pf - alpha * inputs.log_p_base
    L = lengths(inputs.mask)
    mean = masked_sum(ratio, inputs.mask) / L
    return masked_sum((ratio - mean[:, None]) ** 2, inputs.mask) / L


# --- objectives ----------------------------------------------------------------------------------


def tb_traj(inputs: LossInputs, *, alpha: float) -> LossOutput:
    """Trajectory balance (eq. 5): mean of (log Z + S - alpha (B + |y| psi))^2."""
    inputs = checked(inputs)
    return balance_loss(inputs, tb_traj_mismatch(inputs, alpha=alpha), UNWEIGHTED(inputs))


def la_tb(inputs: LossInputs, *, alpha: float) -> LossOutput:
    """Length-averaged trajectory balance (eq. 7): mean of (log Z' + s - alpha (b + psi))^2."""
    inputs = checked(inputs)
    return balance_loss(inputs, la_tb_mismatch(inputs, alpha=alpha), UNWEIGHTED(inputs))


def powerflow(inputs: LossInputs, *, alpha: float, epsilon: float) -> LossOutput:
    """PowerFlow (eq. 9): LA-TB, each square times w = clip(pi_theta/pi_old, 1 -+ epsilon) (eq. 10).

    Raises:
        ObjectiveError: alpha <= 0, epsilon outside (0, 1), an empty mask.
        NonFiniteInputError: NaN or infinity inside the mask.
    """
    check_epsilon(epsilon)
    inputs = checked(inputs)
    weight = ImportanceWeight("seq_sum", epsilon, epsilon)
    return balance_loss(inputs, la_tb_mismatch(inputs, alpha=alpha), weight(inputs))


def tb_token(inputs: LossInputs, *, alpha: float, scale: float, reading: Reading) -> LossOutput:
    """Trajectory balance on the average token log-prob; see `tb_token_mismatch`."""
    inputs = checked(inputs)
    mismatch = tb_token_mismatch(inputs, alpha=alpha, scale=scale, reading=reading)
    spread = token_variance(inputs, alpha=alpha) if reading == "per_token" else None
    return balance_loss(inputs, mismatch, UNWEIGHTED(inputs), spread)


def balance_loss(
    inputs: LossInputs, mismatch: Tensor, weights: Weights, spread: Tensor | None = None
) -> LossOutput:
    """mean(w * (d^2 + spread)) with the residual d = log_z + mismatch; gradient through d only."""
    d = inputs.log_z + mismatch  # (N,)
    square = d**2 if spread is None else d**2 + spread
    loss = (weights.value * square).mean()
    return LossOutput(loss, trajectory_metrics(inputs, d.detach(), weights), d.detach())


@dataclass(frozen=True)
class BalanceObjective:
    """A balance strategy assembled from configuration: a mismatch and an importance weight.

    The module also asks for `mismatch` and `weight` apart, for the closed forms of log Z.
    """

    mismatch: Callable[..., Tensor]
    weight: ImportanceWeight
    spread: Callable[..., Tensor] | None = None
    uses_log_z: bool = True

    def __call__(self, inputs: LossInputs, *, alpha: float, **calibration: float) -> LossOutput:
        inputs = checked(inputs)
        spread = None if self.spread is None else self.spread(inputs, alpha=alpha)
        mismatch = self.mismatch(inputs, alpha=alpha, **calibration)
        return balance_loss(inputs, mismatch, self.weight(inputs), spread)


# --- shared --------------------------------------------------------------------------------------


def sums(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """S, B in nats and |y| in tokens, (N,) each."""
    S = masked_sum(inputs.log_pf, inputs.mask)
    B = masked_sum(inputs.log_p_base, inputs.mask)
    return S, B, lengths(inputs.mask).to(S.dtype)


@torch.no_grad()
def trajectory_metrics(inputs: LossInputs, residual: Tensor, weights: Weights) -> dict[str, Tensor]:
    """The training metrics that every strategy logs, (N,) residuals in, scalars out."""
    S, B, L = sums(inputs)
    tokens = L.sum()
    return {
        "residual_mean": residual.mean(),
        "residual_abs": residual.abs().mean(),
        "log_z": inputs.log_z.mean(),
        "corr_residual_length": _correlation(residual, L),
        "entropy": -S.sum() / tokens,
        "kl_base": (S - B).sum() / tokens,
        **weight_metrics(weights),
    }


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation; 0 where either is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return torch.where(scale > 0, (x * y).sum() / scale.clamp(min=1e-30), torch.zeros_like(scale))

"""Trajectory-balance objectives: eq. 5 (TB), eq. 7 (LA-TB), eq. 9 (PowerFlow), and TB-token.

Notation (nats): S = sum_t log pi_theta(y_t), B = sum_t log p_base(y_t), |y| the response length,
s = S/|y|, b = B/|y|, psi the format penalty. Every objective is `mean(w * (log_z + mismatch)^2)`
with its own mismatch and weight w. With psi all of the paper's share one target,
p_base(y)^alpha * exp(alpha |y| psi). alpha is one number, or (N,) the same for all rollouts of a
prompt. Source: arXiv 2603.18363 (equation numbers of v1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from powerflow_lit.metrics.inversion import inversion_rate
from powerflow_lit.objectives.advantages import advantages
from powerflow_lit.objectives.inputs import (
    Alpha,
    LossInputs,
    LossOutput,
    ObjectiveError,
    check_alpha,
    check_epsilon,
    checked,
    lengths,
    masked_sum,
    per_token,
    refuse_length_price,
    reward_of,
)
from powerflow_lit.objectives.weights import ImportanceWeight, Weights, weight_metrics

Reading = Literal["energy", "power", "per_token"]
UNWEIGHTED = ImportanceWeight("none", None, None)
TIE = 1e-3  # nats; log-probs of equal responses out of two passes differ by less


# --- mismatches: the residual without log Z, (N,) ------------------------------------------------


def tb_traj_mismatch(inputs: LossInputs, *, alpha: Alpha) -> Tensor:
    """S - alpha (B + |y| psi), eq. 5 without log Z on p_base^alpha exp(alpha |y| psi).

    With a price lambda of length + lambda |y|: that target times exp(-lambda |y|).
    """
    check_alpha(alpha)
    S, B, L = sums(inputs)
    mismatch = S - alpha * (B + L * inputs.format_penalty)
    return mismatch if inputs.length_price is None else mismatch + L * inputs.length_price


def la_tb_mismatch(inputs: LossInputs, *, alpha: Alpha) -> Tensor:
    """s - alpha (b + psi), eq. 7 without log Z': the energy surface averaged over the length.

    log Z' already is a price of length, the one at which log Z is 0.
    """
    check_alpha(alpha)
    refuse_length_price(inputs, "a length-averaged residual")
    S, B, L = sums(inputs)
    return S / L - alpha * (B / L + inputs.format_penalty)


def tb_token_mismatch(
    inputs: LossInputs, *, alpha: Alpha, scale: float, reading: Reading
) -> Tensor:
    """TB on a token-averaged energy; the paper leaves its form open, so three readings stand.

    `energy`: S - B - k (alpha - 1)(b + psi), the TB twin of RL-token, with k = `scale` (tokens;
    the mean length of the first refill by default). `power`: S - alpha (b + psi). The third,
    `per_token`, is no squared residual alone: `tb_token`, or strategy=tb_token_per_token.
    """
    check_alpha(alpha)
    if reading not in ("energy", "power"):
        raise ObjectiveError(
            f"tb_token reading '{reading}': choose energy or power (strategy=tb_token), or "
            "strategy=tb_token_per_token for per_token"
        )
    if not scale > 0:
        raise ObjectiveError(f"tb_token scale={scale} must be positive (tokens)")
    refuse_length_price(inputs, "tb_token")
    S, B, L = sums(inputs)
    energy = B / L + inputs.format_penalty
    if reading == "energy":
        return S - B - scale * (alpha - 1) * energy
    return S - alpha * energy


def flowrl_mismatch(inputs: LossInputs, *, alpha: Alpha, scale: float) -> Tensor:
    """s - (b + psi) - scale A, FlowRL's residual without log Z; A is the reward as in GRPO.

    Its target is p_base exp(scale |y| A), so that alpha is not used (FlowRL, arXiv 2509.15207).

    Raises:
        ObjectiveError: no reward, or a scale that is not positive.
    """
    if not scale > 0:
        raise ObjectiveError(f"flowrl scale={scale} must be positive, e.g. 15")
    refuse_length_price(inputs, "flowrl")
    S, B, L = sums(inputs)
    reward = advantages(reward_of(inputs).to(S.dtype), inputs.prompt_index, "grpo")
    return S / L - (B / L + inputs.format_penalty) - scale * reward


def format_only_mismatch(inputs: LossInputs, *, alpha: Alpha) -> Tensor:
    """PowerFlow's at alpha = 1, whatever alpha is: nothing is sharpened, psi alone tilts."""
    return la_tb_mismatch(inputs, alpha=1.0)


def token_variance(inputs: LossInputs, *, alpha: Alpha) -> Tensor:
    """Variance over a response's tokens of log pi_theta - alpha log p_base, (N,), nats squared."""
    ratio = inputs.log_pf - per_token(alpha) * inputs.log_p_base
    L = lengths(inputs.mask)
    mean = masked_sum(ratio, inputs.mask) / L
    return masked_sum((ratio - mean[:, None]) ** 2, inputs.mask) / L


# --- objectives ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BalanceObjective:
    """mean(w * (log_z + mismatch)^2): a balance strategy is its mismatch and its weight.

    Attributes:
        mismatch: `(inputs, *, alpha, ...) -> (N,)`, the residual without log Z; the closed forms
            of log Z ask for it apart.
        weight: importance weight, detached.
        spread: `(inputs, *, alpha) -> (N,)`, added to the squared residual: what the residuals of
            a response's parts vary by (`token_variance`, `BlockVariance`).
    """

    mismatch: Callable[..., Tensor]
    weight: ImportanceWeight
    spread: Callable[..., Tensor] | None = None
    uses_log_z: bool = True

    @property
    def uses_log_p_old(self) -> bool:
        """Whether behaviour log-probs may change the loss; pieces of others are taken to."""
        pieces = [piece for piece in (self.mismatch, self.spread) if piece is not None]
        return self.weight.is_used or not all(map(_is_ours, pieces))

    @property
    def block_size(self) -> int | None:
        """Tokens of the blocks between which log_flow is asked for, if it is."""
        return getattr(self.spread, "block_size", None)

    def __call__(self, inputs: LossInputs, *, alpha: Alpha, **calibration: float) -> LossOutput:
        inputs = checked(inputs)
        d = inputs.log_z + self.mismatch(inputs, alpha=alpha, **calibration)  # (N,)
        square, weights = d**2, self.weight(inputs)
        within: dict[str, Tensor] = {}
        if self.spread is not None:
            variance = self.spread(inputs, alpha=alpha)
            square = square + variance
            within["residual_std_within"] = variance.detach().mean().sqrt()
        loss = (weights.value * square).mean()
        d = d.detach()
        return LossOutput(loss, {**trajectory_metrics(inputs, d, weights), **within}, d)


def tb_traj(inputs: LossInputs, *, alpha: Alpha) -> LossOutput:
    """Trajectory balance (eq. 5): mean of (log Z + S - alpha (B + |y| psi))^2."""
    return BalanceObjective(tb_traj_mismatch, UNWEIGHTED)(inputs, alpha=alpha)


def la_tb(inputs: LossInputs, *, alpha: Alpha) -> LossOutput:
    """Length-averaged trajectory balance (eq. 7): mean of (log Z' + s - alpha (b + psi))^2."""
    return BalanceObjective(la_tb_mismatch, UNWEIGHTED)(inputs, alpha=alpha)


def powerflow(inputs: LossInputs, *, alpha: Alpha, epsilon: float) -> LossOutput:
    """PowerFlow (eq. 9): LA-TB, each square times w = clip(pi_theta/pi_old, 1 -+ epsilon) (eq. 10).

    Raises:
        ObjectiveError: alpha <= 0, epsilon outside (0, 1), an empty mask.
        NonFiniteInputError: NaN or infinity inside the mask.
    """
    check_epsilon(epsilon)
    eq_10 = ImportanceWeight("seq_sum", epsilon, epsilon)
    return BalanceObjective(la_tb_mismatch, eq_10)(inputs, alpha=alpha)


def tb_token(inputs: LossInputs, *, alpha: Alpha, scale: float, reading: Reading) -> LossOutput:
    """Trajectory balance on the average token log-prob, in one of its three readings.

    `energy` and `power`: see `tb_token_mismatch`. `per_token`: the mean over tokens of
    (log Z + log pi_theta - alpha log p_base)^2, that is LA-TB plus the variance over tokens.
    """
    if reading == "per_token":
        objective = BalanceObjective(la_tb_mismatch, UNWEIGHTED, token_variance)
        return objective(inputs, alpha=alpha)
    mismatch = partial(tb_token_mismatch, scale=scale, reading=reading)
    return BalanceObjective(mismatch, UNWEIGHTED)(inputs, alpha=alpha)


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
        "residual_std": residual.std(unbiased=False),
        "log_z": inputs.log_z.mean(),
        "corr_residual_length": _correlation(residual, L),
        "inversion_rate": inversion_rate(B, S, inputs.prompt_index, tie=TIE),
        "entropy": -S.sum() / tokens,
        "kl_base": (S - B).sum() / tokens,
        **weight_metrics(weights),
    }


def _is_ours(piece: Callable[..., Tensor]) -> bool:
    """Whether it is of this package, where no mismatch reads `log_p_old`."""
    function = piece.func if isinstance(piece, partial) else piece
    return getattr(function, "__module__", "").startswith("powerflow_lit.")


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation; 0 where either is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return torch.where(scale > 0, (x * y).sum() / scale.clamp(min=1e-30), torch.zeros_like(scale))

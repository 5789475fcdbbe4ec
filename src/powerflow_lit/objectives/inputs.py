"""What an objective is given and what it returns, and the checks that refuse bad input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from powerflow_lit.mendable import MendableError

Alpha = float | Tensor  # the power of p_base: one for all, or (N,) one for each trajectory


class ObjectiveError(MendableError, ValueError):
    """An objective was given values outside its domain; the message names value and remedy."""


class NonFiniteInputError(ObjectiveError):
    """A log-prob, log Z or penalty that counts (inside the mask) is NaN or infinite."""


@dataclass(frozen=True)
class LossInputs:
    """Everything an objective sees. N trajectories, padded to T response tokens."""

    log_pf: Tensor  # (N, T) float  log pi_theta(y_t | q, y_<t), nats; carries the gradient
    log_p_base: Tensor  # (N, T) float  the same under the frozen base
    log_p_old: Tensor  # (N, T) float  the same under the behaviour policy
    mask: Tensor  # (N, T) bool  response tokens, end-of-sequence included
    log_z: Tensor  # (N,) float  log Z(q) or log Z'(q); may carry the gradient
    format_penalty: Tensor  # (N,) float  psi(y) <= 0
    prompt_index: Tensor  # (N,) long  equal for rollouts of one prompt
    reward: Tensor | None = None  # (N,) float  of the rollout, for strategies that take one
    token_entropy: Tensor | None = None  # (N, T) float  nats, of the policy; carries the gradient
    length_price: Tensor | None = None  # (N,) float  lambda of a chosen length, nats per token
    log_flow: Tensor | None = None  # (N, K) float  nats, of prefixes (`blockwise`); with gradient

    def __post_init__(self) -> None:
        shape = self.mask.shape
        if self.mask.dtype != torch.bool or len(shape) != 2:
            raise ObjectiveError(f"mask must be bool (N, T), got {self.mask.dtype} {tuple(shape)}")
        for name in ("log_pf", "log_p_base", "log_p_old", "token_entropy"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ObjectiveError(f"{name} has shape {tuple(value.shape)}, mask {tuple(shape)}")
        for name in ("log_z", "format_penalty", "prompt_index", "reward", "length_price"):
            value = getattr(self, name)
            if value is not None and value.shape != shape[:1]:
                raise ObjectiveError(
                    f"{name} has shape {tuple(value.shape)}, expected ({shape[0]},)"
                )


@dataclass(frozen=True)
class LossOutput:
    """The loss and what to log; `residual` is detached, for self-checks."""

    loss: Tensor  # () mean over the N trajectories, no hidden scale
    metrics: dict[str, Tensor]  # () each; keys are the contract's, without the "train/" prefix
    residual: Tensor  # (N,) nats (TB-traj, TB-token, RL) or nats per token (LA-TB)


def checked(inputs: LossInputs) -> LossInputs:
    """The inputs as an objective may use them: in at least float32, padding set to zero (so that no
    NaN there reaches a gradient), and no gradient but of log_pf, token_entropy, log_z and
    log_flow.

    Raises:
        ObjectiveError: no trajectory, a trajectory without response tokens, a positive penalty.
        NonFiniteInputError: NaN or infinity where the mask is set (padding may hold anything).
    """
    if inputs.mask.shape[0] == 0:
        raise ObjectiveError("no trajectories: the update is empty; check prompts_per_refill")
    lengths = inputs.mask.sum(1)
    if bool((lengths == 0).any()):
        rows = torch.nonzero(lengths == 0).flatten().tolist()
        raise ObjectiveError(
            f"trajectories {rows[:8]} have an empty mask: every response holds at least its "
            "end-of-sequence token; drop them before the update"
        )
    names = ("log_pf", "log_p_base", "log_p_old", "token_entropy")
    per_token = {n: x for n in names if (x := getattr(inputs, n)) is not None}
    for name, value in per_token.items():
        bad = ~torch.isfinite(value) & inputs.mask
        if bool(bad.any()):
            row, column = torch.nonzero(bad)[0].tolist()
            raise NonFiniteInputError(
                f"{name} is {value[row, column].item()} at trajectory {row}, token {column} "
                f"({int(bad.sum())} such tokens)"
            )
    for name in ("log_z", "format_penalty", "reward", "length_price"):
        value = getattr(inputs, name)
        if value is not None and not bool(torch.isfinite(value).all()):
            raise NonFiniteInputError(f"{name} holds a NaN or an infinity: {value.tolist()[:8]}")
    if bool((inputs.format_penalty > 0).any()):
        worst = inputs.format_penalty.max().item()
        raise ObjectiveError(
            f"format_penalty is {worst}, but psi(y) is a penalty: it must be 0 or negative"
        )
    clean = {n: torch.where(inputs.mask, _wide(x), 0.0) for n, x in per_token.items()}
    return LossInputs(
        log_pf=clean["log_pf"],
        log_p_base=clean["log_p_base"].detach(),
        log_p_old=clean["log_p_old"].detach(),
        mask=inputs.mask,
        log_z=_wide(inputs.log_z),
        format_penalty=_wide(inputs.format_penalty).detach(),
        prompt_index=inputs.prompt_index,
        reward=None if inputs.reward is None else _wide(inputs.reward).detach(),
        token_entropy=clean.get("token_entropy"),
        length_price=None if inputs.length_price is None else _wide(inputs.length_price).detach(),
        log_flow=None if inputs.log_flow is None else _wide(inputs.log_flow),
    )


def reward_of(inputs: LossInputs) -> Tensor:
    """The rewards, (N,).

    Raises:
        ObjectiveError: the rollouts came without.
    """
    if inputs.reward is None:
        raise ObjectiveError("the objective takes rewards and there are none: set strategy.reward")
    return inputs.reward


def refuse_length_price(inputs: LossInputs, objective: str) -> None:
    """Raises ObjectiveError if a price of length is set, for which the objective has no place."""
    if inputs.length_price is not None:
        raise ObjectiveError(
            f"length_price with {objective}: there the length follows from the objective and "
            "cannot be chosen; take strategy=powerflow_length or tb_traj, or length_control=none"
        )


def per_token(alpha: Alpha) -> Alpha:
    """alpha as a factor of (N, T) values: one of each trajectory's becomes (N, 1)."""
    return alpha[:, None] if isinstance(alpha, Tensor) and alpha.dim() else alpha


def check_alpha(alpha: Alpha, above: float = 0.0, why: str = "the power of p_base") -> None:
    """Raises ObjectiveError unless alpha is finite and greater than `above`, all of it."""
    wrong = [a for a in torch.as_tensor(alpha).flatten().tolist() if not above < a < float("inf")]
    if wrong:
        raise ObjectiveError(f"alpha={wrong[0]}: {why} needs alpha > {above:g}; set alpha=")


def check_epsilon(epsilon: float) -> None:
    """Raises ObjectiveError unless epsilon lies in (0, 1)."""
    if not (0.0 < epsilon < 1.0):
        raise ObjectiveError(
            f"epsilon={epsilon}: the clip range of eq. 10 must lie strictly between 0 and 1; "
            "the default is epsilon=0.2"
        )


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over response tokens, (N, T) -> (N,); padding is excluded, whatever it holds."""
    return torch.where(mask, x, torch.zeros_like(x)).sum(1)


def lengths(mask: Tensor) -> Tensor:
    """|y| in tokens, (N, T) bool -> (N,) long."""
    return mask.sum(1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

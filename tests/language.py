"""Training on the enumerable language to the end, for tests that only ask where it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from powerflow_lit.enumerable import Language
from powerflow_lit.enumerable_training import (
    FlowTable,
    Objective,
    Recipe,
    Step,
    all_strings,
    inputs_for,
    own_samples,
    training,
    with_log_z,
)


@dataclass(frozen=True)
class Trained:
    log_p: Tensor  # (N,) of every string
    log_z: float


def train_on_samples(
    language: Language,
    base: Tensor,
    objective: Objective,
    log_z: nn.Module,
    recipe: Recipe,
    *,
    psi: Tensor | float = 0.0,
    seed: int = 0,
    flow: FlowTable | None = None,
) -> Trained:
    """From the base, on strings drawn from the current policy."""
    batch = own_samples(language, base, recipe, psi=psi, seed=seed, flow=flow)
    return _end(language, training(base, objective, log_z, recipe, batch))


def train_on_all_strings(
    language: Language,
    base: Tensor,
    objective: Objective,
    log_z: nn.Module,
    recipe: Recipe,
    *,
    psi: Tensor | float = 0.0,
) -> Trained:
    """From the base, on every string once."""
    batch = all_strings(language, base, psi)
    return _end(language, training(base, objective, log_z, recipe, batch))


def minimise_on_all_strings(
    language: Language,
    base: Tensor,
    objective: Objective,
    log_z: nn.Module,
    *,
    psi: Tensor | float = 0.0,
    iterations: int = 600,
    flow: FlowTable | None = None,
) -> Trained:
    """From the base, the loss over all strings equally weighted, by L-BFGS (balance losses)."""
    logits = base.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits, *log_z.parameters()],
        max_iter=iterations,
        max_eval=3 * iterations,
        history_size=100,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        inputs = with_log_z(inputs_for(language, logits, base, psi=psi, flow=flow), log_z)
        loss = objective(inputs).loss
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    last = with_log_z(inputs_for(language, logits.detach(), base, psi=psi), log_z)
    return Trained(language.log_probs(logits.detach()), float(last.log_z.detach().mean()))


def _end(language: Language, steps: Iterator[Step]) -> Trained:
    last = deque(steps, maxlen=1).pop()
    return Trained(language.log_probs(last.logits), last.log_z)

"""Trajectories of the enumerable language as inputs of an objective, and tables trained by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from powerflow_lit.blocks import inner_boundaries
from powerflow_lit.enumerable import Language
from powerflow_lit.objectives import LossInputs, LossOutput, group_log_z

Objective = Callable[[LossInputs], LossOutput]
Batch = Callable[[Tensor, int], LossInputs]  # (logits, step) -> what the next update is made of


# --- inputs --------------------------------------------------------------------------------------


def inputs_for(
    language: Language,
    logits: Tensor,
    base: Tensor,
    *,
    log_z: Tensor | float = 0.0,
    rows: Tensor | None = None,
    log_p_old: Tensor | None = None,
    psi: Tensor | float = 0.0,
    group: int | None = None,
    flow: FlowTable | None = None,
) -> LossInputs:
    """The strings `rows` (default: all, once each) as rollouts of one prompt, or as groups of
    `group` rollouts each.

    Without `log_p_old` the behaviour policy is the uniform distribution over the strings, under
    which the unclipped sequence weight is N pi(y): the mean is then an exact expectation.
    """
    rows = torch.arange(len(language)) if rows is None else rows
    log_pf = language.token_log_probs(logits)[rows]
    if log_p_old is None:  # the whole of -log N on the first token
        log_p_old = torch.zeros_like(log_pf)
        log_p_old[:, 0] = -math.log(len(language))
    return LossInputs(
        log_pf=log_pf,
        log_p_base=language.token_log_probs(base)[rows],
        log_p_old=log_p_old,
        mask=language.mask[rows],
        log_z=torch.as_tensor(log_z, dtype=torch.float64).expand(len(rows)),
        format_penalty=torch.as_tensor(psi, dtype=torch.float64).expand(len(language))[rows],
        prompt_index=torch.arange(len(rows)) // (group or len(rows)),
        log_flow=None if flow is None else flow.at_boundaries(rows),
    )


# --- where log Z comes from, as modules of the inputs --------------------------------------------


class LearnedScalar(nn.Module):
    """One trained number: what a head is when there is one prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: LossInputs) -> Tensor:
        return self.value.expand(len(inputs.mask))


class FlowTable(LearnedScalar):
    """log Z' and log V of every unfinished prefix, trained together: what a flow head is here."""

    def __init__(self, language: Language, block_size: int) -> None:
        super().__init__()
        self.language, self.block_size = language, block_size
        self.table = nn.Parameter(torch.zeros(len(language.last_letter), dtype=torch.float64))

    def at_boundaries(self, rows: Tensor) -> Tensor:
        """log V between the blocks of the strings `rows`, (n, K); anything where one has ended."""
        every = self.language.prefix[rows]  # (n, T)
        boundaries = inner_boundaries(every.shape[1], self.block_size)
        places = self.block_size * torch.arange(1, boundaries + 1)
        return self.table[every[:, places.clamp(max=every.shape[1] - 1)]]


class Frozen(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, inputs: LossInputs) -> Tensor:
        return torch.full((len(inputs.mask),), self.value, dtype=torch.float64)


class ClosedForm(nn.Module):
    """Minus the mean mismatch of the rollouts, from the project's own closed form."""

    def __init__(self, mismatch: Callable[[LossInputs], Tensor]) -> None:
        super().__init__()
        self.mismatch = mismatch

    def forward(self, inputs: LossInputs) -> Tensor:
        mismatch = self.mismatch(inputs)
        return group_log_z(mismatch, torch.ones_like(mismatch), inputs.prompt_index)


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Adam; both learning rates fall linearly to zero."""

    steps: int
    lr: float
    lr_z: float
    samples: int = 256  # per refill, on-policy only
    updates_per_refill: int = 1  # beyond 1 the later ones are off-policy


@dataclass(frozen=True)
class Step:
    """The policy after `number` updates, and what its next batch says."""

    number: int
    logits: Tensor  # (prefixes, V)
    log_z: float  # mean over the batch
    loss: float


def all_strings(
    language: Language,
    base: Tensor,
    psi: Tensor | float = 0.0,
    flow: FlowTable | None = None,
) -> Batch:
    """Every string once: an objective with the unclipped sequence weight then follows its exact
    on-policy gradient."""
    return lambda logits, step: inputs_for(language, logits, base, psi=psi, flow=flow)


def own_samples(
    language: Language,
    base: Tensor,
    recipe: Recipe,
    *,
    psi: Tensor | float = 0.0,
    seed: int = 0,
    group: int | None = None,
    base_share: float = 0.0,
    as_mixture: bool = False,
    flow: FlowTable | None = None,
) -> Batch:
    """Strings drawn from the current policy; all updates of a refill use the whole of it.

    Args:
        group: rollouts of a prompt; None: all are of one.
        base_share: of each group, drawn from the base.
        as_mixture: every string has the chance that the mixture of both gave it (the balance
            heuristic), not that of whichever drew it.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, log_p_old = torch.tensor([]), torch.tensor([])
    size = group or recipe.samples
    of_base = round(base_share * size)

    def drawn(logits: Tensor, each: int) -> Tensor:
        """(groups, each) strings."""
        if each == 0:
            return torch.zeros(recipe.samples // size, 0, dtype=torch.long)
        chances, count = language.log_probs(logits).exp(), recipe.samples // size * each
        return torch.multinomial(chances, count, True, generator=generator).view(-1, each)

    def behaviour(old: Tensor, rows: Tensor) -> Tensor:
        """(N, T) nats."""
        by_policy = torch.arange(len(rows)) % size < size - of_base
        log_probs = [language.token_log_probs(logits)[rows] for logits in (old, base)]
        if not as_mixture:
            return torch.where(by_policy[:, None], log_probs[0], log_probs[1])
        shares = torch.tensor([1 - of_base / size, of_base / size], dtype=old.dtype).log()
        mixed = torch.zeros_like(log_probs[0])
        mixed[:, 0] = torch.logsumexp(torch.stack([x.sum(1) for x in log_probs], 1) + shares, 1)
        return mixed

    def batch(logits: Tensor, step: int) -> LossInputs:
        nonlocal rows, log_p_old
        if step % recipe.updates_per_refill == 0:
            old = logits.detach()
            rows = torch.cat([drawn(old, size - of_base), drawn(base, of_base)], 1).flatten()
            log_p_old = behaviour(old, rows)
        return inputs_for(
            language, logits, base, rows=rows, log_p_old=log_p_old, psi=psi, group=group, flow=flow
        )

    return batch


def training(
    base: Tensor, objective: Objective, log_z: nn.Module, recipe: Recipe, batch: Batch
) -> Iterator[Step]:
    """Adam from the base: a `Step` before every update and one after the last."""
    logits = base.clone().requires_grad_()
    groups = [{"params": [logits], "lr": recipe.lr}]
    if of_z := list(log_z.parameters()):
        groups.append({"params": of_z, "lr": recipe.lr_z})
    optimizer = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 - k / recipe.steps)
    for number in range(recipe.steps + 1):
        inputs = with_log_z(batch(logits, number), log_z)
        loss = objective(inputs).loss
        mean_z = float(inputs.log_z.detach().mean())
        yield Step(number, logits.detach().clone(), mean_z, float(loss.detach()))
        if number < recipe.steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()


def with_log_z(inputs: LossInputs, log_z: nn.Module) -> LossInputs:
    return replace(inputs, log_z=log_z(inputs))

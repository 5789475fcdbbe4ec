"""The modes of `log_z=`: where log Z (or Z', length-averaged) of a prompt comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from powerflow_lit.models.z_head import Pool, ZHead
from powerflow_lit.objectives import group_log_z, leave_one_out_log_z


@dataclass(frozen=True)
class LogZContext:
    """What a mode may look at. N trajectories of whole prompt groups."""

    mismatch: Tensor  # (N,) the residual without log Z, detached
    weight: Tensor  # (N,) importance weights, detached
    prompt_index: Tensor  # (N,) equal within a group
    prompt_id: Tensor  # (N,) the task's id of the prompt
    prompt_state: Tensor | None  # (N, h) pooled hidden states, for the head


class LogZ(nn.Module):
    """Base of the modes: `forward(context) -> (N,)` nats, with gradient only for the head."""

    source: Literal["policy", "base"] | None = None  # whose prompt states are wanted
    pool: Pool | None = None
    warmup_steps: int = 0  # updates during which the policy is held still

    def build(self, hidden_size: int) -> None:
        """Told once, before training: the width of the prompt states."""

    def initialise(self, log_z: float) -> None:
        """Told once, after the first refill: minus the weighted mean of its mismatch."""

    def undo(self) -> None:
        """Take back what the last update taught a running estimate: it was skipped."""


class HeadLogZ(LogZ):
    """An MLP on pooled prompt states, trained beside the policy.

    Args:
        source: whose hidden states it reads; `policy` reuses the training pass.
        detach: keep its gradient from the policy's trunk.
        pool: mean or last prompt state.
        width: of its layers.
        warmup_steps: updates of the head alone before the policy moves.
    """

    def __init__(
        self,
        *,
        source: Literal["policy", "base"],
        detach: bool,
        pool: Pool,
        width: int,
        warmup_steps: int,
    ) -> None:
        super().__init__()
        self.source, self.pool, self.detach = source, pool, detach
        self.width, self.warmup_steps = width, warmup_steps

    def build(self, hidden_size: int) -> None:
        self.head = ZHead(hidden_size, self.width)

    def initialise(self, log_z: float) -> None:
        self.head.set_bias(log_z)

    def forward(self, context: LogZContext) -> Tensor:
        assert context.prompt_state is not None
        state = context.prompt_state.detach() if self.detach else context.prompt_state
        log_z: Tensor = self.head(state)
        return log_z


class GroupLogZ(LogZ):
    """Closed form per prompt: the loss becomes the weighted variance within the group."""

    def forward(self, context: LogZContext) -> Tensor:
        return group_log_z(context.mismatch, context.weight, context.prompt_index)


class GroupLooLogZ(LogZ):
    """Closed form from the prompt's other rollouts."""

    def forward(self, context: LogZContext) -> Tensor:
        return leave_one_out_log_z(context.mismatch, context.weight, context.prompt_index)


class FixedLogZ(LogZ):
    """A constant; at log Z' = 0 the policy converges to p^alpha exp(c L^2), not to the target."""

    def __init__(self, *, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, context: LogZContext) -> Tensor:
        return torch.full_like(context.mismatch, self.value)


class EmaLogZ(LogZ):
    """Exponential moving average of the closed form, over all prompts or one for each.

    Args:
        rate: share of the newest value.
        scope: `global`, or `prompt` (for small, repeating prompt sets).
    """

    def __init__(self, *, rate: float, scope: Literal["global", "prompt"]) -> None:
        super().__init__()
        self.rate, self.scope = rate, scope
        self.start = nn.Buffer(torch.zeros(()))
        self.table: dict[int, float] = {}
        self._before: dict[int, float | None] = {}  # what the last update has changed

    def initialise(self, log_z: float) -> None:
        self.start.fill_(log_z)

    def forward(self, context: LogZContext) -> Tensor:
        ids = context.prompt_id.tolist() if self.scope == "prompt" else [-1] * len(context.weight)
        now = [self.table.get(i, float(self.start)) for i in ids]
        if self.training and torch.is_grad_enabled():
            self._update(context, ids)
        return context.mismatch.new_tensor(now)

    def _update(self, context: LogZContext, ids: list[int]) -> None:
        group = group_log_z(context.mismatch, context.weight, context.prompt_index).tolist()
        newest: dict[int, list[float]] = {}
        for i, value in zip(ids, group, strict=True):
            if not math.isfinite(value):
                continue
            newest.setdefault(i, []).append(value)
        self._before = {i: self.table.get(i) for i in newest}
        for i, values in newest.items():
            old = self.table.get(i, float(self.start))
            self.table[i] = old + self.rate * (sum(values) / len(values) - old)

    def undo(self) -> None:
        for i, value in self._before.items():
            if value is None:
                self.table.pop(i, None)
            else:
                self.table[i] = value
        self._before = {}

    def get_extra_state(self) -> Any:
        return {"ids": list(self.table), "values": list(self.table.values())}

    def set_extra_state(self, state: Any) -> None:
        self.table = dict(zip(state["ids"], state["values"], strict=True))

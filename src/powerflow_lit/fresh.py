"""Sums over a refill's fresh rollouts, from which what is steered learns at the refill's end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from powerflow_lit.objectives import LossInputs
from powerflow_lit.objectives.inputs import masked_sum


@dataclass(frozen=True)
class Sums:
    """Of some rollouts y of the policy pi."""

    responses: int = 0
    tokens: int = 0
    surprise: float = 0.0  # sum of -log pi(y), nats: its mean is the entropy
    divergence: float = 0.0  # sum of log pi(y) - log p_base(y), nats: its mean is KL(pi || p_base)

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class FreshRollouts:
    """Adds up, prompt by prompt, the rollouts that the policy made for this refill.

    Log-probs are those of whoever sampled. Where nobody kept them they are the policy's of the
    update that trains on the rollouts, which differs from it by the second order of a step.
    """

    def __init__(self) -> None:
        self.of_prompt: dict[int, Sums] = {}

    @property
    def whole(self) -> Sums:
        """Of all prompts."""
        return sum(self.of_prompt.values(), start=Sums())

    @torch.no_grad()
    def add(self, inputs: LossInputs, prompt_id: Tensor, fresh: Tensor) -> None:
        """The trajectories of an update.

        Args:
            prompt_id: (N,) the task's ids of their prompts.
            fresh: (N,) bool: drawn from the policy for this refill; stale ones count for nothing.
        """
        log_p = masked_sum(inputs.log_p_old.double(), inputs.mask)
        base = masked_sum(inputs.log_p_base.double(), inputs.mask)
        # one transfer from the device
        columns = prompt_id.double(), inputs.mask.sum(1).double(), -log_p, log_p - base
        rows = torch.stack(columns, 1)[fresh].tolist()
        for prompt, tokens, surprise, divergence in rows:
            one = Sums(1, int(tokens), surprise, divergence)
            self.of_prompt[int(prompt)] = self.of_prompt.get(int(prompt), Sums()) + one

    def clear(self) -> None:
        self.of_prompt = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        sums = [list(astuple(one)) for one in self.of_prompt.values()]
        return {"ids": list(self.of_prompt), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pairs = zip(state["ids"], state["sums"], strict=True)
        self.of_prompt = {prompt: Sums(*one) for prompt, one in pairs}

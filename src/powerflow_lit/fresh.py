"""Sums over a refill's fresh rollouts, from which what is steered learns at the refill's end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch

from powerflow_lit.objectives import LossInputs
from powerflow_lit.objectives.inputs import lengths, masked_sum
from powerflow_lit.types import TrajectoryBatch


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
        self.version: int | None = None  # of the policy that made them; None: all that come count

    @property
    def whole(self) -> Sums:
        """Of all prompts."""
        return sum(self.of_prompt.values(), start=Sums())

    @torch.no_grad()
    def add(self, inputs: LossInputs, batch: TrajectoryBatch) -> None:
        """The trajectories of an update, without those that other policies have made."""
        version = batch.policy_version
        fresh = version == (version if self.version is None else self.version)  # (N,)
        log_p = masked_sum(inputs.log_p_old, inputs.mask)
        log_ratio = masked_sum(inputs.log_p_old - inputs.log_p_base, inputs.mask)
        columns = batch.prompt_id, lengths(inputs.mask), -log_p, log_ratio
        for prompt, *sums in zip(*(column[fresh].tolist() for column in columns), strict=True):
            self.of_prompt[prompt] = self.of_prompt.get(prompt, Sums()) + Sums(1, *sums)

    def clear(self) -> None:
        self.of_prompt = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        sums = [list(astuple(one)) for one in self.of_prompt.values()]
        return {"ids": list(self.of_prompt), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pairs = zip(state["ids"], state["sums"], strict=True)
        self.of_prompt = {prompt: Sums(*one) for prompt, one in pairs}

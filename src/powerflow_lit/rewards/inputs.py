"""What a reward may see, and the checks on what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from powerflow_lit.mendable import MendableError

# what `strategy.reward.reads` may name; all but what comes with every rollout
SUPERVISED = "correct"
READABLE = ("answer_class", "self_certainty", SUPERVISED)


class RewardError(MendableError, ValueError):
    """A reward cannot be computed; the message says of which strategy or prompt, and the remedy."""


@dataclass(frozen=True)
class RewardInputs:
    """The rollouts of a refill, whole prompt groups. N trajectories.

    What costs something, or would be supervision, is there only if `strategy.reward.reads` names
    it: a reward that does not read `correct` cannot depend on a reference answer.
    """

    prompt_index: Tensor  # (N,) long  equal for rollouts of one prompt
    lengths: Tensor  # (N,) long  response tokens, end-of-sequence included
    formatted: Tensor  # (N,) bool  in the task's format
    truncated: Tensor  # (N,) bool  cut at rollout.max_new_tokens
    read: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) each, see the properties

    @property
    def answer_class(self) -> Tensor:
        """(N,) long: equal within a prompt for equivalent answers, -1 where there is none."""
        return self._read("answer_class")

    @property
    def self_certainty(self) -> Tensor:
        """(N,) nats: mean over tokens of log-sum-exp less mean of the behaviour policy's logits."""
        return self._read("self_certainty")

    @property
    def correct(self) -> Tensor:
        """(N,) bool: the answer is the reference. Supervision."""
        return self._read(SUPERVISED)

    def _read(self, name: str) -> Tensor:
        if name not in self.read:
            raise RewardError(f"the reward uses {name}: name it in strategy.reward.reads")
        return self.read[name]


Reward = Callable[[RewardInputs], Tensor]  # to (N,), one reward a rollout


def checked_reward(reward: Reward, inputs: RewardInputs) -> Tensor:
    """The rewards, (N,) float64.

    Raises:
        RewardError: not one finite number for each rollout.
    """
    value = reward(inputs)
    count = len(inputs.prompt_index)
    if not isinstance(value, Tensor) or value.shape != (count,):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RewardError(f"strategy.reward.function returned {shape}, not a tensor ({count},)")
    value = value.detach().double()
    if not bool(torch.isfinite(value).all()):
        row = int((~torch.isfinite(value)).nonzero()[0])
        raise RewardError(f"strategy.reward.function returned {float(value[row])} at rollout {row}")
    return value

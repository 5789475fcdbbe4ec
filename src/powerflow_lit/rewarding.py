"""A refill's rewards: what the strategy's reward reads is found out, and nothing beyond it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.sharding import agreed, is_sharded
from powerflow_lit.objectives.inputs import masked_sum
from powerflow_lit.rewards import SUPERVISED, RewardError, RewardInputs
from powerflow_lit.rewards.inputs import Reward, checked_reward
from powerflow_lit.scoring import Progress
from powerflow_lit.tasks.base import Task
from powerflow_lit.types import TokenBatch, Trajectory


@dataclass(frozen=True)
class RewardSettings:
    """A strategy's reward; values stand in `conf/strategy/`."""

    function: Reward
    reads: tuple[str, ...]  # of rewards.READABLE
    trained_share: float  # of each prompt's rollouts; the others only count in the rewards


class PassSettings(Protocol):
    """How a pass over rollouts is cut (RolloutSettings, TrainConfig)."""

    @property
    def tokens_per_microbatch(self) -> int: ...

    @property
    def logit_chunk_mb(self) -> float: ...


class Rewarder:
    """Rewards rollouts as a strategy asks for it; without one they stay as they are.

    Args:
        settings: of passes of the policy; no number depends on them.
        pad_id: of their batches; nor on it.
        report: told of progress.
    """

    def __init__(
        self,
        reward: RewardSettings | None,
        task: Task,
        settings: PassSettings,
        *,
        pad_id: int,
        report: Progress,
    ) -> None:
        self.reward, self.task, self.settings = reward, task, settings
        self.pad_id, self._report = pad_id, report

    def __call__(self, module: Any, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The same rollouts with their rewards. The module's policy is the one that sampled them.

        Raises:
            RewardError: no finite reward for each, or no reference where it reads `correct`.
        """
        if self.reward is None:
            return list(trajectories)
        readers: dict[str, Callable[[], Tensor]] = {
            "answer_class": lambda: self._answer_classes(trajectories),
            SUPERVISED: lambda: _correct(trajectories),
        }
        reads, spread = self.reward.reads, is_sharded(module.policy)
        # before the pass, which is one of all ranks where the policy is spread over them
        read = {name: agreed(spread, readers[name]) for name in reads if name in readers}
        if "self_certainty" in reads:
            read["self_certainty"] = self._self_certainty(module, trajectories)
        inputs = RewardInputs(
            prompt_index=torch.tensor([t.group for t in trajectories]),
            lengths=torch.tensor([t.length for t in trajectories]),
            formatted=torch.tensor([t.formatted for t in trajectories]),
            truncated=torch.tensor([t.truncated for t in trajectories]),
            read=read,
        )
        rewards = checked_reward(self.reward.function, inputs).tolist()
        return [replace(t, reward=r) for t, r in zip(trajectories, rewards, strict=True)]

    def trained(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Those that are trained on: the first ones of each prompt's group, which are exchangeable.

        Every group keeps as many, so that updates hold whole groups as before.
        """
        if self.reward is None or self.reward.trained_share == 1:
            return list(trajectories)
        groups: dict[int, list[Trajectory]] = {}
        for trajectory in trajectories:
            groups.setdefault(trajectory.group, []).append(trajectory)
        share = self.reward.trained_share
        return [t for group in groups.values() for t in group[: round(share * len(group))]]

    def _answer_classes(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """(N,) long: of each response's answer within its prompt."""
        places: dict[int, list[int]] = {}
        for place, trajectory in enumerate(trajectories):
            places.setdefault(trajectory.group, []).append(place)
        found = torch.full((len(trajectories),), -1)
        done = 0
        for group in places.values():
            responses = [trajectories[place].response for place in group]
            classes = self.task.answer_classes(trajectories[group[0]].prompt, responses)
            found[group] = torch.tensor(classes)
            done += len(group)
            self._report("reward", done, len(trajectories), 0)
        return found

    @torch.no_grad()
    def _self_certainty(self, module: Any, trajectories: Sequence[Trajectory]) -> Tensor:
        """(N,) nats a token, of the policy as it is now, in the precision of training."""
        rows = [(t.prompt_ids, t.response_ids) for t in trajectories]
        done = 0

        def count(rows_done: int) -> None:
            nonlocal done
            done += rows_done
            self._report("reward", done, len(rows), 0)

        batch = TokenBatch.collate(rows, self.pad_id).to(module.device)
        with module.trainer.precision_plugin.forward_context():
            scores = response_scores(
                module.policy,
                batch,
                tokens_per_microbatch=self.settings.tokens_per_microbatch,
                logit_chunk_mb=self.settings.logit_chunk_mb,
                certainty=True,
                on_progress=None if is_sharded(module.policy) else count,
            )
        assert scores.certainty is not None
        total = masked_sum(scores.certainty.double(), batch.mask)
        return (total / batch.response_lengths).cpu()


def _correct(trajectories: Sequence[Trajectory]) -> Tensor:
    """(N,) bool."""
    unknown = next((t.prompt for t in trajectories if t.correct is None), None)
    if unknown is not None:
        raise RewardError(
            f"a supervised strategy needs references, and prompt {unknown.id} has none: leave such "
            "prompts out, or take an unsupervised strategy"
        )
    return torch.tensor([bool(t.correct) for t in trajectories])

"""The replay buffer: whole prompt groups of trajectories, bounded in staleness, resumable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from powerflow_lit.types import AllowedTokens, Prompt, Trajectory, TrajectoryBatch


class ReplayBuffer:
    """Keeps the trajectories of the last `max_staleness + 1` refills and deals out updates.

    Args:
        max_staleness: refills that a trajectory may outlive its own (0: on-policy data only).
        updates_per_refill: optimizer updates between two refills.
        prompts_per_update: prompt groups in an update; None shares a refill's number of groups
            over its updates, which on-policy deals each of them out exactly once.
        seed: of the order in which groups are dealt.
    """

    def __init__(
        self,
        *,
        max_staleness: int,
        updates_per_refill: int,
        prompts_per_update: int | None,
        seed: int,
    ) -> None:
        self.max_staleness = max_staleness
        self.updates_per_refill = updates_per_refill
        self.prompts_per_update = prompts_per_update
        self.seed = seed
        self.refill = -1  # index of the newest refill held
        self._refills: dict[int, list[Trajectory]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._refills.values()))

    def __iter__(self) -> Iterator[Trajectory]:
        """Oldest refill first."""
        for refill in sorted(self._refills):
            yield from self._refills[refill]

    @property
    def newest(self) -> Sequence[Trajectory]:
        """The trajectories of the last refill."""
        return self._refills.get(self.refill, [])

    def add(self, trajectories: Sequence[Trajectory], refill: int) -> None:
        """Store a refill and evict those that became too stale.

        Raises:
            ValueError: refills must come in order.
        """
        if refill <= self.refill:
            raise ValueError(f"refill {refill} after refill {self.refill}")
        self._refills = {**self.held_beside(refill), refill: list(trajectories)}
        self.refill = refill

    def held_beside(self, refill: int) -> dict[int, list[Trajectory]]:
        """Of what is held, by refill, that which is not too stale once this one is added."""
        oldest = refill - self.max_staleness
        return {old: self._refills[old] for old in sorted(self._refills) if old >= oldest}

    @property
    def refills(self) -> dict[int, Sequence[Trajectory]]:
        """What is held, by refill, oldest first."""
        return {refill: self._refills[refill] for refill in sorted(self._refills)}

    def drop(self, refills: Iterable[int]) -> int:
        """Part with refills before they are too stale; how many trajectories those were.

        Raises:
            ValueError: the newest is among them, or one that is not held.
        """
        chosen = set(refills)
        if self.refill in chosen or chosen - self._refills.keys():
            raise ValueError(
                f"refills {sorted(chosen)} cannot be dropped: held are {sorted(self._refills)}, "
                "and the newest stays"
            )
        return sum(len(self._refills.pop(refill)) for refill in chosen)

    def updates(self, pad_id: int) -> list[TrajectoryBatch]:
        """The updates until the next refill, each of whole prompt groups, in a seeded order.

        Groups are drawn from all refills held, each once until all were used; an update never
        holds one twice, so it is smaller while the buffer has fewer groups.

        Raises:
            ValueError: the buffer is empty, or an update would be.
        """
        groups: dict[int, list[Trajectory]] = {}
        for trajectory in self:
            groups.setdefault(trajectory.group, []).append(trajectory)
        if not groups:
            raise ValueError("the replay buffer is empty: refill it before training")
        newest = len({t.group for t in self.newest})
        per_update = self.prompts_per_update or newest // self.updates_per_refill
        if per_update < 1:
            raise ValueError(
                f"{newest} prompt groups cannot feed {self.updates_per_refill} updates: "
                "raise prompts_per_refill or lower buffer.updates_per_refill"
            )
        return [
            TrajectoryBatch.collate([t for group in update for t in groups[group]], pad_id)
            for update in self._deal(list(groups), min(per_update, len(groups)))
        ]

    def _deal(self, groups: list[int], per_update: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.refill)
        queue: list[int] = []
        updates = []
        for _ in range(self.updates_per_refill):
            update: list[int] = []
            while len(update) < per_update:
                if not set(queue) - set(update):
                    queue += [
                        groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()
                    ]
                update.append(next(g for g in queue if g not in update))
                queue.remove(update[-1])
            updates.append(update)
        return updates

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and lists only, so that it loads with `weights_only=True`."""
        return {
            "refill": self.refill,
            "refills": {r: [pack(t) for t in ts] for r, ts in self._refills.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.refill = state["refill"]
        self._refills = {r: [unpack(t) for t in ts] for r, ts in state["refills"].items()}


class Updates:
    """A refill's updates from the `start`-th on; its length is that of the whole refill.

    Lightning takes up an epoch in its middle, but a plain loader would begin it anew.
    """

    def __init__(self, updates: Sequence[TrajectoryBatch], start: int) -> None:
        self._updates, self._start = updates, start

    def __len__(self) -> int:
        return len(self._updates)

    def __iter__(self) -> Iterator[TrajectoryBatch]:
        return iter(self._updates[self._start :])


def pack(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as plain values and tensors, for checkpoints."""
    prompt = trajectory.prompt
    fields = {name: getattr(trajectory, name) for name in trajectory.__dataclass_fields__}
    fields["prompt"] = [prompt.id, prompt.text, prompt.reference]
    fields["prompt_ids"] = list(trajectory.prompt_ids)
    fields["response_ids"] = list(trajectory.response_ids)
    if (allowed := trajectory.allowed) is not None:
        fields["allowed"] = [allowed.ids, allowed.counts]
    return fields


def unpack(state: dict[str, Any]) -> Trajectory:
    """The trajectory that `pack` took apart."""
    allowed = state.get("allowed")
    return Trajectory(
        **{
            **state,
            "prompt": Prompt(*state["prompt"]),
            "prompt_ids": tuple(state["prompt_ids"]),
            "response_ids": tuple(state["response_ids"]),
            "allowed": None if allowed is None else AllowedTokens(*allowed),
        }
    )

"""The records that travel between rooms: prompts, trajectories and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A question as a task states it; `reference` is for evaluation and probes only."""

    id: int  # unique within its task and split
    text: str  # the user's turn, without chat markup
    reference: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How an engine decodes. Training uses temperature 1 over the full vocabulary."""

    samples_per_prompt: int
    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One response as an engine returns it."""

    token_ids: tuple[int, ...]  # end-of-sequence included when it was generated
    log_probs: tuple[float, ...]  # behaviour log-probs at temperature 1, nats, one a token
    truncated: bool  # cut at max_new_tokens


@dataclass(frozen=True)
class Trajectory:
    """A rollout with all that training needs to know of it."""

    prompt: Prompt
    group: int  # equal for the rollouts of one prompt in one refill, unique over refills
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    response: str
    truncated: bool
    formatted: bool
    correct: bool | None  # a probe only; None where the task has no reference
    policy_version: int
    log_p_old: Tensor  # (L,) float32 nats
    log_p_base: Tensor  # (L,) float32 nats

    @property
    def length(self) -> int:
        return len(self.response_ids)


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and responses as one right-padded matrix. N sequences, S tokens, T of response."""

    input_ids: Tensor  # (N, S) long: prompt, response, padding
    prompt_lengths: Tensor  # (N,) long
    response_lengths: Tensor  # (N,) long

    @classmethod
    def collate(
        cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int
    ) -> TokenBatch:
        """From (prompt ids, response ids) pairs."""
        prompts = torch.tensor([len(p) for p, _ in rows])
        responses = torch.tensor([len(r) for _, r in rows])
        input_ids = torch.full((len(rows), int((prompts + responses).max())), pad_id)
        for row, (prompt, response) in enumerate(rows):
            ids = torch.tensor([*prompt, *response])
            input_ids[row, : len(ids)] = ids
        return cls(input_ids, prompts, responses)

    @property
    def mask(self) -> Tensor:
        """(N, T) bool: response tokens."""
        width = int(self.response_lengths.max())
        return torch.arange(width, device=self.input_ids.device) < self.response_lengths[:, None]

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    def rows(self, index: Tensor) -> TokenBatch:
        """The chosen rows, cut to their longest."""
        width = int(self.lengths[index].max())
        return TokenBatch(
            self.input_ids[index, :width], self.prompt_lengths[index], self.response_lengths[index]
        )

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            self.input_ids.to(device),
            self.prompt_lengths.to(device),
            self.response_lengths.to(device),
        )


@dataclass(frozen=True)
class TrajectoryBatch:
    """One update's trajectories: whole prompt groups. N trajectories, T response tokens."""

    tokens: TokenBatch
    log_p_base: Tensor  # (N, T) float, 0 in the padding
    log_p_old: Tensor  # (N, T)
    formatted: Tensor  # (N,) bool
    prompt_index: Tensor  # (N,) long, equal within a group
    prompt_id: Tensor  # (N,) long, the task's id of the prompt
    policy_version: Tensor  # (N,) long

    @classmethod
    def collate(cls, trajectories: Sequence[Trajectory], pad_id: int) -> TrajectoryBatch:
        tokens = TokenBatch.collate([(t.prompt_ids, t.response_ids) for t in trajectories], pad_id)
        pad = torch.nn.utils.rnn.pad_sequence
        return cls(
            tokens=tokens,
            log_p_base=pad([t.log_p_base for t in trajectories], batch_first=True),
            log_p_old=pad([t.log_p_old for t in trajectories], batch_first=True),
            formatted=torch.tensor([t.formatted for t in trajectories]),
            prompt_index=torch.tensor([t.group for t in trajectories]),
            prompt_id=torch.tensor([t.prompt.id for t in trajectories]),
            policy_version=torch.tensor([t.policy_version for t in trajectories]),
        )

    def to(self, device: torch.device) -> TrajectoryBatch:
        """Moved to `device` (Lightning calls this before each step)."""
        return TrajectoryBatch(
            **{name: getattr(self, name).to(device) for name in self.__dataclass_fields__}
        )

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
    """How an engine decodes. Training: temperature 1, and the full vocabulary without a guard."""

    samples_per_prompt: int
    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    log_probs: int | None = None  # prompts, from the first on, with log-probs; None is all of them

    @property
    def distinct(self) -> int:
        """Samples of a prompt that may differ; greedy ones are copies of one."""
        return 1 if self.temperature == 0 else self.samples_per_prompt

    def wants_log_probs(self, prompt: int) -> bool:
        """Whether the responses to the prompt of this number come with log-probs."""
        return self.log_probs is None or prompt < self.log_probs


@dataclass(frozen=True)
class Completion:
    """One response as an engine returns it."""

    token_ids: tuple[int, ...]  # end-of-sequence included when it was generated
    # behaviour log-probs at temperature 1, nats, one a token; none where they were not asked for
    log_probs: tuple[float, ...]
    truncated: bool  # cut at max_new_tokens

    @property
    def log_p_old(self) -> Tensor:
        """Its behaviour log-probs, (L,) nats; NaN where nobody asked for them."""
        if not self.log_probs:
            return torch.full((len(self.token_ids),), torch.nan)
        return torch.tensor(self.log_probs)


@dataclass(frozen=True)
class AllowedTokens:
    """The tokens that a guard allows at each place, ragged: most places allow very few. P places.

    A padded matrix would be as wide as the one place where the policy was least sure.
    """

    ids: Tensor  # (sum of counts,) int32 token ids, place after place
    counts: Tensor  # (P,) int32, each 1 or more

    @classmethod
    def cat(cls, parts: Sequence[AllowedTokens]) -> AllowedTokens:
        """The places of all parts, one part after the other."""
        return cls(torch.cat([p.ids for p in parts]), torch.cat([p.counts for p in parts]))

    def split(self, places: Sequence[int]) -> list[AllowedTokens]:
        """Undoes `cat`: parts of so many places each, in memory of their own."""
        counts = self.counts.split(list(places))
        ids = self.ids.split([int(c.sum()) for c in counts])
        return [AllowedTokens(i.clone(), c.clone()) for i, c in zip(ids, counts, strict=True)]

    def padded(self) -> Tensor:
        """(P, K) long with -1 in the padding; K is the largest count."""
        width = torch.arange(int(self.counts.max()), device=self.ids.device)
        inside = width < self.counts[:, None]
        empty = torch.full(inside.shape, -1, device=self.ids.device)
        return empty.masked_scatter(inside, self.ids.long())

    def to(self, device: torch.device) -> AllowedTokens:
        return AllowedTokens(self.ids.to(device), self.counts.to(device))


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
    log_p_old: Tensor  # (L,) float32 nats, over the allowed tokens where there is a guard
    log_p_base: Tensor  # (L,) float32 nats, over the same tokens
    allowed: AllowedTokens | None = None  # L places; None is the full vocabulary
    reward: float | None = None  # None where the strategy takes none
    from_base: bool = False  # drawn from the frozen base, whose log-probs log_p_old then holds

    @property
    def length(self) -> int:
        return len(self.response_ids)


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and responses as one right-padded matrix. N sequences, S tokens, T of response."""

    input_ids: Tensor  # (N, S) long: prompt, response, padding
    prompt_lengths: Tensor  # (N,) long
    response_lengths: Tensor  # (N,) long
    allowed: tuple[AllowedTokens, ...] | None = None  # a row's response each; None is everything

    @classmethod
    def collate(
        cls,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        pad_id: int,
        allowed: Sequence[AllowedTokens] | None = None,
    ) -> TokenBatch:
        """From (prompt ids, response ids) pairs, and what a guard allows in the responses."""
        prompts = torch.tensor([len(p) for p, _ in rows])
        responses = torch.tensor([len(r) for _, r in rows])
        input_ids = torch.full((len(rows), int((prompts + responses).max())), pad_id)
        for row, (prompt, response) in enumerate(rows):
            ids = torch.tensor([*prompt, *response])
            input_ids[row, : len(ids)] = ids
        return cls(input_ids, prompts, responses, None if allowed is None else tuple(allowed))

    @property
    def mask(self) -> Tensor:
        """(N, T) bool: response tokens."""
        width = int(self.response_lengths.max())
        return torch.arange(width, device=self.input_ids.device) < self.response_lengths[:, None]

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    def rows(self, chosen: Tensor | slice) -> TokenBatch:
        """The chosen rows, cut to their longest."""
        index = chosen
        if isinstance(index, slice):
            index = torch.arange(len(self.lengths), device=self.lengths.device)[index]
        width = int(self.lengths[index].max())
        return TokenBatch(
            self.input_ids[index, :width],
            self.prompt_lengths[index],
            self.response_lengths[index],
            None if self.allowed is None else tuple(self.allowed[i] for i in index.tolist()),
        )

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            self.input_ids.to(device),
            self.prompt_lengths.to(device),
            self.response_lengths.to(device),
            None if self.allowed is None else tuple(a.to(device) for a in self.allowed),
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
    reward: Tensor | None = None  # (N,) float; None where the strategy takes none
    from_base: Tensor | None = None  # (N,) bool; None where all were drawn from the policy

    @classmethod
    def collate(cls, trajectories: Sequence[Trajectory], pad_id: int) -> TrajectoryBatch:
        """Padded to the longest.

        Raises:
            ValueError: some trajectories were sampled under a guard and some were not, or some have
                a reward and some have none.
        """
        allowed = [t.allowed for t in trajectories if t.allowed is not None]
        if allowed and len(allowed) < len(trajectories):
            raise ValueError(
                f"{len(allowed)} of {len(trajectories)} trajectories of an update have a guard: "
                "guard.min_p cannot be switched on or off while stale trajectories are held"
            )
        rewards = [t.reward for t in trajectories if t.reward is not None]
        if rewards and len(rewards) < len(trajectories):
            raise ValueError(f"{len(rewards)} of {len(trajectories)} trajectories have a reward")
        of_base = [t.from_base for t in trajectories]
        rows = [(t.prompt_ids, t.response_ids) for t in trajectories]
        tokens = TokenBatch.collate(rows, pad_id, allowed or None)
        pad = torch.nn.utils.rnn.pad_sequence
        return cls(
            tokens=tokens,
            log_p_base=pad([t.log_p_base for t in trajectories], batch_first=True),
            log_p_old=pad([t.log_p_old for t in trajectories], batch_first=True),
            formatted=torch.tensor([t.formatted for t in trajectories]),
            prompt_index=torch.tensor([t.group for t in trajectories]),
            prompt_id=torch.tensor([t.prompt.id for t in trajectories]),
            policy_version=torch.tensor([t.policy_version for t in trajectories]),
            reward=torch.tensor(rewards) if rewards else None,
            from_base=torch.tensor(of_base) if any(of_base) else None,
        )

    def to(self, device: torch.device) -> TrajectoryBatch:
        """Moved to `device` (Lightning calls this before each step)."""
        given = {n: x for n in self.__dataclass_fields__ if (x := getattr(self, n)) is not None}
        return TrajectoryBatch(**{name: x.to(device) for name, x in given.items()})

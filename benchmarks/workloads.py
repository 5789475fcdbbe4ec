"""What is timed: prompts, group size and the length of every response, the same for everyone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FIRST_WORD = 3  # token ids below are <pad>, <unk>, <eos>
Lengths = Literal["equal", "ragged"]


@dataclass(frozen=True)
class Workload:
    """One refill, again and again: every field fits into JSON.

    Response lengths are imposed, not sampled: `equal` gives each `response_mean` tokens, `ragged`
    draws them from a lognormal of about that mean, clipped. Prompt lengths likewise.
    """

    name: str
    shape: str  # of `models.SHAPES`
    lengths: Lengths
    prompts: int = 8
    rollouts: int = 16  # a prompt
    updates: int = 2  # a refill, of prompts * rollouts / updates trajectories each
    prompt_mean: int = 32  # tokens
    prompt_range: tuple[int, int] = (8, 96)
    response_mean: int = 64
    response_range: tuple[int, int] = (4, 256)
    sigma: float = 0.8  # of the logarithm of a ragged length
    seed: int = 0

    @property
    def trajectories(self) -> int:
        return self.prompts * self.rollouts

    @property
    def max_new_tokens(self) -> int:
        """The longest response."""
        return max(max(group) for group in self.response_lengths())

    @property
    def max_prompt_tokens(self) -> int:
        return max(self.prompt_lengths())

    def prompt_lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return self._lengths(self.prompts, self.prompt_mean, self.prompt_range, "prompts")

    def response_lengths(self) -> list[list[int]]:
        """Tokens of each prompt's responses, the end-of-sequence token included."""
        drawn = self._lengths(
            self.trajectories, self.response_mean, self.response_range, "rollouts"
        )
        return [drawn[i : i + self.rollouts] for i in range(0, len(drawn), self.rollouts)]

    def prompt_ids(self, vocabulary: int) -> list[tuple[int, ...]]:
        """Token ids of each prompt: random words, no two prompts alike."""
        rng = random.Random(f"{self.seed}-words")
        return [
            tuple(rng.randrange(FIRST_WORD, vocabulary) for _ in range(length))
            for length in self.prompt_lengths()
        ]

    def lengths_by_prompt(self, vocabulary: int) -> dict[tuple[int, ...], list[int]]:
        """What every contender is made to keep to."""
        return dict(zip(self.prompt_ids(vocabulary), self.response_lengths(), strict=True))

    @property
    def response_tokens(self) -> int:
        """Of a refill; tokens/s counts these."""
        return sum(map(sum, self.response_lengths()))

    @property
    def useful_tokens(self) -> int:
        """Of a refill, unpadded, each prompt once a group: what scoring and training need."""
        return self.response_tokens + sum(self.prompt_lengths())

    @property
    def attended_pairs(self) -> int:
        """Pairs of a query and a key that it sees, of those tokens."""
        pairs = 0
        for prompt, group in zip(self.prompt_lengths(), self.response_lengths(), strict=True):
            pairs += prompt * (prompt + 1) // 2
            pairs += sum(length * prompt + length * (length + 1) // 2 for length in group)
        return pairs

    def _lengths(self, count: int, mean: int, limits: tuple[int, int], purpose: str) -> list[int]:
        if self.lengths == "equal":
            return [mean] * count
        rng = random.Random(f"{self.seed}-{purpose}")
        low, high = limits
        mu = math.log(mean) - self.sigma**2 / 2  # so that the mean before clipping is `mean`
        return [
            min(max(round(rng.lognormvariate(mu, self.sigma)), low), high) for _ in range(count)
        ]


LARGE = {"prompts": 4, "rollouts": 4, "updates": 2, "response_mean": 32, "response_range": (4, 96)}


def suite(shapes: Sequence[str], lengths: Sequence[Lengths]) -> list[Workload]:
    """The workloads of `--suite cpu`: each shape with each kind of lengths."""
    return [
        Workload(f"{shape} {kind}", shape, kind, **(LARGE if shape == "151k-vocab" else {}))  # type: ignore[arg-type]
        for shape in shapes
        for kind in lengths
    ]

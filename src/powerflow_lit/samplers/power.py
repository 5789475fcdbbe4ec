"""PowerSampling: Metropolis-Hastings on whole responses, aimed at p(y)^alpha, without training.

Karan and Du, "Reasoning with Sampling" (arXiv 2510.14901); in the paper an inference-time row.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.models.prompting import Route, decode
from powerflow_lit.samplers.base import Draws, EvaluationSettings, Policy, Progress
from powerflow_lit.tasks.base import Response, Sampled
from powerflow_lit.types import Prompt, Sampling


@dataclass
class Chain:
    """One Markov chain: a response under way. L tokens."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...] = ()
    log_p: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (L,) nats, temperature 1
    log_q: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (L,) nats, of the proposal
    ended: bool = False  # by the end-of-sequence token
    proposed: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Suffix:
    """A continuation of a chain's first `cut` tokens, as sampled from the proposal."""

    cut: int
    ids: tuple[int, ...]
    log_p: np.ndarray
    log_q: np.ndarray
    ended: bool


@dataclass(frozen=True)
class PowerSampling:
    """Responses from p(y)^alpha: blocks of tokens, with Metropolis-Hastings steps after each.

    After block b the response may be up to b/`blocks` of `max_new_tokens` long. A step cuts the
    response at a uniform place, samples a new end from the proposal q (temperature 1/alpha) up
    to that length or the end of the sequence, and accepts it with probability

        min(1, exp(alpha * (log p(y') - log p(y)) - (log q(y -> y') - log q(y' -> y))))

    where q counts the chance 1/L of the cut beside that of the new tokens: without it the chain
    would not keep p^alpha where responses differ in length. A response that is cut at
    `max_new_tokens` is an outcome as it stands, as everywhere in this project. p^alpha is that of
    the whole sequence; nothing corrects for its length.

    Args:
        alpha: the power.
        blocks: of a response.
        steps_per_block: Metropolis-Hastings steps after each block.
        stop_at_eos: a chain that has ended after a block's steps is done, as in the published
            procedure. Without it every chain goes on to the last block: the longer way, and the
            only one whose limit is exactly p^alpha (with more than one block).
    """

    scores: ClassVar[bool] = True
    alpha: float
    blocks: int
    steps_per_block: int
    stop_at_eos: bool

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.blocks < 1 or self.steps_per_block < 0:
            raise ValueError(
                f"alpha={self.alpha}, blocks={self.blocks}, steps_per_block="
                f"{self.steps_per_block}: must be positive (steps may be 0)"
            )

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[tuple[int, ...]],
        settings: EvaluationSettings,
        on_progress: Progress | None,
    ) -> Draws:
        count = settings.samples_per_prompt
        chains = [Chain(ids) for ids in prompt_ids for _ in range(count)]
        walk = _Walk(self, policy, settings)
        ends = sorted({math.ceil(settings.max_new_tokens * b / self.blocks)
                       for b in range(1, self.blocks + 1)})  # fmt: skip
        total, done = len(ends) * (1 + self.steps_per_block), 0
        for end in ends:
            active = [c for c in chains if not (c.ended and self.stop_at_eos)]
            for step in range(1 + self.steps_per_block):
                if step == 0:
                    walk.extend([c for c in active if not c.ended], end)
                else:
                    walk.move(active, end)
                done += 1
                if on_progress is not None:
                    on_progress(done, total, walk.tokens)
        return Draws(
            [
                Sampled(prompt, tuple(_response(policy, c) for c in chains[i : i + count]))
                for prompt, i in zip(prompts, range(0, len(chains), count), strict=True)
            ],
            count,
            walk.tokens,
            [_acceptance(chains[i : i + count]) for i in range(0, len(chains), count)],
        )

    def tokens_needed(
        self,
        tokenizer: Tokenizer,
        route: Route,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[tuple[int, ...]],
        settings: EvaluationSettings,
    ) -> int:
        return max(map(len, prompt_ids)) + settings.max_new_tokens


class _Walk:
    """Moves all chains at once: one engine call and two scoring passes a step."""

    def __init__(self, sampler: PowerSampling, policy: Policy, settings: EvaluationSettings):
        self._sampler, self._policy = sampler, policy
        self._max_new_tokens = settings.max_new_tokens
        self._random = random.Random(f"power-{settings.seed}")
        self.tokens = 0  # sampled so far

    def extend(self, chains: Sequence[Chain], end: int) -> None:
        """Continue each chain from the proposal up to `end` tokens or the end of the sequence."""
        for chain, suffix in zip(
            chains, self._propose(chains, [len(c.ids) for c in chains], end), strict=True
        ):
            _take(chain, suffix)

    def move(self, chains: Sequence[Chain], end: int) -> None:
        """One Metropolis-Hastings step of each chain."""
        cuts = [self._random.randrange(len(c.ids)) for c in chains]
        for chain, suffix in zip(chains, self._propose(chains, cuts, end), strict=True):
            chain.proposed += 1
            # drawn for every chain, so that no outcome shifts another chain's random numbers
            uniform = 1.0 - self._random.random()  # in (0, 1]
            if math.log(uniform) <= log_acceptance(chain, suffix, self._sampler.alpha):
                chain.accepted += 1
                _take(chain, suffix)

    def _propose(self, chains: Sequence[Chain], cuts: Sequence[int], end: int) -> list[Suffix]:
        """New ends for the chains' first `cuts` tokens, with their log-probs."""
        if not chains:
            return []
        policy, alpha = self._policy, self._sampler.alpha
        heads = [c.prompt_ids + c.ids[:cut] for c, cut in zip(chains, cuts, strict=True)]
        sampling = Sampling(
            samples_per_prompt=1,
            max_new_tokens=self._max_new_tokens,
            temperature=1 / alpha,
            seed=self._random.randrange(2**31),
            log_probs=0,
        )
        limits = [end - cut for cut in cuts]
        groups = policy.engine.generate(heads, sampling, max_new_tokens=limits)
        new = [group[0] for group in groups]
        self.tokens += sum(len(c.token_ids) for c in new)
        rows = [(head, c.token_ids) for head, c in zip(heads, new, strict=True)]
        # of the trainer's model both, so that p and q are of one model to rounding
        log_p, log_q = (policy.log_probs(rows, t) for t in (1.0, 1 / alpha))
        return [
            Suffix(cut, c.token_ids, p, q, not c.truncated)
            for cut, c, p, q in zip(cuts, new, log_p, log_q, strict=True)
        ]


def log_acceptance(chain: Chain, suffix: Suffix, alpha: float) -> float:
    """alpha * dlog p - dlog q of replacing a chain's end, the chance of the cut within q."""
    old, cut = slice(suffix.cut, None), suffix.cut
    gain = alpha * (suffix.log_p.sum() - chain.log_p[old].sum())
    proposal = suffix.log_q.sum() - chain.log_q[old].sum()
    lengths = math.log(len(chain.ids)) - math.log(cut + len(suffix.ids))
    return float(gain - proposal + lengths)


def _take(chain: Chain, suffix: Suffix) -> None:
    cut = suffix.cut
    chain.ids = chain.ids[:cut] + suffix.ids
    chain.log_p = np.concatenate([chain.log_p[:cut], suffix.log_p])
    chain.log_q = np.concatenate([chain.log_q[:cut], suffix.log_q])
    chain.ended = suffix.ended


def _response(policy: Policy, chain: Chain) -> Response:
    return Response(decode(policy.tokenizer, chain.ids), chain.ids, not chain.ended)


def _acceptance(chains: Sequence[Chain]) -> dict[str, float]:
    proposed = sum(c.proposed for c in chains)
    return {"mh_acceptance": sum(c.accepted for c in chains) / max(proposed, 1)}

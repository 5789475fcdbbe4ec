"""What a sampler is: from prompts to responses, by whatever procedure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.prompting import Route
from powerflow_lit.rollout import RolloutEngine
from powerflow_lit.tasks.base import Sampled
from powerflow_lit.types import Prompt, TokenBatch

Row = tuple[tuple[int, ...], tuple[int, ...]]  # prompt ids, response ids
Progress = Callable[[int, int, int], None]  # done, total (in units of the sampler), tokens so far


@dataclass(frozen=True)
class EvaluationSettings:
    """Size of an evaluation; values stand in `conf/`."""

    samples_per_prompt: int  # the k of avg@k, pass@k, maj@k
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Policy:
    """The model under evaluation: the engine samples from it, the trainer's copy scores."""

    engine: RolloutEngine
    model: PreTrainedModel
    tokenizer: Tokenizer
    route: Route
    tokens_per_microbatch: int  # padded tokens of one scoring pass
    logit_chunk_mb: float  # float32 logits held at once in it, MB

    @torch.no_grad()
    def log_probs(self, rows: Sequence[Row], temperature: float) -> list[np.ndarray]:
        """Log-probs of responses under the trainer's model, nats, (L,) float64 each."""
        batch = TokenBatch.collate(rows, int(self.tokenizer.pad_token_id))
        scores = response_scores(
            self.model,
            batch.to(self.model.device),
            tokens_per_microbatch=self.tokens_per_microbatch,
            logit_chunk_mb=self.logit_chunk_mb,
            temperature=temperature,
        )
        found = scores.log_prob.cpu().double().numpy()
        return [row[: len(ids)].copy() for row, (_, ids) in zip(found, rows, strict=True)]


@dataclass(frozen=True)
class Draws:
    """What a sampler drew."""

    samples: list[Sampled]  # one for each prompt; with fewer responses where some are missing
    samples_per_prompt: int  # responses that each prompt should have
    tokens: int  # sampled in all, rejected ones included
    figures: list[dict[str, float]] = field(default_factory=list)  # a prompt's, of the sampler
    notes: tuple[str, ...] = ()  # what a person must know of them


class Sampler(Protocol):
    """Draws `settings.samples_per_prompt` responses for each prompt; equal seeds, equal draws."""

    scores: ClassVar[bool]  # whether it needs log-probs of the trainer's model

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[tuple[int, ...]],
        settings: EvaluationSettings,
        on_progress: Progress | None,
    ) -> Draws: ...

    def tokens_needed(
        self,
        tokenizer: Tokenizer,
        route: Route,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[tuple[int, ...]],
        settings: EvaluationSettings,
    ) -> int:
        """Length of the longest sequence that the engine will hold, prompt included."""
        ...

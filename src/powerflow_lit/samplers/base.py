"""What a sampler is: from prompts to responses, by whatever procedure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.models.prompting import Route
from powerflow_lit.rollout import RolloutEngine
from powerflow_lit.tasks.base import Sampled
from powerflow_lit.types import Prompt

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

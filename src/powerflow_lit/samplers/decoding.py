"""Plain decoding: token by token at a temperature, with top-p and min-p."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.models.prompting import Route, decode
from powerflow_lit.rollout import RolloutEngine
from powerflow_lit.samplers.base import Draws, EvaluationSettings, Policy, Progress
from powerflow_lit.tasks.base import Response, Sampled
from powerflow_lit.types import Completion, Prompt, Sampling


@dataclass(frozen=True)
class Decoding:
    """One way of decoding, e.g. T=0.5; temperature 0 is greedy (one sample a prompt)."""

    scores: ClassVar[bool] = False
    temperature: float
    min_p: float = 0.0
    top_p: float = 1.0

    @property
    def name(self) -> str:
        if self.temperature == 0:
            return "greedy"
        top_p = f",top_p={self.top_p:g}" if self.top_p != 1 else ""
        return f"T={self.temperature:g}{top_p}" + (f",min_p={self.min_p:g}" if self.min_p else "")

    def samples_per_prompt(self, settings: EvaluationSettings) -> int:
        """Responses a prompt: copies of the one greedy response would say nothing."""
        return 1 if self.temperature == 0 else settings.samples_per_prompt

    def completions(
        self,
        engine: RolloutEngine,
        prompt_ids: Sequence[tuple[int, ...]],
        settings: EvaluationSettings,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """Completions under the engine's present weights, a list for each prompt."""
        sampling = Sampling(
            samples_per_prompt=self.samples_per_prompt(settings),
            max_new_tokens=settings.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=settings.seed,
            log_probs=0,
        )
        return engine.generate(prompt_ids, sampling, on_progress)

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[tuple[int, ...]],
        settings: EvaluationSettings,
        on_progress: Progress | None,
    ) -> Draws:
        count = self.samples_per_prompt(settings)

        def report(done: int, tokens: int) -> None:
            if on_progress is not None:
                on_progress(done, len(prompts) * count, tokens)

        completions = self.completions(policy.engine, prompt_ids, settings, report)
        tokens = sum(len(c.token_ids) for group in completions for c in group)
        return Draws(sampled(policy.tokenizer, prompts, completions), count, tokens)

    def tokens_needed(
        self,
        tokenizer: Tokenizer,
        route: Route,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[tuple[int, ...]],
        settings: EvaluationSettings,
    ) -> int:
        return max(map(len, prompt_ids)) + settings.max_new_tokens


def sampled(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
) -> list[Sampled]:
    """Completions decoded and set beside their prompts."""
    return [
        Sampled(
            prompt,
            tuple(
                Response(decode(tokenizer, c.token_ids), c.token_ids, c.truncated) for c in group
            ),
        )
        for prompt, group in zip(prompts, completions, strict=True)
    ]

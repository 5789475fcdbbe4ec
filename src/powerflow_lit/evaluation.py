"""Sampling a policy on a task's evaluation prompts and scoring what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.models.prompting import decode
from powerflow_lit.rollout import RolloutEngine
from powerflow_lit.tasks.base import Response, Sampled, Task, mean_scores
from powerflow_lit.types import Completion, Prompt, Sampling


@dataclass(frozen=True)
class Decoding:
    """One way of decoding, e.g. T=0.5; temperature 0 is greedy (one sample a prompt)."""

    temperature: float
    min_p: float = 0.0

    @property
    def name(self) -> str:
        if self.temperature == 0:
            return "greedy"
        return f"T={self.temperature:g}" + (f",min_p={self.min_p:g}" if self.min_p else "")


@dataclass(frozen=True)
class EvaluationSettings:
    """Size of an evaluation; values stand in `conf/`."""

    samples_per_prompt: int  # the k of avg@k, pass@k, maj@k
    max_new_tokens: int
    seed: int


def evaluate(
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    task: Task,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[tuple[int, ...]],
    decoding: Decoding,
    settings: EvaluationSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, float]]:
    """Figures of each prompt (without the prefix `val/`) under the engine's present weights.

    Args:
        prompts, prompt_ids: the task's evaluation prompts and their token ids, in order.
    """
    greedy = decoding.temperature == 0
    sampling = Sampling(
        samples_per_prompt=1 if greedy else settings.samples_per_prompt,
        max_new_tokens=settings.max_new_tokens,
        temperature=decoding.temperature,
        min_p=decoding.min_p,
        seed=settings.seed,
    )
    completions = engine.generate(prompt_ids, sampling, on_progress)
    return [task.score(sample) for sample in sampled(tokenizer, prompts, completions)]


def sampled(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
) -> list[Sampled]:
    """Completions decoded and set beside their prompts."""
    return [
        Sampled(
            prompt,
            tuple(
                Response(
                    decode(tokenizer, c.token_ids),
                    c.token_ids,
                    c.truncated,
                )
                for c in group
            ),
        )
        for prompt, group in zip(prompts, completions, strict=True)
    ]


def val_metrics(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`val/` metrics of an evaluation: the means over its prompts."""
    return {f"val/{name}": value for name, value in mean_scores(scores).items()}

"""Evaluation while training: a decoding of the policy, scored by the task's own figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.rollout import RolloutEngine
from powerflow_lit.samplers import Decoding, EvaluationSettings
from powerflow_lit.samplers.decoding import sampled
from powerflow_lit.tasks.base import Task, mean_scores
from powerflow_lit.types import Prompt


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
        on_progress: takes responses and tokens sampled so far; what it raises ends the evaluation,
            also between the scores, which may take as long.
    """
    completions = decoding.completions(engine, prompt_ids, settings, on_progress)
    responses = sum(map(len, completions))
    tokens = sum(len(c.token_ids) for group in completions for c in group)
    scores = []
    for sample in sampled(tokenizer, prompts, completions):
        scores.append(task.score(sample))
        if on_progress is not None:
            on_progress(responses, tokens)
    return scores


def val_metrics(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`val/` metrics of an evaluation: the means over its prompts."""
    return {f"val/{name}": value for name, value in mean_scores(scores).items()}

"""What a task is: prompts, a format check, a scorer and its evaluation figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from powerflow_lit.metrics import at_k, text
from powerflow_lit.types import Prompt


class TaskError(ValueError):
    """A task's data cannot be used; the message names the file or column and the remedy."""


@dataclass(frozen=True)
class Response:
    """A decoded response under evaluation."""

    text: str
    token_ids: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class Sampled:
    """A prompt with the responses sampled for it."""

    prompt: Prompt
    responses: tuple[Response, ...]


class Task(ABC):
    """Base of all tasks. A new task is one subclass in one file and one yaml.

    Attributes:
        name: as in `task=`.
        headline: the `val/` metric to watch while training.
    """

    name: str
    headline: str

    @abstractmethod
    def train_prompts(self) -> Sequence[Prompt]: ...

    @abstractmethod
    def eval_prompts(self) -> Sequence[Prompt]: ...

    def is_formatted(self, response: str) -> bool:
        """False earns the strategy's format penalty psi; tasks without a format never do."""
        return True

    def is_correct(self, prompt: Prompt, response: str) -> bool | None:
        """None where there is nothing to compare with. Never read by unsupervised objectives."""
        return None

    def evaluate(self, samples: Sequence[Sampled]) -> dict[str, float]:
        """`val/` metrics of one evaluation, without the prefix."""
        return self.text_metrics(samples)

    def text_metrics(self, samples: Sequence[Sampled]) -> dict[str, float]:
        """Figures that every task reports: format, length, truncation, repetition, diversity."""
        formatted = [self.is_formatted(r.text) for s in samples for r in s.responses]
        return {"format_rate": mean(formatted), **_text_metrics(samples)}


def _text_metrics(samples: Sequence[Sampled]) -> dict[str, float]:
    responses = [r for s in samples for r in s.responses]
    by_prompt = [[r.text for r in s.responses] for s in samples]
    return {
        "length_mean": mean([len(r.token_ids) for r in responses]),
        "truncated_frac": mean([r.truncated for r in responses]),
        "repetition": mean([text.repetition(r.token_ids) for r in responses]),
        "distinct_n": mean([text.distinct_n([r.token_ids for r in s.responses]) for s in samples]),
        "diversity_lexical": mean([text.diversity_lexical(t) for t in by_prompt]),
        "diversity_semantic": mean(
            [text.diversity_semantic(t, text.hashing_embedding) for t in by_prompt]
        ),
    }


def correctness_metrics(
    answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]]
) -> dict[str, float]:
    """avg@k, pass@1, pass@k and maj@k for k samples a problem."""
    k = min(map(len, correct))
    return {
        f"avg@{k}": at_k.avg_at_k(correct),
        "pass@1": at_k.pass_at_k(correct, 1),
        f"pass@{k}": at_k.pass_at_k(correct, k),
        f"maj@{k}": at_k.maj_at_k(answers, correct),
    }


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0 for no values."""
    return sum(values) / len(values) if values else 0.0

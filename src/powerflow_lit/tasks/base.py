"""What a task is: prompts, a format check, a scorer and its evaluation figures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from powerflow_lit.mendable import MendableError
from powerflow_lit.metrics import at_k, text
from powerflow_lit.types import Prompt

# figures that compare a prompt's responses
COMPARING = {"diversity_lexical", "diversity_semantic", "vendi", "self_bleu"}


class TaskError(MendableError, ValueError):
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
        embed: what `diversity_semantic` is measured with; figures of two embedders do not compare.
        is_prose: whether wording is the point; self-BLEU, which costs as much as all other figures
            together, is then taken too.
        notes: what a person must know of the data (rows left out, references that cannot be
            parsed), printed before the figures and kept beside them.
    """

    name: str
    headline: str
    embed: text.Embedder = staticmethod(text.hashing_embedding)
    is_prose: bool = True
    notes: Sequence[str] = ()

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

    def answer(self, response: str) -> str | None:
        """What counts as the response's answer; None where there is none or the task has none."""
        return None

    @property
    def has_answers(self) -> bool:
        """Whether responses have answers that can be compared with each other."""
        return type(self).answer is not Task.answer

    def answer_classes(self, prompt: Prompt, responses: Sequence[str]) -> list[int]:
        """Equal for responses to a prompt whose answers mean the same, -1 where there is none.

        The reference is not looked at: unsupervised rewards are made of this.
        """
        return class_numbers(at_k.cluster([self.answer(r) for r in responses], str.__eq__))

    def score(self, sample: Sampled) -> dict[str, float]:
        """Figures of one prompt's samples, without the prefix `val/`."""
        return self.text_metrics(sample)

    def evaluate(self, samples: Sequence[Sampled]) -> dict[str, float]:
        """`val/` metrics of one evaluation, without the prefix: the means over its prompts."""
        return mean_scores([self.score(sample) for sample in samples])

    def text_metrics(self, sample: Sampled) -> dict[str, float]:
        """Figures that every task reports: format, length, truncation, repetition, diversity."""
        responses = sample.responses
        texts = [r.text for r in responses]
        vectors = self.embed(texts) if len(texts) > 1 else np.ones((len(texts), 1))
        figures = {
            "format_rate": mean([self.is_formatted(t) for t in texts]),
            "length_mean": mean([len(r.token_ids) for r in responses]),
            "truncated_frac": mean([r.truncated for r in responses]),
            "repetition": mean([text.repetition(r.token_ids) for r in responses]),
            "distinct_n": text.distinct_n([r.token_ids for r in responses]),
            "diversity_lexical": text.diversity_lexical(texts),
            "diversity_semantic": text.cosine_diversity(vectors),
            "vendi": text.vendi_score(vectors),
        }
        if self.is_prose:
            figures["self_bleu"] = text.self_bleu([t.split() for t in texts])
        if len(texts) < 2:  # one response is neither alike nor unlike
            figures |= dict.fromkeys(COMPARING & figures.keys(), math.nan)
        return figures


def class_numbers(names: Sequence[str | None]) -> list[int]:
    """Classes by their names as numbers in the order of appearance, -1 for None."""
    numbers: dict[str | None, int] = {None: -1}
    for name in names:
        numbers.setdefault(name, len(numbers) - 1)
    return [numbers[name] for name in names]


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each figure over the prompts that have it; nan, or no entry, where a prompt has none.

    A genre's figures are that genre's; a figure that no prompt has is left out.
    """
    means = {}
    for name in dict.fromkeys(name for score in scores for name in score):
        values = [s[name] for s in scores if not math.isnan(s.get(name, math.nan))]
        if values:
            means[name] = mean(values)
    return means


def correctness_metrics(answers: Sequence[str | None], correct: Sequence[bool]) -> dict[str, float]:
    """avg@k, pass@1, pass@k and maj@k for the k samples of one problem."""
    k = len(correct)
    return {
        f"avg@{k}": at_k.avg_at_k([correct]),
        "pass@1": at_k.pass_at_k([correct], 1),
        f"pass@{k}": at_k.pass_at_k([correct], k),
        f"maj@{k}": at_k.maj_at_k([answers], [correct]),
    }


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0 for no values."""
    return sum(values) / len(values) if values else 0.0

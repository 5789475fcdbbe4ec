"""`task=arithmetic`: chains of additions and subtractions, answered in `\\boxed{}`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from powerflow_lit.corpora import arithmetic as corpus
from powerflow_lit.tasks.base import Sampled, Task, correctness_metrics, mean, text_metrics
from powerflow_lit.tasks.boxed import last_boxed
from powerflow_lit.types import Prompt


class Arithmetic(Task):
    """Generated problems; training, evaluation and pretraining sets are disjoint by a hash.

    Args:
        train_size, eval_size: number of problems.
        seed: of the problem streams (the evaluation set is the same for every run seed).
    """

    name = "arithmetic"

    def __init__(self, *, train_size: int, eval_size: int, seed: int) -> None:
        self.headline = "pass@1"
        self._train = _prompts("train", train_size, seed)
        self._eval = _prompts("eval", eval_size, seed)

    def train_prompts(self) -> Sequence[Prompt]:
        return self._train

    def eval_prompts(self) -> Sequence[Prompt]:
        return self._eval

    def is_formatted(self, response: str) -> bool:
        return last_boxed(response) is not None

    def is_correct(self, prompt: Prompt, response: str) -> bool:
        answer = last_boxed(response)
        return answer is not None and answer == prompt.reference

    def evaluate(self, samples: Sequence[Sampled]) -> dict[str, float]:
        texts = [[r.text for r in s.responses] for s in samples]
        answers = [[last_boxed(t) for t in row] for row in texts]
        correct = [
            [a is not None and a == s.prompt.reference for a in row]
            for s, row in zip(samples, answers, strict=True)
        ]
        format_rate = mean([a is not None for row in answers for a in row])
        return {
            **correctness_metrics(answers, correct),
            "format_rate": format_rate,
            **text_metrics(samples),
        }


def _prompts(split: corpus.Split, size: int, seed: int) -> list[Prompt]:
    problems = islice(corpus.problems(split, seed), size)
    return [Prompt(i, p.prompt, str(p.answer)) for i, p in enumerate(problems)]

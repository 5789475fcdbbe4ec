"""`task=arithmetic`: chains of additions and subtractions, answered in `\\boxed{}`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from powerflow_lit.corpora import arithmetic as corpus
from powerflow_lit.tasks.boxed import BoxedAnswers
from powerflow_lit.types import Prompt


class Arithmetic(BoxedAnswers):
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

    def same_answer(self, answer: str, reference: str) -> bool:
        """As text: by its value, a repeated question (`12+3`) would answer itself."""
        return answer == reference


def _prompts(split: corpus.Split, size: int, seed: int) -> list[Prompt]:
    problems = islice(corpus.problems(split, seed), size)
    return [Prompt(i, p.prompt, str(p.answer)) for i, p in enumerate(problems)]

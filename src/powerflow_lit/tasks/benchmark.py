"""Benchmarks: evaluation questions with reference answers, from any data set."""

from __future__ import annotations

from collections.abc import Sequence

from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.boxed import BoxedAnswers
from powerflow_lit.tasks.sources import Source, read_questions
from powerflow_lit.types import Prompt


class Benchmark(BoxedAnswers):
    """Questions whose answers are compared by the rules of docs/scoring.md; none to train on.

    Args:
        name: of the benchmark, as in `benchmark=`.
        path, split, subset, revision, question_column, answer_column: see `sources.Source`.
        size: questions at most, the first ones; None is all.
        instruction: appended to each question that does not ask for a box already.

    Raises:
        TaskError: see `read_questions`; or no question has a reference answer.
    """

    def __init__(
        self,
        *,
        name: str,
        path: str,
        split: str,
        subset: str | None,
        revision: str | None,
        question_column: str | None,
        answer_column: str | None,
        size: int | None,
        instruction: str,
    ) -> None:
        self.name, self.headline = name, "pass@1"
        check_size(name, size)
        source = Source(path, split, subset, revision, question_column, answer_column)
        try:
            questions = read_questions(source, instruction=instruction)
        except TaskError as error:
            raise TaskError(f"benchmarks.{name}: {error}") from error
        given = [p for p in questions.prompts if p.reference is not None]
        if not given:
            raise TaskError(
                f"benchmarks.{name}: no question of {path} has a reference answer: "
                f"set benchmarks.{name}.answer_column"
            )
        self.notes = list(questions.notes)
        if missing := len(questions.prompts) - len(given):
            self.notes.append(f"{missing} questions without a reference answer are left out")
        self._prompts = given[:size]
        self.notes += self.check_references(self._prompts)

    def train_prompts(self) -> Sequence[Prompt]:
        return ()

    def eval_prompts(self) -> Sequence[Prompt]:
        return self._prompts


def check_size(name: str, size: int | None) -> None:
    """Raises:
    TaskError: a benchmark of no questions.
    """
    if size is not None and size < 1:
        raise TaskError(f"benchmarks.{name}.size={size}: must be 1 or more, or null for all")

"""`task=reasoning`: mathematical questions from any data set, answered in `\\boxed{}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.boxed import BoxedAnswers
from powerflow_lit.tasks.sources import Questions, Source, read_questions
from powerflow_lit.types import Prompt


class Reasoning(BoxedAnswers):
    """Questions and reference answers; training itself never reads the answers.

    A set is read when its prompts are first asked for, so that an evaluation needs no training
    data.

    Args:
        train, eval: the fields of a `Source` each.
        eval_size: evaluation questions at most, the first ones; None is all.
        instruction: appended to each question that does not ask for a box already.

    Raises:
        TaskError: here, an unknown or missing field; with the prompts, see `read_questions`.
    """

    name = "reasoning"

    def __init__(
        self,
        *,
        train: Mapping[str, Any],
        eval: Mapping[str, Any],
        eval_size: int | None,
        instruction: str,
    ) -> None:
        if eval_size is not None and eval_size < 1:
            raise TaskError(f"task.build.eval_size={eval_size}: must be 1 or more, or null for all")
        self.headline = "pass@1"
        self.notes: list[str] = []
        self._sources = {
            "train": Source.of(train, name="task.build.train"),
            "eval": Source.of(eval, name="task.build.eval"),
        }
        self._eval_size, self._instruction = eval_size, instruction

    def train_prompts(self) -> Sequence[Prompt]:
        return self._train.prompts

    def eval_prompts(self) -> Sequence[Prompt]:
        return self._eval

    @cached_property
    def _train(self) -> Questions:
        return self._read("train")

    @cached_property
    def _eval(self) -> Sequence[Prompt]:
        """Those with a reference: one without could only count as wrong."""
        prompts = self._read("eval").prompts
        given = [p for p in prompts if p.reference is not None]
        if not given:
            path = self._sources["eval"].path
            raise TaskError(
                f"task.build.eval: no question of {path} has a reference answer: "
                "set task.build.eval.answer_column"
            )
        if missing := len(prompts) - len(given):
            self.notes.append(f"{missing} evaluation questions without a reference are left out")
        chosen = given[: self._eval_size]
        self.notes.extend(self.check_references(chosen))
        return chosen

    def _read(self, role: str) -> Questions:
        try:
            questions = read_questions(self._sources[role], instruction=self._instruction)
        except TaskError as error:
            raise TaskError(f"task.build.{role}: {error}") from error
        self.notes.extend(questions.notes)
        return questions

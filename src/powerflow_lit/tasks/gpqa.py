"""`benchmark=gpqa_diamond`: multiple choice, the options shuffled once for each question."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from powerflow_lit.tasks.answers import same_answer, same_text
from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.benchmark import check_size
from powerflow_lit.tasks.boxed import BoxedAnswers
from powerflow_lit.tasks.rows import load_rows
from powerflow_lit.types import Prompt

LETTERS = "ABCDEFGHIJ"
_DRESS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"(?:(?:option|answer|choice)\s*)?(?:\(([A-J])\)|([A-J])(?:[).:]|$))", re.I)


class Gpqa(BoxedAnswers):
    """Questions with one right and several wrong options; the answer is a letter in a box.

    Accepted are the letter (`B`, `(B)`, `\\text{B}`, `B. the option`) and the text of an option.

    Args:
        name: of the benchmark, as in `benchmark=`.
        path, split, subset, revision: see `rows.load_rows`.
        question_column, answer_column, wrong_columns: the question, its right and wrong options.
        size: questions at most, the first ones; None is all.
        seed: of the order of the options; a question's order hangs on the seed and its text only,
            so that subsets of a set agree.
        instruction: stands after the options.

    Raises:
        TaskError: see `load_rows`; a column is missing, or one of its values is empty.
    """

    def __init__(
        self,
        *,
        name: str,
        path: str,
        split: str,
        subset: str | None,
        revision: str | None,
        question_column: str,
        answer_column: str,
        wrong_columns: Sequence[str],
        size: int | None,
        seed: int,
        instruction: str,
    ) -> None:
        self.name, self.headline = name, "pass@1"
        check_size(name, size)
        try:
            rows = load_rows(path, split=split, subset=subset, revision=revision)
            columns = (question_column, answer_column, *wrong_columns)
            if missing := [c for c in columns if c not in rows.column_names]:
                raise TaskError(
                    f"{path} has no column '{missing[0]}' but {', '.join(rows.column_names)}"
                )
            first = range(len(rows) if size is None else min(size, len(rows)))
            texts = [_texts(path, i, rows[i], columns) for i in first]
        except TaskError as error:
            raise TaskError(f"benchmarks.{name}: {error}") from error
        self._options: list[tuple[str, ...]] = []
        self._prompts: list[Prompt] = []
        twice = 0
        for i, (question, right, *wrong) in enumerate(texts):
            order = list(range(1 + len(wrong)))
            random.Random(f"{seed} {question}").shuffle(order)
            options = [(right, *wrong)[place] for place in order]
            lines = [f"{letter}) {o}" for letter, o in zip(LETTERS, options, strict=False)]
            text = "\n\n".join((question, "\n".join(lines), instruction.strip()))
            twice += len(set(options)) < len(options)
            self._options.append(tuple(options))
            self._prompts.append(Prompt(i, text, LETTERS[order.index(0)]))
        if twice:
            self.notes = (f"{twice} questions offer the same option twice: one letter is right",)

    def train_prompts(self) -> Sequence[Prompt]:
        return ()

    def eval_prompts(self) -> Sequence[Prompt]:
        return self._prompts

    def same_answer(self, answer: str, reference: str) -> bool:
        return answer == reference

    def meaning(self, prompt: Prompt, answer: str) -> str:
        """The letter that an answer names or whose option it spells out; else the answer."""
        bare = _DRESS.sub(r"\1", answer).strip()
        options = self._options[prompt.id]
        named = _LETTER.match(bare)
        letter = (named[1] or named[2]).upper() if named else ""
        if letter and letter in LETTERS[: len(options)]:
            return letter
        for same in (same_text, same_answer):
            found = [i for i, option in enumerate(options) if same(answer, option)]
            if len(found) == 1:
                return LETTERS[found[0]]
        return answer


def _texts(path: str, row: int, values: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """A row's question and options, stripped."""
    texts = [str(values[c] if values[c] is not None else "").strip() for c in columns]
    for column, text in zip(columns, texts, strict=True):
        if not text:
            raise TaskError(f"{path}: row {row} has nothing in column '{column}'")
    return texts

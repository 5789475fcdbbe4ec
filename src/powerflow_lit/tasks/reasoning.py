"""`task=reasoning`: mathematical questions from a file of your own, answered in `\\boxed{}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.boxed import BoxedAnswers
from powerflow_lit.types import Prompt

INSTRUCTION = " Let's think step by step and output the final answer within \\boxed{}."
READERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}


class Reasoning(BoxedAnswers):
    """Questions and reference answers from local files (parquet, jsonl, csv, arrow).

    Two layouts are read: plain columns (`question_column`, `answer_column`), and verl's, where
    `prompt` is a list of chat messages and `reward_model.ground_truth` the answer. Answers are
    compared as text without spaces, or as numbers; training itself never reads them.

    Args:
        train_file, eval_file: paths.
        question_column, answer_column: names of the columns; the answer may be missing.
        eval_size: of the evaluation file, at most.

    Raises:
        TaskError: a missing file or column, or no rows.
    """

    name = "reasoning"

    def __init__(
        self,
        *,
        train_file: str,
        eval_file: str,
        question_column: str,
        answer_column: str,
        eval_size: int,
    ) -> None:
        self.headline = "pass@1"
        columns = (question_column, answer_column)
        self._train = _prompts(train_file, *columns)
        self._eval = _prompts(eval_file, *columns)[:eval_size]

    def train_prompts(self) -> Sequence[Prompt]:
        return self._train

    def eval_prompts(self) -> Sequence[Prompt]:
        return self._eval

    def same_answer(self, answer: str, reference: str) -> bool:
        if answer.replace(" ", "") == reference.replace(" ", ""):
            return True
        try:
            return float(answer.replace(",", "")) == float(reference.replace(",", ""))
        except ValueError:
            return False


def _prompts(file: str, question_column: str, answer_column: str) -> list[Prompt]:
    """Distinct questions of a file, each with the instruction to box the answer."""
    path = Path(file).expanduser()
    if path.suffix not in READERS or not path.exists():
        raise TaskError(f"{file}: no such file, or not one of {', '.join(READERS)}")
    rows: Dataset = load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    if question_column not in rows.column_names:
        raise TaskError(
            f"{file} has no column '{question_column}' but {', '.join(rows.column_names)}: "
            "set task.build.question_column"
        )
    found: dict[str, str | None] = {}
    for row in rows:
        found.setdefault(_question(row[question_column]), _answer(row, answer_column))
    if not found:
        raise TaskError(f"{file} holds no rows")
    return [Prompt(i, question, answer) for i, (question, answer) in enumerate(found.items())]


def _question(value: Any) -> str:
    text = value if isinstance(value, str) else value[-1]["content"]  # chat messages
    return text if "\\boxed" in text else text.strip() + INSTRUCTION


def _answer(row: Mapping[str, Any], column: str) -> str | None:
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else str(value)

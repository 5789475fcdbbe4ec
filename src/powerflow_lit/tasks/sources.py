"""Questions and reference answers from any data set, whatever its columns are called."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.boxed import last_boxed
from powerflow_lit.tasks.rows import columns_of
from powerflow_lit.tasks.rows import load_rows as load_rows
from powerflow_lit.types import Prompt

# columns that are looked for where none is named, in this order and in any case
QUESTION_COLUMNS = ("prompt", "problem", "question", "messages")
ANSWER_COLUMNS = (
    "reward_model.ground_truth", "answer", "final_answer", "ground_truth", "correct answer",
    "solution", "messages",
)  # fmt: skip
WORKED = ("solution", "messages")  # hold a way to the answer, which is its last \boxed{}
GSM8K_MARK = "####"  # before the answer at the end of a worked solution


@dataclass(frozen=True)
class Source:
    """Where questions lie and in which columns; None columns are recognised.

    Args:
        path, split, subset, revision: see `load_rows`.
        question_column: text, or chat messages; a dot enters a nested column.
        answer_column: text, a number, or a list of them.
    """

    path: str
    split: str
    subset: str | None
    revision: str | None
    question_column: str | None
    answer_column: str | None

    @classmethod
    def of(cls, fields: Mapping[str, Any], *, name: str) -> Source:
        """From a mapping of its fields, as yaml has it; `name` is the mapping's own.

        Raises:
            TaskError: an unknown or missing field.
        """
        known = list(cls.__dataclass_fields__)
        for field in fields:
            if field not in known:
                raise TaskError(f"{name}: unknown key '{field}', it takes {', '.join(known)}")
        for field in known:
            if field not in fields:
                raise TaskError(f"{name}.{field} is missing")
        return cls(**{field: fields[field] for field in known})


@dataclass(frozen=True)
class Item:
    """One question as it stands in its data set."""

    row: int  # its first row
    question: str  # stripped, without any instruction of ours
    reference: str | None


@dataclass(frozen=True)
class Questions:
    """Prompts to answer, and what a person must know of them."""

    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Items:
    """The distinct questions of a data set. N rows."""

    items: tuple[Item, ...]
    rows: Dataset  # (N,) all of them
    question_column: str
    answer_column: str | None
    counts: Mapping[str, int]  # rows, and what was left out or is worth knowing, by name


def read_questions(source: Source, *, instruction: str) -> Questions:
    """Distinct questions, each with the instruction once.

    The instruction is appended where the question does not ask for a `\\boxed{}` already. Of a
    question that comes again, the first answer counts.

    Raises:
        TaskError: see `load_rows` and `read_items`.
    """
    found = read_items(source)
    prompts = (
        Prompt(i, with_instruction(item.question, instruction), item.reference)
        for i, item in enumerate(found.items)
    )
    return Questions(tuple(prompts), notes_of(source.path, found))


def with_instruction(question: str, instruction: str) -> str:
    """The question, and the instruction unless it asks for a box already."""
    return question if "\\boxed" in question else question + instruction


def read_items(source: Source) -> Items:
    """Distinct questions with their reference answers, and counts of what was left out.

    Raises:
        TaskError: see `load_rows`; a column is missing or holds something else, or no row has a
            question.
    """
    rows = load_rows(
        source.path, split=source.split, subset=source.subset, revision=source.revision
    )
    names = columns_of(rows.features)
    question_column = _column(source.path, source.question_column, names, "question")
    if question_column is None:
        raise TaskError(
            f"{source.path}: none of its columns ({', '.join(names)}) is called "
            f"{', '.join(QUESTION_COLUMNS)}: set question_column"
        )
    answer_column = _column(source.path, source.answer_column, names, "answer")
    counts: Counter[str] = Counter(rows=len(rows))
    questions = column_values(rows, question_column)
    answers = column_values(rows, answer_column) if answer_column else [None] * len(rows)
    worked = (answer_column or "").split(".")[-1].lower() in WORKED
    found: dict[str, Item] = {}
    for row, (value, given) in enumerate(zip(questions, answers, strict=True)):
        try:
            question = _question(value, counts)
            reference = _reference(given, worked, counts)
        except _WrongTypeError as error:
            column = answer_column if error.of_answer else question_column
            raise TaskError(f"{source.path}: row {row} of column '{column}' {error}") from None
        if not question:
            counts["without question"] += 1
            continue
        if question in found:
            counts["duplicates"] += 1
            counts["contradictions"] += reference != found[question].reference
            continue
        found[question] = Item(row, question, reference)
        counts["without reference"] += reference is None
    if not found:
        raise TaskError(
            f"{source.path}: none of its {len(rows):,} rows has text in '{question_column}'"
        )
    return Items(tuple(found.values()), rows, question_column, answer_column, counts)


NOTES = {
    "duplicates": "repeated questions left out: {}",
    "contradictions": "of them with another answer than the first, which counts: {}",
    "without question": "rows without a question left out: {}",
    "without reference": "questions without a reference answer: {}",
    "more turns": "rows with further turns (system or earlier), which are left out: {}",
    "several answers": "references of several answers, joined by a comma: {}",
}


def notes_of(path: str, found: Items) -> tuple[str, ...]:
    """What a person must know of the rows: a line, or nothing."""
    counts = found.counts
    told = [text.format(f"{counts[name]:,}") for name, text in NOTES.items() if counts[name]]
    total = f"{path}: {len(found.items):,} questions of {counts['rows']:,} rows"
    return (f"{total}: {'; '.join(told)}",) if told else ()


class _WrongTypeError(TypeError):
    """A value that is no question or no answer."""

    def __init__(self, message: str, *, of_answer: bool) -> None:
        super().__init__(message)
        self.of_answer = of_answer


def _column(path: str, wanted: str | None, names: Sequence[str], role: str) -> str | None:
    """The column for a role: the one named, or the first that is recognised."""
    if wanted is not None:
        if wanted in names:
            return wanted
        close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"set {role}_column to one of them"
        raise TaskError(f"{path} has no column '{wanted}' but {', '.join(names)}: {hint}")
    lowered = {name.lower(): name for name in reversed(names)}
    known = QUESTION_COLUMNS if role == "question" else ANSWER_COLUMNS
    return next((lowered[name] for name in known if name in lowered), None)


def column_values(rows: Dataset, column: str) -> list[Any]:
    """A column as python values; only this one is read from the disk."""
    if column in rows.column_names:
        return rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    first, *parts = column.split(".")
    values = column_values(rows, first)
    for part in parts:
        values = [None if value is None else value.get(part) for value in values]
    return values


def _question(value: Any, counts: Counter[str]) -> str:
    """The text of a question, or of the last user turn; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    turns = _turns(value)
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    if turns and not asked:
        raise _WrongTypeError("has no turn of a user: set question_column", of_answer=False)
    before = next((i for i in reversed(range(len(turns))) if turns[i]["role"] == "user"), 0)
    counts["more turns"] += before > 0
    return asked[-1].strip() if asked else ""


def _turns(value: Any) -> Sequence[Mapping[str, str]]:
    """Chat messages, refused where they are anything else."""
    if not isinstance(value, list):
        raise _WrongTypeError(
            f"holds {_kind(value)}, not text or chat messages: set question_column",
            of_answer=False,
        )
    for turn in value:
        text = isinstance(turn, Mapping) and isinstance(turn.get("content"), str)
        if not text or not isinstance(turn.get("role"), str):
            raise _WrongTypeError(
                f"holds a list of {_kind(turn)}, not chat messages with role and content (text): "
                "set question_column",
                of_answer=False,
            )
    return value


def _reference(value: Any, worked: bool, counts: Counter[str]) -> str | None:
    """The answer as text; None where there is none, or a worked solution boxes none."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = next((t["content"] for t in reversed(value) if t.get("role") == "assistant"), None)
    if isinstance(value, list):
        parts = [text for text in (_answer(part) for part in value) if text]
        counts["several answers"] += len(parts) > 1
        return ", ".join(parts) or None
    text = _answer(value)
    if text is None:
        return None
    boxed = last_boxed(text)
    if boxed is None and GSM8K_MARK in text:
        boxed = text.rpartition(GSM8K_MARK)[2].strip()
    return boxed if worked or boxed is not None else text


def _answer(value: Any) -> str | None:
    """Text stripped; a whole number written as a fraction (27.0) without it."""
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _WrongTypeError(
            f"holds {_kind(value)}, not an answer as text or number: set answer_column",
            of_answer=True,
        )
    return str(value).strip() or None


def _kind(value: Any) -> str:
    kinds: Sequence[tuple[type | tuple[type, ...], str]] = (
        (str, "text"), (bool, "truth values"), ((int, float), "a number"), (Mapping, "a record"),
    )  # fmt: skip
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)

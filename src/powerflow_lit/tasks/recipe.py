"""Rules that turn a set of questions into a training set, each with a count of what it drops."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.sources import Item, with_instruction

Lengths = Callable[[Sequence[str]], Sequence[int]]

PROOF = re.compile(r"\b(prove|show|demonstrate|verify) that\b|\bprove\b", re.IGNORECASE)
# an option's mark: (A), A), A. or A: with or without \\text{} and the like around it
OPTION = r"(?:^|[\s({{$}}~])(?:\\(?:text|textbf|mathrm|mathbf)\s*\{{)?\(?{letter}\s*[).:]"
OPTIONS = [re.compile(OPTION.format(letter=letter)) for letter in "ABC"]
PLAIN_NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?|[-+]?\.\d+")


@dataclass(frozen=True)
class Rules:
    """Which questions to drop; the first rule that applies counts. None and False drop nothing.

    Args:
        without_answer: no reference answer (no `\\boxed{}` in the solution, say).
        leaked_answer_characters: the answer has so many characters or more and stands in the
            question.
        max_solution_length: longest solution kept, in the unit of `Lengths`.
        max_question_characters: longest question kept, without the instruction.
        proofs: asks to prove or to show something.
        multiple_choice: has options A, B and C.
        non_numeric: the answer is no plain number.
    """

    without_answer: bool
    leaked_answer_characters: int | None
    max_solution_length: int | None
    max_question_characters: int | None
    proofs: bool
    multiple_choice: bool
    non_numeric: bool


def apply_rules(
    items: Sequence[Item],
    solutions: Sequence[str | None] | None,
    rules: Rules,
    lengths: Lengths,
) -> tuple[list[Item], dict[str, int]]:
    """Items that pass, and how many each rule dropped.

    Args:
        items: questions without the instruction.
        solutions: of each item; None where the data has none, and then no length is bounded.
        lengths: of texts, in the unit of `rules.max_solution_length`.
    """
    longest = rules.max_solution_length
    size: Sequence[int] = [0] * len(items)
    if solutions is not None and longest is not None:
        size = lengths([text or "" for text in solutions])
    dropped: Counter[str] = Counter()
    kept = []
    for item, length in zip(items, size, strict=True):
        why = _fault(item, length, rules)
        if why is None:
            kept.append(item)
        else:
            dropped[why] += 1
    order = [
        "without answer", "answer in the question", "solution too long", "question too long",
        "proof", "multiple choice", "answer not a number",
    ]  # fmt: skip
    return kept, {why: dropped[why] for why in order}


def _fault(item: Item, solution_length: int, rules: Rules) -> str | None:
    question, answer = item.question, item.reference
    leak, longest = rules.leaked_answer_characters, rules.max_question_characters
    if rules.without_answer and answer is None:
        return "without answer"
    if leak is not None and answer is not None and len(answer) >= leak and answer in question:
        return "answer in the question"
    if rules.max_solution_length is not None and solution_length > rules.max_solution_length:
        return "solution too long"
    if longest is not None and len(question) > longest:
        return "question too long"
    if rules.proofs and PROOF.search(question):
        return "proof"
    if rules.multiple_choice and all(option.search(question) for option in OPTIONS):
        return "multiple choice"
    if rules.non_numeric and not is_plain_number(answer):
        return "answer not a number"
    return None


def is_plain_number(answer: str | None) -> bool:
    """An integer or decimal, thousands in commas, perhaps between dollar signs."""
    return answer is not None and PLAIN_NUMBER.fullmatch(answer.strip("$ ")) is not None


def without_instruction(item: Item, instruction: str) -> Item:
    """The item without the instruction at the question's end, if it stands there."""
    question = item.question.removesuffix(instruction.strip()).rstrip()
    return Item(item.row, question, item.reference)


def seeded_sample(items: Sequence[Item], size: int | None, seed: int) -> list[Item]:
    """`size` items (None: all) in their old order.

    Each question's place in the draw is a hash of (seed, question), so the choice depends neither
    on the rows' order nor on a random generator's version, and a question more or less in the
    source changes one question of the sample at most.

    Raises:
        TaskError: there are fewer.
    """
    if size is None:
        return list(items)
    if size > len(items):
        raise TaskError(
            f"size={size}: only {len(items):,} questions pass the rules: set size=null to keep all"
        )
    drawn = sorted(items, key=lambda item: _digest(f"{seed}-{item.question}"))[:size]
    return sorted(drawn, key=lambda item: item.row)


def content_hash(items: Sequence[Item]) -> str:
    """sha256 of the sorted questions, whatever file they stand in."""
    return _digest("\0".join(sorted(item.question for item in items)))


def verl_rows(items: Sequence[Item], instruction: str, data_source: str) -> list[dict[str, Any]]:
    """Rows in verl's layout; `extra_info.source_row` is the row in the source."""
    return [
        {
            "data_source": data_source,
            "prompt": [
                {"role": "user", "content": with_instruction(item.question, instruction)}
            ],
            "ability": "math",
            "reward_model": {
                "ground_truth": [] if item.reference is None else [item.reference],
                "style": "rule",
            },
            "extra_info": {"index": index, "split": "train", "source_row": item.row},
        }
        for index, item in enumerate(items)
    ]  # fmt: skip


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

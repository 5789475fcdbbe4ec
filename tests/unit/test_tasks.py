"""Tasks: what counts as formatted and correct, and questions from files."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from powerflow_lit.tasks.arithmetic import Arithmetic
from powerflow_lit.tasks.base import Response, Sampled, TaskError
from powerflow_lit.tasks.creative import Creative
from powerflow_lit.tasks.reasoning import INSTRUCTION, Reasoning
from powerflow_lit.types import Prompt


def response(text: str) -> Response:
    return Response(text, tuple(range(len(text.split()))), truncated=False)


def test_arithmetic_scores_the_last_box_and_asks_for_one() -> None:
    task = Arithmetic(train_size=4, eval_size=4, seed=0)
    prompt = Prompt(0, "Compute 1 + 2.", "3")
    assert task.is_formatted("Answer: \\boxed{4}")
    assert not task.is_formatted("Answer: 4")
    assert task.is_correct(prompt, "\\boxed{4} \\boxed{3}")
    assert not task.is_correct(prompt, "Answer: 3")
    texts = ("\\boxed{3}", "\\boxed{3}", "\\boxed{4}", "3")
    figures = task.evaluate([Sampled(prompt, tuple(map(response, texts)))])
    assert figures["avg@4"] == figures["pass@1"] == 0.5
    assert figures["pass@4"] == figures["maj@4"] == 1.0
    assert figures["format_rate"] == 0.75


def test_creative_counts_valid_pieces_modes_and_unique_pieces() -> None:
    task = Creative()
    prompt = next(p for p in task.eval_prompts() if "poem about a cat" in p.text)
    day = "The cat runs beside the day,\nand sings again below the bay."
    same_mode = day.replace("sings", "hums")
    moon = "The cat runs beside the moon,\nand sings again below the dune."
    broken = day.replace("bay", "dune")
    sample = Sampled(prompt, tuple(map(response, (day, day, same_mode, moon, broken))))
    figures = task.evaluate([sample])
    assert figures["quality"] == pytest.approx(0.8)
    assert figures["modes@5"] == 2
    assert figures["unique_valid@5"] == 3
    assert task.is_formatted("anything"), "no format, so psi is never earned"


def test_questions_are_read_from_verls_parquet_and_the_instruction_stands_once(
    tmp_path: Path,
) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": [answer]}}
        for text, answer in (("1+1?", "2"), ("1+1?", "2"), ("Half? Use \\boxed{}.", "0.5"))
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "q.parquet")
    task = _reasoning(tmp_path / "q.parquet", "prompt", "reward_model.ground_truth")
    first, second = task.train_prompts()
    assert first == Prompt(0, "1+1?" + INSTRUCTION, "2")
    assert second.text.count("boxed") == 1
    assert task.is_correct(second, "\\boxed{.5}")
    assert not task.is_correct(second, "\\boxed{2}")


def test_plain_columns_may_lack_the_answer(tmp_path: Path) -> None:
    Dataset.from_list([{"problem": "1+1?"}]).to_json(tmp_path / "q.jsonl")
    task = _reasoning(tmp_path / "q.jsonl", "problem", "answer")
    assert task.is_correct(task.train_prompts()[0], "\\boxed{2}") is None


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"nothing\.parquet"):
        _reasoning(tmp_path / "nothing.parquet", "prompt", "answer")
    Dataset.from_list([{"problem": "1+1?"}]).to_json(tmp_path / "q.jsonl")
    with pytest.raises(TaskError, match="no column 'prompt' but problem"):
        _reasoning(tmp_path / "q.jsonl", "prompt", "answer")


def _reasoning(file: Path, question: str, answer: str) -> Reasoning:
    return Reasoning(
        train_file=str(file), eval_file=str(file), question_column=question,
        answer_column=answer, eval_size=10,
    )  # fmt: skip

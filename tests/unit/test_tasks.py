"""Tasks: what counts as formatted and correct, and questions from files."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from powerflow_lit.tasks.arithmetic import Arithmetic
from powerflow_lit.tasks.base import Response, Sampled, TaskError, mean_scores
from powerflow_lit.tasks.creative import Creative
from powerflow_lit.tasks.reasoning import Reasoning
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


def reasoning(folder: Path, **other: Any) -> Reasoning:
    rows = [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(4)]
    Dataset.from_list([*rows, rows[0]]).to_parquet(folder / "q.parquet")
    columns = dict.fromkeys(("subset", "revision", "question_column", "answer_column"))
    source = {"path": str(folder / "q.parquet"), "split": "train", **columns}
    build = {"train": source, "eval": source, "eval_size": 2, "instruction": " \\boxed{}?"}
    return Reasoning(**(build | other))


def test_reasoning_has_prompts_with_the_instruction_and_a_bounded_evaluation(
    tmp_path: Path,
) -> None:
    task = reasoning(tmp_path)
    assert [p.text for p in task.train_prompts()] == [f"{i}+1? \\boxed{{}}?" for i in range(4)]
    assert [p.reference for p in task.eval_prompts()] == ["1", "2"]
    assert len(reasoning(tmp_path, eval_size=None).eval_prompts()) == 4
    assert task.is_correct(task.train_prompts()[0], "\\boxed{1}")
    assert not task.is_correct(task.train_prompts()[0], "\\boxed{2}")


def test_reasoning_reads_a_set_only_when_asked_and_tells_what_it_left_out(tmp_path: Path) -> None:
    nowhere = {"path": "/nowhere.parquet", "split": "train"}
    nowhere |= dict.fromkeys(("subset", "revision", "question_column", "answer_column"))
    task = reasoning(tmp_path, train=nowhere)
    assert task.notes == []
    assert len(task.eval_prompts()) == len(task.eval_prompts()) == 2
    (note,) = task.notes
    assert note.endswith("4 questions of 5 rows: repeated questions left out: 1")
    with pytest.raises(TaskError, match=r"task\.build\.train: /nowhere\.parquet: no such file"):
        task.train_prompts()


def test_reasoning_refuses_settings_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task\.build\.eval_size=0"):
        reasoning(tmp_path, eval_size=0)
    with pytest.raises(TaskError, match=r"task\.build\.train: unknown key 'file'"):
        reasoning(tmp_path, train={"file": "a.parquet"})


def test_a_figure_is_the_mean_over_the_prompts_that_have_it() -> None:
    scores = [{"a": 1.0, "b": 4.0, "c": nan}, {"a": 3.0, "b": nan, "c": nan}]
    assert mean_scores(scores) == {"a": 2.0, "b": 4.0}
    assert mean_scores([]) == {}

"""Benchmarks: what is asked, what counts, and what a person is told of the data."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from powerflow_lit.config import conf_dir
from powerflow_lit.tasks.base import Response, Sampled, TaskError
from powerflow_lit.tasks.benchmark import Benchmark
from powerflow_lit.tasks.gpqa import Gpqa
from powerflow_lit.types import Prompt

CONF = Path(conf_dir()) / "benchmark"
MINERVA = Path(__file__).parents[3] / "shared" / "data" / "math" / "minerva_math.parquet"


def built(name: str, **overrides: Any) -> Any:
    node = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), overrides)
    fields = {str(k): v for k, v in OmegaConf.to_container(node, resolve=True).items()}  # type: ignore[union-attr]
    return get_class(fields.pop("_target_"))(**fields)


def sampled(prompt: Prompt, *texts: str) -> Sampled:
    return Sampled(prompt, tuple(Response(t, tuple(t.encode()), truncated=False) for t in texts))


@pytest.fixture
def questions(tmp_path: Path) -> str:
    file = tmp_path / "own.jsonl"
    rows = [("1+1?", "2"), ("Half of 1? Use \\boxed{}.", "\\frac{1}{2}"), ("And?", "\\frac{1")]
    Dataset.from_list([{"question": q, "answer": a} for q, a in rows]).to_json(file)
    return str(file)


def test_every_benchmark_has_the_same_keys_and_stands_where_its_name_says(tmp_path: Path) -> None:
    names = sorted(p.stem for p in CONF.glob("*.yaml") if p.stem != "paper")
    (tmp_path / "own.yaml").write_text(
        f"defaults: [benchmark: [{', '.join(names)}], _self_]\n"
        f"hydra: {{searchpath: ['file://{CONF.parent}']}}\nbenchmarks: {{}}\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        found = compose("own").benchmarks
        paper = compose("own", overrides=["benchmark=paper"]).benchmarks
    assert sorted(found) == names
    flat = {"path", "split", "subset", "revision", "question_column", "answer_column", "size",
            "instruction"}  # fmt: skip
    for name, node in found.items():
        assert node.name == name
        assert flat <= set(node)
        assert "\\boxed{}" in node.instruction
    assert list(paper) == ["math500", "olympiadbench", "aime24", "aime25", "amc23", "gpqa_diamond"]


def test_a_file_of_one_s_own_is_a_benchmark(questions: str) -> None:
    task = built("file", path=questions, size=2)
    first, second = task.eval_prompts()
    assert first == Prompt(0, "1+1?" + OmegaConf.load(CONF / "file.yaml").instruction, "2")
    assert second.text.count("boxed") == 1
    assert task.is_correct(second, "so \\boxed{50\\%}")
    assert not task.is_correct(second, "so 0.5")
    assert list(task.train_prompts()) == []
    assert task.notes == []
    assert set(task.score(sampled(first, "\\boxed{2}"))) == set(
        task.score(sampled(second, "no box"))
    )


def test_votes_count_by_meaning(questions: str) -> None:
    task = built("file", path=questions, size=2)
    _, half = task.eval_prompts()
    texts = [f"\\boxed{{{a}}}" for a in ("3", "3", "\\frac12", "0.5", "1/2", "6/2", "7")]
    figures = task.score(sampled(half, *texts, "no answer"))
    assert figures["avg@8"] == pytest.approx(3 / 8)
    assert figures["maj@8"] == 0.5  # three say a half, three say 3, each in its ways
    assert figures["format_rate"] == pytest.approx(7 / 8)


def test_references_that_nothing_can_match_are_told_and_counted_apart(questions: str) -> None:
    task = built("file", path=questions)
    (note,) = task.notes
    assert "1 of 3 references cannot match even themselves" in note
    assert "\\frac{1:" in note
    assert "other 2" in note
    right = ("\\boxed{2}", "\\boxed{.5}", "\\boxed{\\frac{1}")
    scores = [
        task.score(sampled(p, text)) for p, text in zip(task.eval_prompts(), right, strict=True)
    ]
    figures = task.evaluate(
        [sampled(p, text) for p, text in zip(task.eval_prompts(), right, strict=True)]
    )
    assert [s["unparsable_reference"] for s in scores] == [0, 0, 1]
    assert figures["avg@1"] == pytest.approx(2 / 3)
    assert figures["avg@1_parsable"] == 1.0
    assert figures["unparsable_reference"] == pytest.approx(1 / 3)
    assert not any(np.isnan(list(figures.values())))


def test_the_public_minerva_file_says_what_is_wrong_with_it() -> None:
    if not MINERVA.is_file():
        pytest.skip("the public benchmark files are not beside this repository")
    task = built("minerva", path=str(MINERVA))
    assert len(task.eval_prompts()) == 272
    assert any("68 of 272 references cannot match even themselves" in n for n in task.notes)


def test_questions_without_an_answer_are_left_out_and_told(tmp_path: Path) -> None:
    rows = [{"question": "a?", "answer": "1"}, {"question": "b?", "answer": None}]
    Dataset.from_list(rows).to_json(tmp_path / "q.jsonl")
    task = built("file", path=str(tmp_path / "q.jsonl"))
    assert [p.reference for p in task.eval_prompts()] == ["1"]
    assert "1 questions without a reference answer are left out" in task.notes
    Dataset.from_list([{"question": "a?"}]).to_json(tmp_path / "none.jsonl")
    with pytest.raises(TaskError, match=r"benchmarks\.file: no question of .*answer_column"):
        built("file", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(TaskError, match=r"benchmarks\.file: .*absent\.jsonl"):
        built("file", path=str(tmp_path / "absent.jsonl"))
    with pytest.raises(TaskError, match=r"benchmarks\.file\.size=0"):
        built("file", path=str(tmp_path / "q.jsonl"), size=0)


COLUMNS = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2",
           "Incorrect Answer 3"]  # fmt: skip


def gpqa_file(folder: Path, rows: int, name: str = "gpqa.csv") -> str:
    with (folder / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Record ID", *COLUMNS])
        for i in range(rows):
            writer.writerow([i, f"Question {i}?", f"{i}.5 eV", f"{i + 1} eV", "Benzene", "$\\pi$"])
    return str(folder / name)


def test_the_right_letter_varies_and_hangs_on_seed_and_question_only(tmp_path: Path) -> None:
    task: Gpqa = built("gpqa_diamond", path=gpqa_file(tmp_path, 200))
    prompts = task.eval_prompts()
    counts = Counter(p.reference for p in prompts)
    assert set(counts) == set("ABCD")
    assert min(counts.values()) > 25  # 50 expected, sd 6
    for i, prompt in enumerate(prompts):
        assert f"{prompt.reference}) {i}.5 eV\n" in prompt.text + "\n"
        assert prompt.text.startswith(f"Question {i}?\n\nA) ")
        assert prompt.text.endswith("letter of the right option within \\boxed{}.")
    few = built("gpqa_diamond", path=gpqa_file(tmp_path, 200), size=20).eval_prompts()
    assert few == prompts[:20]
    other = built("gpqa_diamond", path=gpqa_file(tmp_path, 200), seed=1).eval_prompts()
    assert 20 < sum(a.reference == b.reference for a, b in zip(prompts, other, strict=True)) < 90


def test_a_letter_or_its_option_is_the_answer(tmp_path: Path) -> None:
    task: Gpqa = built("gpqa_diamond", path=gpqa_file(tmp_path, 1))
    (prompt,) = task.eval_prompts()
    right = str(prompt.reference)
    wrong = next(letter for letter in "ABCD" if letter != right)
    for answer in (right, f"({right})", f"\\text{{{right}}}", f"\\textbf{{({right})}}",
                   right.lower(), f"{right}) 0.5 eV", f"{right}. whatever", f"Option {right}",
                   "0.5 eV", "0.5  eV", "0.5\\ eV", "0.50 eV"):  # fmt: skip
        assert task.is_correct(prompt, f"so \\boxed{{{answer}}}"), answer
    for answer in (
        wrong,
        f"({wrong})",
        "1 eV",
        "benzene",
        "\\pi",
        "E",
        "none",
        f"{wrong}, {right}",
    ):
        assert not task.is_correct(prompt, f"so \\boxed{{{answer}}}"), answer
    assert task.is_correct(prompt, f"the answer is {right}") is False
    votes = sampled(prompt, f"\\boxed{{{right}}}", "\\boxed{0.5 eV}", f"\\boxed{{{wrong}}}")
    assert task.score(votes)["maj@3"] == 1.0


def test_a_gpqa_file_without_a_column_or_with_an_empty_option_is_named(tmp_path: Path) -> None:
    path = gpqa_file(tmp_path, 2)
    with pytest.raises(TaskError, match=r"benchmarks\.gpqa_diamond: .*no column 'Right'"):
        built("gpqa_diamond", path=path, answer_column="Right")
    Dataset.from_list([{c: "" if c.endswith("2") else c for c in COLUMNS}]).to_csv(
        tmp_path / "e.csv"
    )
    with pytest.raises(TaskError, match="row 0 has nothing in column 'Incorrect Answer 2'"):
        built("gpqa_diamond", path=str(tmp_path / "e.csv"))
    Dataset.from_list([{c: c.split()[0] for c in COLUMNS}]).to_csv(tmp_path / "t.csv")
    (note,) = built("gpqa_diamond", path=str(tmp_path / "t.csv")).notes
    assert "1 questions offer the same option twice" in note


def test_scoring_plain_numbers_is_fast_and_starts_no_process(
    questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(answer: str, reference: str) -> bool:
        raise AssertionError((answer, reference))

    monkeypatch.setattr("powerflow_lit.tasks.answers.compare", refuse)
    task: Benchmark = built("file", path=questions, size=1)
    (prompt,) = task.eval_prompts()
    figures = task.score(sampled(prompt, *(f"\\boxed{{{i % 7}}}" for i in range(256))))
    assert figures["maj@256"] == 0.25  # 0, 1, 2 and 3 have 37 votes each, 4 to 6 have 36
    assert figures["avg@256"] == pytest.approx(37 / 256)

"""The rebuild of the training set: what each rule drops, the same hash from the same inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from hydra import compose, initialize_config_dir

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.schema_tools import PrepareDataConfig
from powerflow_lit.data_preparation import prepare, table_of
from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.reasoning import Reasoning
from powerflow_lit.tasks.recipe import is_plain_number
from powerflow_lit.tasks.sources import Source, read_questions
from tests.tiny_models import byte_tokenizer

INSTRUCTION = " Let's think step by step and output the final answer within \\boxed{}."


def numina(folder: Path, *rows: tuple[str, str], extra: int = 20) -> Path:
    """A file in NuminaMath-CoT's columns; `extra` are questions that no rule drops."""
    more = [(f"What is {i} + 1?", f"It is \\boxed{{{i + 1}}}.") for i in range(extra)]
    path = folder / "numina.jsonl"
    with path.open("w") as file:
        for problem, solution in [*rows, *more]:
            turns = [("user", problem), ("assistant", solution)]
            row = {
                "source": "synthetic_math", "problem": problem, "solution": solution,
                "messages": [{"role": role, "content": text} for role, text in turns],
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return path


def build(source: Path, output: Path, *overrides: str) -> dict[str, Any]:
    chosen = [f"source.path={source}", f"output={output}", "size=null", *overrides]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return prepare(typed(compose("prepare_data", overrides=chosen), PrepareDataConfig))


def questions(path: Path) -> list[str]:
    source = Source(str(path), "train", None, None, None, None)
    return [p.text for p in read_questions(source, instruction=INSTRUCTION).prompts]


def test_each_rule_drops_what_it_says_and_is_counted(tmp_path: Path) -> None:
    source = numina(
        tmp_path,
        ("What is 3 + 1?", "Again: \\boxed{4}."),
        ("", "\\boxed{1}"),
        ("Prove that 2 is even.", "It is 2 times 1."),
        ("Is it 1234 or 1235?", "It is \\boxed{1234}."),
        ("Is it 12 or 13?", "It is \\boxed{12}, and short answers may stand anywhere."),
        ("What is the long way?", "step " * 1001 + "\\boxed{9}"),
        ("Show that x is 5.", "So \\boxed{5}."),
        ("Which? (A) 6 (B) 7 (C) 8", "It is \\boxed{7}."),
        ("What is half of x?", "It is \\boxed{\\frac{x}{2}}."),
        ("How much " + "is it " * 50 + "?", "It is \\boxed{3}."),
    )
    always = {
        "without question": 1, "repeated": 1, "without answer": 1, "answer in the question": 1,
        "solution too long": 1, "question too long": 0, "proof": 0, "multiple choice": 0,
        "answer not a number": 0, "not drawn": 0,
    }  # fmt: skip
    manifest = build(source, tmp_path / "default.parquet")
    assert manifest["dropped"] == always
    assert manifest["rows_in_source"] == 30
    assert manifest["questions"] == 25
    strict = ("drop.proofs=true", "drop.multiple_choice=true", "drop.non_numeric=true",
              "drop.max_question_characters=200")  # fmt: skip
    manifest = build(source, tmp_path / "strict.parquet", *strict)
    assert manifest["dropped"] == always | {
        "question too long": 1, "proof": 1, "multiple choice": 1, "answer not a number": 1,
    }  # fmt: skip
    kept = questions(tmp_path / "strict.parquet")
    assert sorted(kept) == sorted(
        [f"What is {i} + 1?{INSTRUCTION}" for i in range(20)] + [f"Is it 12 or 13?{INSTRUCTION}"]
    )
    loose = ("drop.leaked_answer_characters=null", "solution.max_words=null",
             "drop.without_answer=false")  # fmt: skip
    manifest = build(source, tmp_path / "loose.parquet", *loose)
    assert manifest["questions"] == 28
    assert manifest["solution_length"] == "not bounded"


def test_solutions_are_measured_in_tokens_where_a_tokenizer_is_given(tmp_path: Path) -> None:
    byte_tokenizer(chat=False).save_pretrained(tmp_path / "tokenizer")
    source = numina(tmp_path, ("Long?", "x" * 60 + "\\boxed{1}"), ("Short?", "\\boxed{1}"), extra=0)
    chosen = (f"solution.tokenizer={tmp_path / 'tokenizer'}", "solution.max_tokens=60")
    manifest = build(source, tmp_path / "out.parquet", *chosen)
    assert manifest["dropped"]["solution too long"] == 1
    assert questions(tmp_path / "out.parquet") == ["Short?" + INSTRUCTION]
    assert manifest["solution_length"].startswith("at most 60 tokens of ")


def test_without_solutions_the_length_rule_is_said_to_be_off(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}?", "answer": str(i)} for i in range(5)]
    Dataset.from_list(rows).to_parquet(tmp_path / "q.parquet")
    manifest = build(tmp_path / "q.parquet", tmp_path / "out.parquet")
    assert manifest["solution_length"] == "not bounded: the source has no column 'solution'"
    assert manifest["questions"] == 5


def test_the_same_inputs_give_the_same_set_and_hash_and_another_seed_does_not(
    tmp_path: Path,
) -> None:
    source = numina(tmp_path, extra=50)
    first = build(source, tmp_path / "a.parquet", "size=20")
    again = build(source, tmp_path / "b.parquet", "size=20")
    other = build(source, tmp_path / "c.parquet", "size=20", "seed=1")
    assert questions(tmp_path / "a.parquet") == questions(tmp_path / "b.parquet")
    assert first["sha256"] == again["sha256"] != other["sha256"]
    assert first["questions"] == 20
    assert first["dropped"]["not drawn"] == 30
    lines = source.read_text().splitlines()
    source.write_text("\n".join(lines[::-1]) + "\n")
    assert build(source, tmp_path / "d.parquet", "size=20")["sha256"] == first["sha256"]
    saved = json.loads((tmp_path / "a.parquet.json").read_text())
    assert saved == first
    assert saved["settings"]["size"] == 20
    assert {"powerflow_lit", "datasets", "pyarrow"} <= saved["versions"].keys()


def test_the_set_is_in_verls_layout_and_opens_as_a_task(tmp_path: Path) -> None:
    build(numina(tmp_path, extra=5), tmp_path / "out" / "set.parquet")
    path = str(tmp_path / "out" / "set.parquet")
    rows = load_dataset("parquet", data_files=path, split="train")
    assert rows[2] == {
        "data_source": "numina_math",
        "prompt": [{"role": "user", "content": "What is 2 + 1?" + INSTRUCTION}],
        "ability": "math",
        "reward_model": {"ground_truth": ["3"], "style": "rule"},
        "extra_info": {"index": 2, "split": "train", "source_row": 2},
    }
    columns = dict.fromkeys(("subset", "revision", "question_column", "answer_column"))
    source = {"path": path, "split": "train", **columns}
    task = Reasoning(train=source, eval=source, eval_size=None, instruction=INSTRUCTION)
    assert task.train_prompts()[2].text == "What is 2 + 1?" + INSTRUCTION
    assert task.train_prompts()[2].reference == "3"


def test_a_set_made_from_a_set_keeps_its_prompts_and_its_hash(tmp_path: Path) -> None:
    boxed = ("Which \\boxed{x} is 2?", "It is \\boxed{2}.")  # asks for a box of its own
    first = build(numina(tmp_path, boxed), tmp_path / "a.parquet")
    again = build(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert questions(tmp_path / "a.parquet") == questions(tmp_path / "b.parquet")
    assert again["sha256"] == first["sha256"], "of the questions without the instruction"


def test_what_cannot_work_is_named(tmp_path: Path) -> None:
    source = numina(tmp_path)
    with pytest.raises(TaskError, match=r"size=21: only 20 questions pass .* size=null"):
        build(source, tmp_path / "out.parquet", "size=21")
    with pytest.raises(ConfigError, match=r"must end in \.parquet"):
        build(source, tmp_path / "out.csv")
    build(source, tmp_path / "out.parquet")
    with pytest.raises(ConfigError, match="is the source itself"):
        build(tmp_path / "out.parquet", tmp_path / "out.parquet")
    with pytest.raises(ConfigError, match="size=0"):
        build(source, tmp_path / "out.parquet", "size=0")


def test_the_table_accounts_for_every_row(tmp_path: Path) -> None:
    manifest = build(numina(tmp_path, ("Prove it.", "So.")), tmp_path / "out.parquet", "size=7")
    assert manifest["rows_in_source"] - sum(manifest["dropped"].values()) == 7
    table = table_of(manifest)
    assert table.row_count == len(manifest["dropped"]) + 2


@pytest.mark.parametrize(
    ("answer", "plain"),
    [("5", True), ("-2.50", True), ("$12$", True), ("1,234", True), (".5", True), ("1,23", False),
     ("\\frac{1}{2}", False), ("x", False), (None, False), ("", False)],
)  # fmt: skip
def test_a_plain_number_is_told_from_an_expression(answer: str | None, plain: bool) -> None:
    assert is_plain_number(answer) is plain

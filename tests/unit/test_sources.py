"""Questions from data sets of every layout, and what is said of each that cannot be used."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.sources import Questions, Source, load_rows, read_items, read_questions

INSTRUCTION = " Box it: \\boxed{}."
ROWS = [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(6)]


def source(
    path: Path | str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    question: str | None = None,
    answer: str | None = None,
) -> Source:
    return Source(str(path), split, subset, revision, question, answer)


def read(path: Path | str, **fields: Any) -> Questions:
    return read_questions(source(path, **fields), instruction=INSTRUCTION)


def pairs(path: Path | str, **fields: Any) -> list[tuple[str, str | None]]:
    return [(p.text.removesuffix(INSTRUCTION), p.reference) for p in read(path, **fields).prompts]


def jsonl(folder: Path, *rows: dict[str, Any], name: str = "q.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def refusal(path: Path | str, **fields: Any) -> str:
    """The one line that a source is refused with."""
    with pytest.raises(TaskError) as caught:
        read(path, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- where rows lie ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("q.parquet", lambda rows, path: rows.to_parquet(path)),
        ("q.jsonl", lambda rows, path: rows.to_json(path)),
        ("q.json", lambda rows, path: rows.to_json(path, lines=False)),
        ("q.csv", lambda rows, path: rows.to_csv(path)),
    ],
)
def test_a_file_of_any_kind_gives_the_same_questions_whatever_split_is_asked_for(
    tmp_path: Path, name: str, write: Callable[[Dataset, Path], Any]
) -> None:
    write(Dataset.from_list(ROWS), tmp_path / name)
    expected = [(row["problem"], row["answer"]) for row in ROWS]
    assert pairs(tmp_path / name) == expected
    assert pairs(tmp_path / name, split="test") == expected
    assert pairs(tmp_path / name, split="train[1:3]") == expected[1:3]


def test_a_saved_folder_is_read_whole_or_by_its_splits(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    halves = {"train": Dataset.from_list(ROWS[:4]), "test": Dataset.from_list(ROWS[4:])}
    DatasetDict(halves).save_to_disk(tmp_path / "two")
    assert len(pairs(tmp_path / "one")) == 6
    assert len(pairs(tmp_path / "two")) == 4
    assert [answer for _, answer in pairs(tmp_path / "two", split="test")] == ["5", "6"]
    arrow = next((tmp_path / "one").glob("*.arrow"))
    assert len(pairs(arrow)) == 6


def test_a_folder_in_the_hubs_layout_has_splits_of_which_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in (0, 1):
        shard = tmp_path / "data" / f"train-0000{part}-of-00002.parquet"
        Dataset.from_list(ROWS[3 * part : 3 * part + 3]).to_parquet(shard)
    other = Dataset.from_list([{"question": "9?", "answer": 9.0, "subject": "x"}])
    other.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert len(pairs(tmp_path)) == 6
    assert pairs(tmp_path, split="test") == [("9?", "9")]
    assert "no split 'validation', it has: test, train" in refusal(tmp_path, split="validation")


def test_a_subset_of_a_folder_is_a_folder_in_it(tmp_path: Path) -> None:
    (tmp_path / "maths_en").mkdir()
    jsonl(tmp_path / "maths_en", {"question": "q", "final_answer": ["a"]}, name="maths_en.jsonl")
    assert pairs(tmp_path, subset="maths_en") == [("q", "a")]
    message = refusal(tmp_path, subset="maths_zh")
    assert "no subset 'maths_zh'; its folders: maths_en" in message


# --- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        # verl
        ({"data_source": "x", "prompt": [{"role": "user", "content": "q"}],
          "reward_model": {"ground_truth": ["7"], "style": "rule"}}, "7"),
        ({"prompt": [{"role": "user", "content": "q"}],
          "reward_model": {"ground_truth": "7"}}, "7"),
        # NuminaMath-CoT: the answer is the last box of the worked solution
        ({"source": "amc", "problem": "q", "solution": "\\boxed{3}, no: $\\boxed{\\frac{1}{2}}$.",
          "messages": [{"role": "user", "content": "other"}]}, "\\frac{1}{2}"),
        ({"problem": "q", "solution": "A proof, which boxes nothing."}, None),
        # MATH-500: the answer stands alone beside the solution
        ({"problem": "q", "solution": "\\boxed{8}", "answer": "9", "level": 2}, "9"),
        # OlympiadBench
        ({"question": "q", "final_answer": ["2"], "is_multiple_answer": False}, "2"),
        ({"question": "q", "final_answer": ["1", "2"]}, "1, 2"),
        # AMC 23, AIME
        ({"question": "q", "answer": 27.0}, "27"),
        ({"problem": "q", "answer": 0.5}, "0.5"),
        ({"problem": "q", "answer": 204}, "204"),
        # GSM8K, GPQA, chats
        ({"question": "q", "answer": "2 and 2 is 4\n#### 4"}, "4"),
        ({"Question": "q", "Correct Answer": "a quark"}, "a quark"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                       {"role": "assistant", "content": "So \\boxed{5}."}]}, "5"),
        ({"problem": " q \n"}, None),
    ],
)  # fmt: skip
def test_a_layout_is_recognised(tmp_path: Path, row: dict[str, Any], reference: str | None) -> None:
    assert pairs(jsonl(tmp_path, row)) == [("q", reference)]
    Dataset.from_list([row]).to_parquet(tmp_path / "q.parquet")
    assert pairs(tmp_path / "q.parquet") == [("q", reference)]


def test_a_named_column_comes_before_a_recognised_one_and_a_dot_enters_a_nested_one(
    tmp_path: Path,
) -> None:
    row = {"problem": "no", "extra": {"asked": "q", "deep": {"result": [3.0]}}, "a.b": "exact"}
    path = jsonl(tmp_path, row)
    assert pairs(path, question="extra.asked", answer="extra.deep.result") == [("q", "3")]
    assert pairs(path, question="a.b") == [("exact", None)]


def test_the_instruction_stands_once(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"problem": "1?"}, {"problem": "2? Answer in \\boxed{}."})
    first, second = read(path).prompts
    assert first.text == "1?" + INSTRUCTION
    assert second.text == "2? Answer in \\boxed{}."


def test_what_is_left_out_is_counted_and_told(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        {"problem": "a", "answer": "1"},
        {"problem": " a ", "answer": "1"},
        {"problem": "a", "answer": "2"},
        {"problem": None, "answer": "3"},
        {"problem": "  ", "answer": "3"},
        {"problem": "b", "answer": None},
    )
    questions = read(path)
    assert [(p.id, p.reference) for p in questions.prompts] == [(0, "1"), (1, None)]
    (note,) = questions.notes
    assert note == (
        f"{path}: 2 questions of 6 rows: repeated questions left out: 2; of them with another "
        "answer than the first, which counts: 1; rows without a question left out: 2; "
        "questions without a reference answer: 1"
    )
    assert read(jsonl(tmp_path, *ROWS, name="whole.jsonl")).notes == ()


def test_turns_before_the_question_are_told_of(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    assert (
        "rows with further turns (system or earlier), which are left out: 1"
        in read(jsonl(tmp_path, {"prompt": turns})).notes[0]
    )


def test_an_item_knows_the_row_that_it_is_from(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"problem": "a"}, {"problem": "a"}, {"problem": "b"})
    assert [item.row for item in read_items(source(path)).items] == [0, 2]


def test_twenty_thousand_chat_prompts_are_read_in_seconds(tmp_path: Path) -> None:
    rows = {
        "prompt": [[{"role": "user", "content": f"{i}? " + "x" * 200}] for i in range(20_000)],
        "reward_model": [{"ground_truth": [str(i)], "style": "rule"} for i in range(20_000)],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "q.parquet")
    started = time.process_time()
    assert len(read(tmp_path / "q.parquet").prompts) == 20_000
    assert time.process_time() - started < 4


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "  ", "???"])
def test_an_unset_path_is_named(path: str) -> None:
    assert "path of a data set is empty: give a hub id, a file or a folder" in refusal(path)


def test_a_missing_file_is_named_with_what_lies_near(tmp_path: Path) -> None:
    jsonl(tmp_path, *ROWS, name="train_20k.jsonl")
    message = refusal(tmp_path / "train_2k.jsonl")
    assert message.startswith(f"{tmp_path}/train_2k.jsonl: no such file or folder")
    assert f"in {tmp_path}: did you mean train_20k.jsonl?" in message
    assert "did you mean" not in refusal(tmp_path / "zzz.parquet")


def test_an_unknown_kind_of_file_is_named_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "q.xlsx").write_text("x")
    message = refusal(tmp_path / "q.xlsx")
    assert "q.xlsx: cannot read .xlsx files, only one of .parquet, .jsonl" in message


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    message = refusal(tmp_path / "cut.parquet")
    assert "cut.parquet cannot be read as parquet, it may be cut off or damaged" in message
    (tmp_path / "cut.jsonl").write_text('{"problem": "a"}\n{"probl')
    assert "cut.jsonl cannot be read as json" in refusal(tmp_path / "cut.jsonl")


def test_a_damaged_shard_of_a_folder_is_named(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    (tmp_path / "train-00001-of-00002.parquet").write_bytes(b"PAR1 and no more")
    message = refusal(tmp_path)
    assert "train-00001-of-00002.parquet cannot be read" in message


def test_an_empty_file_and_a_pointer_to_a_file_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b"")
    assert "q.jsonl is empty (0 bytes)" in refusal(tmp_path / "q.jsonl")
    (tmp_path / "q.parquet").write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
    assert "git-lfs pointer, not the data: run git lfs pull" in refusal(tmp_path / "q.parquet")


def test_a_hub_set_out_of_reach_asks_for_a_local_one() -> None:
    # names that cannot be one on the hub either: the answer is the same with a network
    message = refusal("powerflow-lit-nobody/no-such-data-set")
    assert message.startswith("powerflow-lit-nobody/no-such-data-set: neither a file or folder")
    assert message.endswith("give a local file or folder instead, or see to network access")


def test_a_missing_split_is_named_with_those_there(tmp_path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert "no split 'test', it has: train" in refusal(tmp_path / "saved", split="test")


def test_a_slice_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    message = refusal(jsonl(tmp_path, *ROWS), split="train[3-4]")
    assert message.startswith("split=train[3-4]: ")


def test_a_folder_of_several_data_sets_is_not_mixed(tmp_path: Path) -> None:
    for name in ("math500.jsonl", "olympiad.jsonl"):
        jsonl(tmp_path, *ROWS, name=name)
    message = refusal(tmp_path)
    assert "several data sets (math500.jsonl, olympiad.jsonl): give the path of one" in message
    (tmp_path / "aime").mkdir()
    for name in ("aime24_0726.jsonl", "aime25_0726.jsonl"):
        jsonl(tmp_path / "aime", *ROWS, name=name)
    assert "several data sets (aime24_0726.jsonl, aime25_0726.jsonl)" in refusal(tmp_path / "aime")


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("nothing")
    assert "holds no data files (.parquet" in refusal(tmp_path)


def test_a_missing_column_is_named_with_those_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"problem": "a", "meta": {"answer": "1"}})
    message = refusal(path, question="probelm")
    assert "no column 'probelm' but problem, meta, meta.answer: did you mean problem?" in message
    message = refusal(path, answer="solution")
    assert "no column 'solution' but" in message
    assert "set answer_column to one of them" in message


def test_columns_without_a_question_among_them_are_listed(tmp_path: Path) -> None:
    message = refusal(jsonl(tmp_path, {"text": "a", "label": 1}))
    assert "none of its columns (text, label)" in message
    assert message.endswith("set question_column")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": 3}, "row 0 of column 'problem' holds a number, not text or chat messages"),
        ({"problem": {"a": "b"}}, "'problem' holds a record, not text or chat messages"),
        ({"prompt": ["a", "b"]}, "'prompt' holds a list of text, not chat messages"),
        ({"prompt": [{"from": "human", "value": "a"}]}, "holds a list of a record, not chat"),
        ({"prompt": [{"role": "user", "content": 3}]}, "not chat messages with role and content"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "has no turn of a user"),
        ({"problem": "a", "answer": {"x": 1}}, "column 'answer' holds a record, not an answer"),
        ({"problem": "a", "answer": True}, "column 'answer' holds truth values"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_by_row_and_column(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    message = refusal(jsonl(tmp_path, row))
    assert words in message
    assert "_column" in message, "the remedy"


def test_a_set_without_any_question_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"problem": ""}, {"problem": " "})
    assert "none of its 2 rows has text in 'problem'" in refusal(path)
    Dataset.from_list(ROWS).select([]).to_parquet(tmp_path / "none.parquet")
    assert "none.parquet holds no rows" in refusal(tmp_path / "none.parquet")


def test_fields_of_a_source_are_checked() -> None:
    whole = dict.fromkeys(Source.__dataclass_fields__) | {"path": "a", "split": "train"}
    assert Source.of(whole, name="x") == source("a")
    with pytest.raises(TaskError, match=r"x: unknown key 'pth', it takes path, split"):
        Source.of(whole | {"pth": "b"}, name="x")
    with pytest.raises(TaskError, match=r"x\.subset is missing"):
        Source.of({k: v for k, v in whole.items() if k != "subset"}, name="x")


def test_rows_are_the_plain_data_set(tmp_path: Path) -> None:
    rows = load_rows(str(jsonl(tmp_path, *ROWS)), split="train", subset=None, revision=None)
    assert rows.column_names == ["problem", "answer"]
    assert rows[0] == ROWS[0]

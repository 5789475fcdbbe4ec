"""Runs on real prompts with chat models of real architectures, random weights and real vLLM.

The data are the public files beside the repository (`../shared/data`, or the folder that
POWERFLOW_DATA names). Where there are none, small files in the same formats take their place.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from hydra import compose, initialize_config_dir

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config, typed
from powerflow_lit.config.schema_tools import PrepareDataConfig
from powerflow_lit.data_preparation import prepare
from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.creative_writing import CreativeWriting
from powerflow_lit.tasks.sources import Source, read_questions
from powerflow_lit.training import run
from tests.commands import command, environment
from tests.tiny_models import Kind, make_tiny_model

DATA = Path(os.environ.get("POWERFLOW_DATA") or Path(__file__).parents[3] / "shared" / "data")
WHY = f"no public data files in {DATA}: set POWERFLOW_DATA to their folder"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=WHY)
INSTRUCTION = " Let's think step by step and output the final answer within \\boxed{}."
SMALL = (
    "debug=fast", "model.threads=1", "model.engine_dtype=float32", "rollout.max_new_tokens=32",
    "logger=none",    "rollout.prompts_per_refill=4", "run_dir=run",
)  # fmt: skip


def verl_file(path: Path, count: int) -> Path:
    """Questions in the format of the public files; one comes twice, one is very long."""
    questions = [f"What is {i} + {i}?" for i in range(count)]
    questions += [questions[0], "What is " + "1 + " * 400 + "1?"]
    rows = [
        {
            "data_source": "numina_math",
            "prompt": [{"content": question + INSTRUCTION, "role": "user"}],
            "ability": "math",
            "reward_model": {"ground_truth": [str(2 * i)], "style": "rule"},
            "extra_info": {"index": i, "name": "numina_math", "split": "train"},
        }
        for i, question in enumerate(questions)
    ]
    Dataset.from_list(rows).to_parquet(path)
    return path


def math_files(folder: Path) -> tuple[Path, Path]:
    """(train, eval): the public ones, or small ones of our own."""
    if DATA.is_dir():
        return DATA / "math" / "NM_20K_1010.parquet", DATA / "math" / "math500.parquet"
    return verl_file(folder / "train.parquet", 40), verl_file(folder / "eval.parquet", 8)


def creative_files(folder: Path) -> dict[str, Path]:
    """One prompt a line: the public ones, or small ones of our own."""
    if DATA.is_dir():
        lists = {"poem": "poem", "story": "book", "joke": "joke"}
        return {genre: DATA / "creative" / f"{name}.txt" for genre, name in lists.items()}
    for genre in ("poem", "story", "joke"):
        lines = [f"Please write a {genre} about the number {i}" for i in range(10)]
        (folder / f"{genre}.txt").write_text("\n".join(lines))
    return {genre: folder / f"{genre}.txt" for genre in ("poem", "story", "joke")}


def trained(folder: Path, kind: Kind, *overrides: str) -> tuple[str, dict[str, Any]]:
    """What a run as typed printed, and its summary."""
    model = make_tiny_model(folder / kind, kind)
    chosen = ("model=hf", f"model.path={model}", "model.kind=instruct", *overrides, *SMALL)
    done = command("powerflow_lit.train", chosen, folder=folder, env=environment(Path.home()))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 4
    return done.stdout, summary


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "run" / "samples.jsonl").read_text().splitlines()]


def test_a_qwen2_chat_model_trains_on_questions_in_verls_format(tmp_path: Path) -> None:
    train, evaluation = math_files(tmp_path)
    printed, summary = trained(
        tmp_path, "qwen2", "task=reasoning", f"task.build.train.path={train}",
        f"task.build.eval.path={evaluation}", "task.build.eval_size=8",
    )  # fmt: skip
    assert summary["alpha"] == 2, "the default of an instruct model"
    assert f"{train}: " in printed
    assert "repeated questions left out: " in printed
    assert "training prompts are over 1024 tokens: dropped" in printed
    source = Source(str(train), "train", None, None, None, None)
    known = {p.text for p in read_questions(source, instruction=INSTRUCTION).prompts}
    rows = samples(tmp_path)
    assert {row["prompt"] for row in rows} <= known
    assert all(row["prompt"].count("output the final answer within") == 1 for row in rows)
    assert {row["format_penalty"] for row in rows} <= {0.0, -0.5}
    assert max(float(r["selfcheck/engine_logp_gap"] or 0) for r in metrics(tmp_path)) < 1e-4
    assert summary["final"]["val/pass@1"] == 0, "random weights"


@pytest.mark.slow
def test_a_llama_chat_model_trains_on_creative_prompts(tmp_path: Path) -> None:
    files = creative_files(tmp_path)
    _, summary = trained(
        tmp_path, "llama", "task=creative_writing", "task.max_prompt_tokens=512",
        "task.build.train_share=0.9",  # few to evaluate: that is where the time goes
        *(f"task.build.prompts.{genre}={path}" for genre, path in files.items()),
    )  # fmt: skip
    assert summary["alpha"] == 0.5
    known = {line.strip() for path in files.values() for line in path.read_text().splitlines()}
    rows = samples(tmp_path)
    assert {row["prompt"] for row in rows} <= known
    assert {row["format_penalty"] for row in rows} == {0.0}
    assert {row["correct"] for row in rows} == {None}
    assert max(float(r["selfcheck/engine_logp_gap"] or 0) for r in metrics(tmp_path)) < 1e-4
    final = summary["final"]
    for genre in ("poem", "story", "joke"):
        assert 0 < final[f"val/diversity_semantic/{genre}"] <= 1
    assert "val/pass@1" not in final


def test_data_that_cannot_be_used_is_refused_before_a_model_loads(tmp_path: Path) -> None:
    overrides = ["task=reasoning", "model=hf", f"model.path={tmp_path}/no-model", "logger=none",
                 f"task.build.train.path={tmp_path}/no-data.parquet"]  # fmt: skip
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = train_config(compose("train", overrides=overrides))
    with pytest.raises(TaskError, match=r"task\.build\.train: .*no-data\.parquet: no such file"):
        run(config, tmp_path / "run", [])


@real_data
def test_the_public_training_file_rebuilds_to_the_papers_18000(tmp_path: Path) -> None:
    source = DATA / "math" / "NM_20K_1010.parquet"
    chosen = [f"source.path={source}", f"output={tmp_path / 'set.parquet'}"]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        manifest = prepare(typed(compose("prepare_data", overrides=chosen), PrepareDataConfig))
    assert manifest["rows_in_source"] == 20_000
    assert manifest["questions"] == 18_000
    dropped = {name: count for name, count in manifest["dropped"].items() if count}
    assert dropped == {"repeated": 120, "answer in the question": 619, "not drawn": 1261}
    # as docs/data.md gives it
    assert manifest["sha256"] in (Path(__file__).parents[2] / "docs" / "data.md").read_text()


@real_data
def test_the_public_benchmark_files_are_read_whole() -> None:
    sizes = {"math500": 500, "olympiadbench": 675, "aime24_0726": 30, "amc23_1010": 40,
             "minerva_math": 272}  # fmt: skip
    for name, size in sizes.items():
        source = Source(str(DATA / "math" / f"{name}.parquet"), "test", None, None, None, None)
        found = read_questions(source, instruction=INSTRUCTION)
        assert len(found.prompts) == size
        assert found.notes == ()
        assert all(prompt.reference for prompt in found.prompts)


@real_data
def test_the_public_creative_prompts_split_as_the_papers_do(tmp_path: Path) -> None:
    build = yaml.safe_load((Path(conf_dir()) / "task/creative_writing.yaml").read_text())["build"]
    del build["_target_"]
    build["prompts"] = {genre: str(path) for genre, path in creative_files(tmp_path).items()}
    task = CreativeWriting(**build)
    assert (len(task.train_prompts()), len(task.eval_prompts())) == (269, 179)
    assert not any("following line: Please" in p.text for p in task.train_prompts())

"""`powerflow_lit.evaluate` on several benchmarks under several samplers, as typed."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from powerflow_lit.benchmarking import run
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, evaluate_config, typed
from powerflow_lit.config.schema import EvaluateConfig
from powerflow_lit.metrics import at_k
from powerflow_lit.models.loading import ModelError
from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.boxed import BoxedAnswers
from powerflow_lit.types import Prompt
from tests import commands

ROOT = Path(__file__).parents[2]
LONG = "Compute 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 1 + 2."


class Sums(BoxedAnswers):
    """Questions and answers from a jsonl file, within the words of the embedded model."""

    name = headline = "sums"

    def __init__(self, *, path: str) -> None:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        self._prompts = [Prompt(i, r["question"], r["answer"]) for i, r in enumerate(rows)]

    def train_prompts(self) -> Sequence[Prompt]:
        return self._prompts

    def eval_prompts(self) -> Sequence[Prompt]:
        return self._prompts


def benchmark_files(folder: Path) -> Path:
    """Files named as the paper's benchmarks."""
    folder.mkdir(exist_ok=True)
    ask = "Compute {} + {}. Put the final answer in \\boxed{{}}."
    for name, sums in (("math500", [(1, 2), (3, 4), (5, 6)]), ("aime24_0726", [(2, 2), (9, 9)])):
        rows = [{"question": ask.format(a, b), "answer": str(a + b)} for a, b in sums]
        rows += [{"question": LONG, "answer": "85"}] if name == "math500" else []
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    node = "{_target_: tests.integration.test_evaluate.Sums, path: none}"
    return [
        *(f"+benchmarks.{name}={node}" for name in ("math500", "aime24")),
        f"benchmark_dir={benchmark_files(folder / 'files')}",
        "samples_per_prompt=4",
        "rollout.max_new_tokens=24",
        "rollout.max_prompt_tokens=30",
        *more,
    ]  # fmt: skip


SAMPLERS = (
    "sampler=[power_sampling,vs_standard,high_temperature]",
    "samplers.power_sampling.blocks=3",
    "samplers.power_sampling.steps_per_block=2",
    "samplers.vs_standard.k=3",
    'samplers.vs_standard.instruction="Compute {k} + 1."',
)
CALIBRATE = (
    "model.paper_name=Qwen2.5-Math-1.5B",
    "calibrate={table: reasoning, method: PowerFlow, sampler: 'T=1', tolerance: 0.5, "
    "standard_errors: 2.0}",
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "powerflow_lit.evaluate", *arguments]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def config(folder: Path, *more: str) -> EvaluateConfig:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        composed = compose("evaluate", overrides(folder, "rollout=hf", *more))
    return evaluate_config(composed)


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return found


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole evaluation with vLLM, of a model that is not the one it is calibrated against."""
    folder = tmp_path_factory.mktemp("evaluated")
    arguments = overrides(folder, *SAMPLERS, *CALIBRATE, "samples_per_prompt=16", "output=out")
    done = commands.command(
        "powerflow_lit.evaluate", arguments, folder=folder, env=dict(os.environ)
    )
    assert done.returncode == 3, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "out", done.stdout


def test_every_benchmark_is_evaluated_under_every_sampler(evaluated: tuple[Path, str]) -> None:
    record = record_of(evaluated[0])
    samplers = ["T=1", "T=0.25", "greedy", "power_sampling", "vs_standard", "high_temperature"]
    assert record["status"] == "finished"
    assert record["alpha"] == 4
    for name, prompts in (("math500", 3), ("aime24", 2)):
        results = record["benchmarks"][name]
        assert list(results) == samplers
        assert all(r["prompts"] == prompts for r in results.values())
        assert results["greedy"]["samples_per_prompt"] == 1
        metrics = results["T=1"]["metrics"]
        assert {f"val/pass@{k}" for k in (1, 2, 4, 8, 16)} <= set(metrics)
        assert "val/maj@16" in metrics
        low, high = results["T=1"]["intervals"]["val/avg@16"]
        assert low <= metrics["val/avg@16"] <= high
        assert results["power_sampling"]["tokens"] > results["T=0.25"]["tokens"]
        assert 0 < results["power_sampling"]["metrics"]["val/mh_acceptance"] <= 1
    both = [r["T=1"]["metrics"]["val/avg@16"] for r in record["benchmarks"].values()]
    assert record["averages"]["T=1"]["metrics"]["val/avg@16"] == pytest.approx(sum(both) / 2)
    assert any("1 of 4 prompts are over 30 tokens: dropped" in note for note in record["notes"])


def test_each_response_stands_in_the_files_with_its_figures(evaluated: tuple[Path, str]) -> None:
    folder = evaluated[0]
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    with (folder / "problems.csv").open(newline="") as file:
        problems = list(csv.DictReader(file))
    assert len(problems) == 6 * 5
    own = [r for r in rows if (r["benchmark"], r["sampler"]) == ("math500", "T=1")]
    places = [(r["prompt_id"], r["sample"]) for r in own]
    assert places == [(p, s) for p in range(3) for s in range(16)]
    for problem in problems[:3]:
        mine = [r for r in own if str(r["prompt_id"]) == problem["prompt_id"]]
        flags = [r["correct"] for r in mine]
        assert float(problem["avg@16"]) == pytest.approx(sum(flags) / 16)
        assert float(problem["pass@2"]) == pytest.approx(at_k.pass_at_k([flags], 2))
        assert float(problem["length_mean"]) == pytest.approx(sum(r["length"] for r in mine) / 16)
        assert all(r["formatted"] == (r["answer"] is not None) for r in mine)
        assert all(r["length"] == 24 for r in mine if r["truncated"])


def test_a_model_that_writes_no_json_fails_verbalized_sampling_with_a_note(
    evaluated: tuple[Path, str],
) -> None:
    folder, printed = evaluated
    record = record_of(folder)
    result = record["benchmarks"]["math500"]["vs_standard"]
    assert result["metrics"]["val/vs_parse_failures"] == 1
    assert result["metrics"]["val/avg@16"] == 0, "a missing response is a wrong one"
    assert "val/length_mean" not in result["metrics"], "and none that has a length"
    (note,) = [n for n in record["notes"] if n.startswith("math500, vs_standard")]
    assert "18 of 18 calls could not be read" in note
    assert "48 of 48 responses are missing" in printed


def test_the_table_sets_the_published_figures_beside_ours_and_calibration_fails_honestly(
    evaluated: tuple[Path, str],
) -> None:
    folder, printed = evaluated
    for word in ("paper:", "PowerFlow", "EMPO", "70.9", "10.8"):
        assert word in printed
    assert "diversity_semantic by hashing" in printed
    found = record_of(folder)["calibration"]
    checks = {c["benchmark"]: c for c in found["checks"]}
    assert found["verdict"] == "outside"
    ours = record_of(folder)["benchmarks"]["math500"]["T=1"]["metrics"]["val/avg@16"]
    assert checks["math500"]["ours"] == pytest.approx(100 * ours)
    assert checks["math500"]["published"] == 70.9
    assert checks["math500"]["verdict"] == "outside"
    # neither other benchmarks nor an average over other ones were measured
    assert {b for b, c in checks.items() if c["verdict"] == "not measured"} == {
        "olympiadbench", "aime25", "amc23", "gpqa_diamond", "average",
    }  # fmt: skip
    assert "calibration: T=1 against the paper's PowerFlow row" in printed


def test_a_killed_evaluation_goes_on_and_ends_like_a_whole_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only_t1 = "decodings=[{temperature: 1.0, min_p: 0.0}]"
    plan = ("rollout=hf", only_t1, "sampler=[high_temperature]")
    arguments = overrides(tmp_path, *plan, f"output={tmp_path / 'killed'}")
    process = subprocess.Popen(
        command(*arguments), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("math500         T=1"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    before = record_of(tmp_path / "killed")
    assert before["status"] == "unfinished"
    # as if it had been killed while the next pair was being written
    with (tmp_path / "killed" / "responses.jsonl").open("a") as file:
        file.write(
            json.dumps({"benchmark": "math500", "sampler": "T=7", "prompt_id": 0}) + '\n{"be'
        )
    run(config(tmp_path, *plan[1:], f"output={tmp_path / 'killed'}"))
    assert "T=1               avg@4" in (printed := capsys.readouterr().out)
    assert "evaluated before" in printed
    run(config(tmp_path, *plan[1:], f"output={tmp_path / 'whole'}"))
    killed, whole = record_of(tmp_path / "killed"), record_of(tmp_path / "whole")
    for record in (killed, whole):
        for results in record["benchmarks"].values():
            for result in results.values():
                del result["seconds"]
    assert killed == whole
    for name in ("responses.jsonl", "problems.csv"):
        texts = [(tmp_path / f / name).read_text() for f in ("killed", "whole")]
        assert texts[0] == texts[1]
    run(config(tmp_path, *plan[1:], f"output={tmp_path / 'whole'}"))
    assert "was evaluated before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"holds an evaluation with seed=1234, now 5"):
        run(config(tmp_path, *plan[1:], "seed=5", f"output={tmp_path / 'whole'}"))


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (("decodings=[]",), ConfigError, "name at least one way of sampling"),
        (("alpha=0.0", "decodings=[{temperature: 1.0, min_p: 0.0}]"), ConfigError, "alpha=0"),
        (("bootstrap.level=95",), ConfigError, r"bootstrap.level=95.0: must lie in \(0, 1\)"),
        (("samples_per_prompt=0",), ConfigError, "samples_per_prompt=0: must be 1 or more"),
        (("decodings=[{temperature: -1, min_p: 0.0}]",), ConfigError, "temperature=-1.0: must"),
        (("decodings=[{temperature: 1, min_p: 0.0, top_p: 0}]",), ConfigError, "top_p=0.0: must"),
        (("model.estimate_only=true",), ConfigError, "for training only"),
        (("rollout.max_prompt_tokens=2",), TaskError, "none of 4 prompts is within 2 tokens"),
        (("rollout.max_new_tokens=5000",), ModelError, "lower rollout.max_new_tokens"),
        (("benchmark_dir=nowhere",), TaskError, "benchmark_dir=nowhere: no such folder"),
        (("+benchmarks.gpqa={_target_: x, path: y}",), TaskError,
         r"no file there begins with 'gpqa' \(aime24_0726.jsonl, math500.jsonl\)"),
        (("model.paper_name=X", CALIBRATE[1]), ConfigError, "nothing published of it"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    tmp_path: Path, more: tuple[str, ...], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        run(config(tmp_path, *more, f"output={tmp_path / 'out'}"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "eval.json").exists()


def test_by_default_the_temperature_beside_one_is_the_inverse_of_the_power() -> None:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for more, temperature in (((), 0.25), (("alpha=2",), 0.5), (("task=creative",), 2.0)):
            found = typed(compose("evaluate", list(more)), EvaluateConfig)
            assert [d.temperature for d in found.decodings] == [1.0, temperature, 0.0]
            assert all(d.top_p == 1 and d.min_p == 0 for d in found.decodings)
            assert math.isclose(1 / found.alpha, temperature)

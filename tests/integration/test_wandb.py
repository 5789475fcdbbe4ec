"""What runs leave in W&B, against what the dashboard looks for there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wandb

from powerflow_lit.assembly import build_wandb, wandb_tags
from powerflow_lit.config.checks import train_config, typed
from powerflow_lit.config.schema_tools import DashboardConfig
from powerflow_lit.dashboard import specification
from tests.integration.test_commands import train
from tests.unit.test_config import composed
from tests.wandb_records import OfflineRun, read_offline_run

CONFIG = typed(composed(config_name="dashboard"), DashboardConfig)
NARROWED = typed(
    composed("runs.task=arithmetic", "runs.model=tiny", "runs.group=both", config_name="dashboard"),
    DashboardConfig,
)
METRICS = sorted(
    {
        metric
        for panels in [*CONFIG.sections.values(), CONFIG.report.panels]
        for metrics in panels.values()
        for metric in metrics
        # of runs with a reward (test_rewards.py), a target for alpha or a chosen length
        if not metric.startswith(("rollout/reward_", "train/alpha_gap", "train/length_price"))
    }
)


# in the environment of the sweep; two of them are also typed
SECRETS = {
    "HF_TOKEN": "hf_marker0123456789",
    "OPENAI_API_KEY": "sk-marker-0123456789",
    "AWS_SECRET_ACCESS_KEY": "marker/0123+456789",
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep over both embedded tasks, evaluated with the k that the panels name; its output."""
    folder = tmp_path_factory.mktemp("sweep")
    k = f"callbacks.evaluation.samples_per_prompt={CONFIG.k}"
    tags = "logger.tags=[mine,'${oc.env:HF_TOKEN}'," + SECRETS["OPENAI_API_KEY"] + "]"
    chosen = ("study=both", tags, "logger.mode=offline", k, "callbacks.evaluation.max_prompts=16")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        done = train(folder, "-m", "task=arithmetic,creative", "debug=fast", "rollout=hf", *chosen)
    return folder, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(sweep: tuple[Path, str]) -> dict[str, OfflineRun]:
    """What the jobs of the sweep left in W&B, by task."""
    folder, _ = sweep
    written = sorted(folder.glob("multirun/both/*/wandb/offline-run-*"))
    assert len(written) == 2, written
    read = [read_offline_run(path, folder) for path in written]
    return {run.config["task"]["name"]: run for run in read}


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_of_the_dashboard_is_logged_with_its_x_axis(
    runs: dict[str, OfflineRun], metric: str
) -> None:
    rows = [row for run in runs.values() for row in run.history if metric in row]
    assert rows, f"no run logs {metric}"
    assert all(CONFIG.x_axis in row for row in rows)
    assert all(isinstance(row[metric], int | float) for row in rows)


def keys_of(spec: Any) -> list[tuple[str, Any]]:
    """(name, value) of all config keys by which a specification groups or filters."""
    if isinstance(spec, list):
        return [key for item in spec for key in keys_of(item)]
    if not isinstance(spec, dict):
        return []
    if spec.get("section") == "config":
        return [(spec["name"], None)]
    if isinstance(spec.get("key"), dict) and spec["key"].get("section") == "config":
        return [(spec["key"]["name"], spec.get("value"))]
    return [key for value in spec.values() for key in keys_of(value)]


@pytest.mark.parametrize("part", ["workspace", "report"])
def test_grouping_and_filter_keys_are_where_wandb_keeps_them(
    runs: dict[str, OfflineRun], part: str
) -> None:
    keys = keys_of(specification(NARROWED)[part])
    grouped = {"strategy.value.name", "alpha.value"}
    assert {name for name, _ in keys} == grouped | {"task.value.name", "model.value.name"}
    for name, wanted in keys:
        # W&B stores a config as {top-level key: {"value": the rest}}
        first, value, *rest = name.split(".")
        assert value == "value"
        node = runs["arithmetic"].config[first]
        for segment in rest:
            node = node[segment]
        if wanted is not None and first != "strategy":
            assert wanted == [node]


def test_the_jobs_of_a_sweep_are_finished_runs_of_their_own_in_one_group(
    runs: dict[str, OfflineRun],
) -> None:
    assert runs.keys() == {"arithmetic", "creative"}
    assert len({run.run["run_id"] for run in runs.values()}) == 2
    assert {run.run["run_group"] for run in runs.values()} == {"both"}
    assert [run.exits for run in runs.values()] == [[0], [0]]
    for run in runs.values():
        steps = [row["trainer/global_step"] for row in run.history]
        assert steps == sorted(steps)
        assert steps[0] == 0, "no row of the job before"


def test_a_run_can_be_filtered_by_its_tags(runs: dict[str, OfflineRun]) -> None:
    tags = {task: set(run.run["tags"]) for task, run in runs.items()}
    mine = {"mine", "${oc.env:HF_TOKEN}", "${oc.env:OPENAI_API_KEY}"}
    assert tags == {
        "arithmetic": {"powerflow", "arithmetic", "tiny", "alpha=4", *mine},
        "creative": {"powerflow", "creative", "tiny_instruct", "alpha=0.5", *mine},
    }


def test_no_file_nor_line_of_a_sweep_holds_a_key_of_the_environment(
    sweep: tuple[Path, str],
) -> None:
    folder, printed = sweep
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"sweep.json", "config.yaml", "output.log", "last.ckpt"} <= {p.name for p in files}
    assert "${oc.env:OPENAI_API_KEY}" in (folder / "multirun/both/sweep.json").read_text()
    for name, value in SECRETS.items():
        assert value not in printed
        # checkpoints are zip files that store their members as they are
        assert [path for path in files if value.encode() in path.read_bytes()] == [], name


def test_a_run_left_open_by_the_job_before_is_closed_and_not_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = train_config(composed("logger.mode=offline"))
    build_wandb(config, tmp_path / "first").experiment.log({"train/loss": 1.0, "refill": 1})
    assert wandb.run is not None
    build_wandb(config, tmp_path / "second").experiment.finish()
    jobs = {}
    for name in ("first", "second"):
        (folder,) = (tmp_path / name / "wandb").glob("offline-run-*")
        jobs[name] = read_offline_run(folder, tmp_path)
    assert [job.exits for job in jobs.values()] == [[1], [0]]
    assert [len(job.history) for job in jobs.values()] == [1, 0]


def test_a_tag_is_no_longer_than_wandb_takes() -> None:
    config = train_config(composed(f"logger.tags=[{'t' * 80},powerflow]"))
    tags = wandb_tags(config)
    assert tags == ["powerflow", "arithmetic", "tiny", "alpha=4", "t" * 64]

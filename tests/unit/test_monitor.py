"""The rules of a monitor, one refill after the other, without a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config
from powerflow_lit.monitor import Monitor, MonitorError, Recorder, Rule, Watch, next_pull
from tests.unit.test_module import module


def rule(**changes: Any) -> Rule:
    settings: dict[str, Any] = {
        "name": "length", "metric": "rollout/length_mean", "action": "warn", "patience": 1,
        "above": None, "below": 0.5, "relative": None, "hint": "Try less.",
    }  # fmt: skip
    return Rule(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "first", "kept", "broken"),
    [
        ({"below": 5.0}, 20.0, [5.0, 30.0], [4.9, float("nan")]),
        ({"above": 5.0, "below": None}, 20.0, [5.0, -3.0], [5.1, float("inf"), float("nan")]),
        ({"above": 5.0, "below": 1.0}, 20.0, [1.0, 3.0, 5.0], [0.9, 5.1]),
        ({"relative": "factor"}, 20.0, [10.0, 50.0], [9.9]),
        ({"relative": "factor", "above": 2.0, "below": None}, 20.0, [40.0], [40.1]),
        ({"relative": "difference", "above": 0.15, "below": None}, 0.1, [0.0, 0.24], [0.26]),
        ({"relative": "difference", "above": 0.15, "below": None}, 0.0, [0.0, 0.14], [0.16]),
        ({"relative": "difference", "below": -0.2}, 0.9, [0.71], [0.69]),
    ],
)
def test_a_bound_is_absolute_a_factor_or_a_difference(
    changes: dict[str, Any], first: float, kept: list[float], broken: list[float]
) -> None:
    assert all(rule(**changes).broken_bound(value, first) is None for value in kept)
    assert all(rule(**changes).broken_bound(value, first) for value in broken)


def test_patience_counts_refills_in_a_row() -> None:
    watch = Watch(rule(relative="factor", patience=2))
    values = [20.0, 9.0, 11.0, 9.0, 8.0, 7.0, 12.0, 9.0]
    assert [watch.judge(v) for v in values] == [
        False, False, False, False, True, True, False, False,
    ]  # fmt: skip


def test_a_finding_names_rule_value_bound_and_remedy() -> None:
    watch = Watch(rule(relative="factor"))
    watch.judge(20.0)
    assert watch.judge(8.0)
    assert watch.finding == (
        "monitor rule length: rollout/length_mean is 8, below 10 (0.5 x the first refill's 20), "
        "for 1 refill. Try less."
    )


def test_pull_shrinks_while_broken_and_recovers_to_one() -> None:
    pull, course = 1.0, []
    for broken in (False, True, True, False, False, False):
        pull = next_pull(pull, broken, factor=0.5, recovery=0.3)
        course.append(pull)
    assert course == pytest.approx([1.0, 0.5, 0.25, 0.55, 0.85, 1.0])


def test_a_recorder_averages_over_the_refill_and_knows_all_that_was_logged() -> None:
    recorder = Recorder()
    recorder.log_metrics({"train/loss": 1.0, "rollout/x": 3.0}, step=1)
    recorder.log_metrics({"train/loss": 2.0}, step=2)
    assert recorder.take() == {"train/loss": 1.5, "rollout/x": 3.0}
    assert recorder.take() == {}
    assert recorder.seen == {"train/loss", "rollout/x"}


def test_alpha_is_pulled_towards_one_and_not_touched_without_a_pull() -> None:
    for alpha in (4.0, 0.1):
        pulled = module(alpha=alpha)
        assert pulled.alpha == alpha  # 1 + (0.1 - 1) is not 0.1 in floating point
        pulled.alpha_pull = 0.5
        assert pulled.alpha == pytest.approx(1 + (alpha - 1) / 2)
        checkpoint: dict[str, Any] = {}
        pulled.on_save_checkpoint(checkpoint)
        resumed = module(alpha=alpha)
        resumed.on_load_checkpoint(checkpoint)
        assert resumed.alpha == pulled.alpha
        del checkpoint["powerflow"]["alpha_pull"]  # a checkpoint from before there were monitors
        resumed.on_load_checkpoint(checkpoint)
        assert resumed.alpha == alpha


# --- the callback, with a stand-in for the trainer ----------------------------------------------


class Run:
    """As much of a trainer as a monitor looks at, and the checkpoint that follows it."""

    is_global_zero = True

    def __init__(self, folder: Path, *rules: Rule) -> None:
        self.loggers: list[Any] = []
        self.should_stop = False
        self.current_epoch = -1
        self.global_step = 0
        self.printed: list[str] = []
        self.module: Any = module()
        self.module.print = self.printed.append
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder / "last.ckpt"
        self.monitor = Monitor(
            list(rules), pull_factor=0.5, pull_recovery=0.25, checkpoint=self.checkpoint
        )
        trainer: Any = self
        self.monitor.on_fit_start(trainer, self.module)
        self.monitor.on_train_start(trainer, self.module)

    def refill(self, within: str | None = None, **metrics: float) -> None:
        """One refill's metrics, by name without the slash's left side."""
        trainer: Any = self
        self.current_epoch += 1
        self.monitor.on_train_epoch_start(trainer, self.module)
        if within is not None:  # a checkpoint between two updates, or of a run stopped there
            self.save(within)
        for logger in self.loggers:
            logger.log_metrics({f"rollout/{name}": value for name, value in metrics.items()})
        self.monitor.on_train_epoch_end(trainer, self.module)
        if not self.should_stop:  # as the checkpoint callback does, aside and renamed
            self.save(f"after refill {self.current_epoch + 1}")

    def save(self, content: str) -> None:
        aside = self.checkpoint.with_suffix(".aside")
        aside.write_text(content)
        os.replace(aside, self.checkpoint)


def test_a_warning_is_printed_once_for_each_streak(tmp_path: Path) -> None:
    run = Run(tmp_path, rule(below=5.0, patience=2))
    for length in (9, 4, 4, 4, 4, 9, 4, 4, 4):
        run.refill(length_mean=length)
    assert len(run.printed) == 2
    assert all(x.startswith("warning: monitor rule length") for x in run.printed)
    assert not run.should_stop
    assert run.module.alpha_pull == 1
    assert [w.refill for w in run.monitor.warnings] == [3, 8]
    resumed = Run(tmp_path, rule(below=5.0, patience=2))
    resumed.monitor.load_state_dict(run.monitor.state_dict())
    assert resumed.monitor.warnings == run.monitor.warnings


# each rule of monitor=default: its metric, a value that keeps it and one that breaks it
ILL = {
    "repetition": ("repetition", 0.1, 0.3),
    "length": ("length_mean", 20.0, 9.9),
    "length_floor": ("length_mean", 2.0, 1.9),
    "truncation": ("truncated_frac", 0.2, 0.21),
    "format": ("format_rate", 0.05, 0.04),
}
WELL = {"repetition": 0.1, "length_mean": 20.0, "truncated_frac": 0.0, "format_rate": 1.0}


def rules_of(choice: str) -> list[Rule]:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = train_config(compose("train", [f"monitor={choice}", "run_dir=unused"]))
    return [Rule(name=name, **vars(rule)) for name, rule in config.monitor.rules.items()]


def test_every_rule_of_the_default_warns_and_of_stop_ends_the_run(tmp_path: Path) -> None:
    warn, stop = rules_of("default"), rules_of("stop")
    assert {r.name for r in warn} == {r.name for r in stop} == ILL.keys()
    for name, (metric, kept, broken) in ILL.items():
        healthy = {**WELL, metric: kept}
        for rules in (warn, stop):
            run = Run(tmp_path / name / rules[0].action, *rules)
            for _ in range(4):
                run.refill(**healthy)
            assert run.printed == [], f"{metric}={kept} keeps every rule"
            for _ in range(3):  # the patience of each
                assert not run.should_stop
                run.refill(**{**healthy, metric: broken})
            (said,) = run.printed
            assert f"monitor rule {name}: rollout/{metric} is {broken:g}, " in said
            assert run.should_stop == (rules is stop)
            assert (run.monitor.stopped_by is not None) == (rules is stop)
            texts = [(w.refill, w.text) for w in run.monitor.warnings]
            expected = [] if rules is stop else [(7, said.removeprefix("warning: "))]
            assert texts == expected


def test_a_stop_leaves_the_newest_checkpoint_whose_rollouts_kept_the_rules(tmp_path: Path) -> None:
    """Refill 4 shows the policy after refill 3 to be ill; the one after refill 2 was seen well."""
    run = Run(tmp_path, rule(below=5.0, patience=2, action="stop"))
    for length in (9, 9, 9, 4, 4):
        assert not run.should_stop
        run.refill(length_mean=length)
    assert run.should_stop
    assert run.monitor.stopped_by is not None
    assert "rollout/length_mean is 4, below 5, for 2 refills in a row" in run.monitor.stopped_by
    assert run.printed == [f"stopped at refill 5: {run.monitor.stopped_by}"]
    assert run.checkpoint.read_text() == "after refill 2"
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt"}


def test_a_policy_whose_rollouts_nobody_has_seen_is_never_the_good_one(tmp_path: Path) -> None:
    """A checkpoint within refill 2 holds updates on rollouts of the policy after refill 1."""
    run = Run(tmp_path, rule(below=5.0, patience=1, action="stop"))
    run.refill(length_mean=9)
    run.refill(within="within refill 2", length_mean=9)
    assert (tmp_path / "good.ckpt").read_text() == "after refill 1"
    run.refill(within="within refill 3", length_mean=1)
    assert run.should_stop
    assert run.checkpoint.read_text() == "after refill 1"


def test_without_a_stop_rule_no_second_checkpoint_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, rule(below=5.0))
    for _ in range(3):
        run.refill(length_mean=9.0)
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt"}


def test_pull_follows_its_rules_and_waits_for_a_metric_that_is_rarely_logged(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, rule(below=5.0, action="pull"))
    course = []
    for metrics in ({"length_mean": 9.0}, {"length_mean": 4.0}, {"other": 1.0},
                    {"length_mean": 4.0}, {"length_mean": 9.0}):  # fmt: skip
        run.refill(**metrics)
        course.append(run.module.alpha_pull)
    assert course == [1.0, 0.5, 0.5, 0.25, 0.5]
    assert len(run.printed) == 1
    assert run.printed[0].endswith("alpha is pulled towards 1")


def test_a_metric_that_the_run_never_logs_is_refused_with_its_neighbours(tmp_path: Path) -> None:
    run = Run(tmp_path, rule(name="x", metric="rollout/lenght"))
    with pytest.raises(MonitorError, match=r"rules\.x\.metric=rollout/lenght.*rollout/length_mean"):
        run.refill(length_mean=9.0, repetition=0.1)


def test_references_and_streaks_survive_a_checkpoint(tmp_path: Path) -> None:
    relative = rule(relative="factor", patience=2, action="stop")
    first = Run(tmp_path, relative)
    for length in (20.0, 9.0):
        first.refill(length_mean=length)
    resumed = Run(tmp_path, relative)
    resumed.monitor.load_state_dict(first.monitor.state_dict())
    resumed.refill(length_mean=9.0)
    assert resumed.should_stop, "the second in a row, below half of 20"
    other = Run(tmp_path, rule(metric="rollout/other", relative="factor", patience=2))
    other.monitor.load_state_dict(first.monitor.state_dict())
    assert other.monitor.watches[0].first is None, "another metric has another reference"

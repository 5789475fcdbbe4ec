"""Which runs the report compares and what it calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError
from powerflow_lit.reporting.figures import styles
from powerflow_lit.reporting.grouping import (
    COLOURS,
    Group,
    group,
    keys_of,
    label_of,
    panels_of,
    select,
    varying_keys,
)
from powerflow_lit.reporting.runs import Run, collect
from tests.run_folders import make_run

ALIASES = yaml.safe_load((Path(conf_dir()) / "report.yaml").read_text())["aliases"]


def runs_of(folder: Path, *changes: dict[str, Any]) -> list[Run]:
    for i, changed in enumerate(changes):
        make_run(folder / f"{i:02}", **changed)
    return collect([str(folder)]).runs


def labels(runs: list[Run]) -> dict[str, int]:
    keys = varying_keys(runs, ALIASES)
    return {g.label: len(g.runs) for g in group(runs, keys, ALIASES)}


def test_runs_that_differ_in_seed_folder_and_logging_are_one_group(tmp_path: Path) -> None:
    runs = runs_of(
        tmp_path,
        {"seed": 0, "run_dir": "a", "logger__name": "none"},
        {"seed": 1, "run_dir": "b", "logger__name": "wandb"},
    )
    assert labels(runs) == {"powerflow α=4": 2}


def test_what_a_strategy_or_epsilon_brings_along_is_no_key_of_its_own(tmp_path: Path) -> None:
    def weighted(strategy: str, psi: float, kind: str, epsilon: float) -> dict[str, Any]:
        return {
            "strategy": strategy, "strategy__format_penalty": psi, "epsilon": epsilon,
            "strategy__objective__weight__kind": kind,
            "strategy__objective__weight__epsilon_low": epsilon,
        }  # fmt: skip

    runs = runs_of(
        tmp_path,
        weighted("tb_traj", 0.0, "none", 0.2),
        weighted("powerflow", -0.5, "seq_sum", 0.2),
        weighted("powerflow", -0.5, "seq_sum", 0.1),
    )
    assert varying_keys(runs, ALIASES) == ["strategy.name", "alpha", "epsilon"]
    assert labels(runs) == {
        "powerflow α=4 ε=0.1": 1, "powerflow α=4 ε=0.2": 1, "tb_traj α=4 ε=0.2": 1,
    }  # fmt: skip


def test_alpha_tells_no_runs_of_a_strategy_apart_that_does_not_use_it(tmp_path: Path) -> None:
    unused = {"strategy": "grpo", "strategy__uses_alpha": False}
    runs = runs_of(tmp_path, {"alpha": 2}, {**unused, "alpha": 2}, {**unused, "alpha": 4})
    assert labels(runs) == {"powerflow α=2": 1, "grpo": 2}


def test_keys_that_differ_within_a_strategy_are_named_shortly(tmp_path: Path) -> None:
    target = "powerflow_lit.log_z.{}LogZ"
    runs = runs_of(
        tmp_path,
        {"log_z___target_": target.format("Head"), "strategy__format_penalty": 0.0},
        {"log_z___target_": target.format("Group"), "buffer__max_staleness": 2},
        {"log_z___target_": target.format("Group"), "task__build__size": 7},
    )
    assert set(labels(runs)) == {
        "powerflow α=4 ψ=0 staleness=0",
        "powerflow α=4 ψ=-0.5 staleness=2",
        "powerflow α=4 ψ=-0.5 staleness=0",
    }
    values = {"strategy.name": "la_tb", "log_z._target_": target.format("Group"), "a.b.size": 7}
    assert label_of(values, ALIASES) == "la_tb log_z=GroupLogZ size=7"


def test_a_key_that_old_runs_do_not_have_makes_no_difference(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, {"seed": 0}, {"seed": 1, "newer__key": 3})
    assert labels(runs) == {"powerflow α=4": 2}


@pytest.mark.parametrize(
    ("where", "passing"),
    [
        ({}, {0, 1, 2, 3}),
        (None, {0, 1, 2, 3}),
        ({"strategy.name": ["powerflow", "la_tb"]}, {0, 1, 3}),
        ({"strategy": "powerflow", "strategy.format_penalty": [0]}, {1}),
        ({"strategy": {"name": "powerflow"}, "seed": 0}, {0, 1}),
        ([{"strategy.name": "tb_traj"}, {"strategy.format_penalty": [-0.5], "seed": 1}], {2, 3}),
        ({"alpha": 9}, set()),
    ],
)
def test_filters_take_values_lists_and_alternatives(
    tmp_path: Path, where: Any, passing: set[int]
) -> None:
    runs = runs_of(
        tmp_path,
        {"strategy": "powerflow"},
        {"strategy": "powerflow", "strategy__format_penalty": 0.0},
        {"strategy": "tb_traj", "strategy__format_penalty": 0.0},
        {"strategy": "la_tb", "seed": 1},
    )
    assert {int(r.folder.name) for r in select(runs, where)} == passing


@pytest.mark.parametrize(
    ("where", "words"),
    [({"strategy.format_penalti": [0]}, "format_penalty"), ("powerflow", "a filter is")],
)
def test_a_filter_that_cannot_be_meant_is_refused(tmp_path: Path, where: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        select(runs_of(tmp_path, {}), where)


def test_named_panels_choose_runs_and_need_no_key_that_only_tells_panels_apart(
    tmp_path: Path,
) -> None:
    runs = runs_of(
        tmp_path,
        {"strategy": "powerflow"},
        {"strategy": "powerflow", "strategy__format_penalty": 0.0},
        {"strategy": "tb_traj"},
        {"strategy": "tb_traj", "strategy__format_penalty": 0.0},
    )
    psi = "strategy.format_penalty"
    paper = [{"strategy": "powerflow", psi: -0.5}, {"strategy": "tb_traj", psi: 0.0}]
    panels, empty = panels_of(
        runs,
        [
            {"name": "paper", "where": paper},
            {"name": "all", "where": {psi: -0.5}},
            {"name": "nobody", "where": {psi: -9}},
        ],
        ALIASES,
    )
    chosen = {p.name: sorted(int(r.folder.name) for r in p.runs) for p in panels}
    assert chosen == {"paper": [0, 3], "all": [0, 2]}
    assert empty == ["panel 'nobody': no run passes its filter"]
    assert keys_of(panels, ALIASES) == ["strategy.name", "alpha"]
    by_key, _ = panels_of(runs, psi, ALIASES)
    assert [(p.name, len(p.runs)) for p in by_key] == [("ψ=-0.5", 2), ("ψ=0", 2)]


def test_a_strategy_has_one_colour_and_its_groups_differ_in_line_and_shade() -> None:
    groups = [Group(f"{s} α={a}", s, (a,), ()) for s in ("powerflow", "tb_traj") for a in (2, 4)]
    looks = styles(groups)
    assert looks["powerflow α=2"].colour == COLOURS["powerflow"]
    assert looks["tb_traj α=2"].colour == COLOURS["tb_traj"]
    assert looks["powerflow α=4"].colour != COLOURS["powerflow"]
    # the same alpha is drawn by the same line in both
    assert looks["powerflow α=4"].line == looks["tb_traj α=4"].line != looks["tb_traj α=2"].line
    assert len({(x.colour, x.line) for x in looks.values()}) == 4


def test_figures_are_averaged_over_finished_runs_and_the_others_are_counted(
    tmp_path: Path,
) -> None:
    for seed, status in enumerate(("finished", "finished", "diverged", None)):
        make_run(tmp_path / str(seed), seed=seed, status=status)
    (whole,) = group(collect([str(tmp_path)]).runs, ["strategy.name"], ALIASES)
    assert [r.seed for r in whole.counted] == [0, 1]
    assert whole.count == "2 + 1 diverged + 1 unfinished"

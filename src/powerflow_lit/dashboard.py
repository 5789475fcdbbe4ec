"""The W&B workspace and report that compare strategies.

python -m powerflow_lit.dashboard entity=me project=powerflow_lit runs.task=arithmetic
python -m powerflow_lit.dashboard dry_run=true output=dashboard.json    # no network, no login

A dry run builds the same objects as a real one and serialises them with the library's own code.
The workspace's `spec` is what a save sends, character by character but for the random ids of its
panels and its run set. So is the report's, but for one thing more: W&B's number of the project
inside each run set, which only the server knows; a dry run names the project without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, typed
from powerflow_lit.config.launching import launch
from powerflow_lit.config.schema_tools import DashboardConfig
from powerflow_lit.errors import in_one_line
from powerflow_lit.reporting.grouping import COLOURS
from powerflow_lit.wandb_login import has_wandb_login

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

# keys of a run's config, nested as in config.yaml; runs of equal values are one line with a band
GROUPED_BY = ("strategy.name", "alpha")
PANELS_PER_ROW, PANEL_WIDTH, PANEL_HEIGHT = 3, 8, 6  # in the cells of a report's grid


def stored_key(key: str) -> str:
    """Where W&B keeps a nested config value: `value` stands after the first name."""
    first, *rest = key.split(".")
    return ".".join([first, "value", *rest])


def line_plots(config: DashboardConfig, panels: Mapping[str, Sequence[str]]) -> list[Any]:
    """One panel a title: the mean over runs of a group, and a band from least to greatest."""
    import wandb_workspaces.reports.v2 as wr

    plots = []
    for i, (title, metrics) in enumerate(panels.items()):
        smoothing = config.smoothing.get(metrics[0].partition("/")[0], 0.0)
        row, column = divmod(i, PANELS_PER_ROW)
        plots.append(
            wr.LinePlot(
                title=title,
                x=config.x_axis,
                y=list(metrics),
                title_x=config.x_axis,
                groupby_aggfunc="mean",
                groupby_rangefunc="minmax",
                smoothing_type="exponential" if smoothing else "none",
                smoothing_factor=smoothing,
                max_runs_to_show=config.max_lines,
                layout=wr.Layout(
                    x=column * PANEL_WIDTH, y=row * PANEL_HEIGHT, w=PANEL_WIDTH, h=PANEL_HEIGHT
                ),
            )
        )
    return plots


def filters(config: DashboardConfig, strategies: Sequence[str] = ()) -> list[Any]:
    """The runs that take part; written with `in`, which W&B's own filters use for names."""
    import wandb_workspaces.workspaces as ws

    runs = config.runs
    wanted = {
        "task.name": [runs.task] if runs.task else [],
        "model.name": [runs.model] if runs.model else [],
        "strategy.name": list(strategies),
    }
    chosen = [ws.Config(stored_key(key)).isin(names) for key, names in wanted.items() if names]
    return chosen + ([ws.Metric("Group").isin([runs.group])] if runs.group else [])


def build_workspace(config: DashboardConfig) -> ws.Workspace:
    """The saved view: a section for each of the configuration's, runs grouped and coloured."""
    import wandb_workspaces.workspaces as ws

    colours: dict[Any, Any] = dict(COLOURS)
    colours |= {
        ws.GroupPath(strategy, f"{alpha:g}"): colour
        for strategy, colour in COLOURS.items()
        for alpha in config.alphas
    }
    return ws.Workspace(
        entity=config.entity or "",
        project=config.project,
        name=config.name,
        sections=[
            ws.Section(name=title, panels=line_plots(config, panels), is_open=True)
            for title, panels in config.sections.items()
        ],
        settings=ws.WorkspaceSettings(
            x_axis=config.x_axis, smoothing_type="none", max_runs=config.max_lines
        ),
        runset_settings=ws.RunsetSettings(
            filters=filters(config),
            groupby=[ws.Config(key) for key in GROUPED_BY],
            group_colors=colours,
        ),
    )


def build_report(config: DashboardConfig, *, offline: bool) -> wr.Report:
    """All strategies of the report in one grid, then each by itself.

    Offline the run sets name no project: the library would ask the server for its number.
    """
    import wandb_workspaces.reports.v2 as wr

    def grid(name: str, strategies: Sequence[str]) -> wr.PanelGrid:
        runset = wr.Runset(
            entity="" if offline else config.entity or "",
            project="" if offline else config.project,
            name=name,
            filters=filters(config, strategies),
            groupby=[f"config.{key}" for key in GROUPED_BY],
        )
        strategy_key, alpha_key = (wr.Config(key) for key in GROUPED_BY)
        colours: dict[Any, Any] = {
            wr.RunsetGroup(
                name,
                (
                    wr.RunsetGroupKey(strategy_key, strategy),
                    wr.RunsetGroupKey(alpha_key, f"{alpha:g}"),
                ),
            ): COLOURS[strategy]
            for strategy in strategies
            if strategy in COLOURS
            for alpha in config.alphas
        }
        return wr.PanelGrid(
            runsets=[runset],
            panels=line_plots(config, config.report.panels),
            custom_run_colors=colours,
        )

    chosen = list(config.report.strategies)
    blocks: list[Any] = [wr.P(line) for line in config.report.text.strip().splitlines()]
    blocks += [wr.H1("all together"), grid(" ".join(chosen), chosen)]
    for strategy in chosen:
        blocks += [wr.H1(strategy), grid(strategy, [strategy])]
    return wr.Report(
        entity=config.entity or "",
        project=config.project,
        title=config.report.title,
        description=", ".join(chosen),
        blocks=blocks,
        width="fluid",
    )


def specification(config: DashboardConfig) -> dict[str, Any]:
    """Workspace and report as JSON, without network; the module's docstring says how faithful."""
    view = build_workspace(config)._to_model()
    report = build_report(config, offline=True)._to_model()
    report_spec = _as_sent(report.spec)
    for block in report_spec["blocks"]:
        for runset in block.get("metadata", {}).get("runSets", []):
            runset["project"] = {"name": config.project, "entityName": config.entity or ""}
    where = {"entityName": config.entity, "projectName": config.project}
    return {
        "workspace": {**where, "displayName": view.display_name, "spec": _as_sent(view.spec)},
        "report": {**where, "displayName": report.display_name, "spec": report_spec},
    }


def _as_sent(spec: Any) -> dict[str, Any]:
    return json.loads(spec.model_dump_json(by_alias=True, exclude_none=True))


def save(config: DashboardConfig) -> list[str]:
    """Save both to W&B as new ones; returns their addresses.

    Raises:
        ConfigError: no entity, no login, or W&B refuses.
    """
    if not config.entity:
        raise ConfigError(
            "entity=null: name the W&B user or team, entity=..., or write the specification "
            "without network, dry_run=true"
        )
    if not has_wandb_login():
        raise ConfigError(
            "no W&B key or login: `wandb login`, or WANDB_API_KEY; "
            "without network only dry_run=true"
        )
    try:
        saved = [build_workspace(config).save(), build_report(config, offline=False).save()]
        return [item.url for item in saved]
    except Exception as error:  # the library raises bare ones, beside those of three clients
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"W&B, {config.entity}/{config.project}: {reason[0]}") from error


def check(config: DashboardConfig) -> None:
    """Refuse what the library would refuse less clearly, or not at all.

    Raises:
        ConfigError: a panel without metrics, smoothing out of range, no wandb-workspaces.
    """
    if find_spec("wandb_workspaces") is None:
        raise ConfigError("wandb-workspaces is not installed: pip install wandb-workspaces")
    for section, panels in {**config.sections, "report": config.report.panels}.items():
        for title, metrics in panels.items():
            if not metrics:
                raise ConfigError(f"{section}, panel '{title}': name at least one metric")
    for prefix, value in config.smoothing.items():
        if not 0 <= value < 1:
            raise ConfigError(f"smoothing.{prefix}={value}: must lie in [0, 1)")


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="dashboard")
def _main(cfg: DictConfig) -> None:
    with in_one_line():
        config = typed(cfg, DashboardConfig)
        check(config)
        if not config.dry_run:
            print(*save(config), sep="\n")
            return
        text = json.dumps(specification(config), indent=2)
    if config.output is None:
        print(text)
        return
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    Path(config.output).write_text(text + "\n")
    print(f"written to {config.output}; nothing was sent")


def main() -> None:
    """Console script `powerflow-dashboard`."""
    launch(_main, "dashboard")


if __name__ == "__main__":
    main()

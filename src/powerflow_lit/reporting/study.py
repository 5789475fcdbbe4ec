"""What a report is about: the runs that were chosen, their groups, panels and headline metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerflow_lit.config.checks import ConfigError
from powerflow_lit.config.schema_tools import ReportConfig
from powerflow_lit.reporting.evaluations import Evaluated, read_evaluations
from powerflow_lit.reporting.grouping import (
    Group,
    Panel,
    group,
    keys_of,
    known_key,
    panels_of,
    select,
    varying_keys,
)
from powerflow_lit.reporting.runs import Run, collect
from powerflow_lit.reporting.tables import matching


@dataclass(frozen=True)
class Study:
    """Everything that figures, tables and the page are made from."""

    config: ReportConfig
    runs: list[Run]
    remarks: list[str]  # a line for each thing amiss
    notes: list[str]  # what was left out on purpose
    sweeps: list[tuple[Path, dict[str, Any]]]
    panels: list[Panel]
    keys: list[str]  # dotted keys that tell groups apart
    panel_keys: list[str]  # those of them that panels do not already tell apart
    groups: list[Group]
    headline: str | None
    evaluations: list[Evaluated]

    @property
    def aliases(self) -> Mapping[str, str]:
        return self.config.aliases

    @property
    def title(self) -> str:
        """The given title, or tasks and strategies."""
        if self.config.title:
            return self.config.title
        studies = [str(s["study"]) for _, s in self.sweeps if s.get("study")]
        tasks = [str(t) for t in dict.fromkeys(r.config.get("task.name") for r in self.runs) if t]
        named = ", ".join(dict.fromkeys(studies)) or ", ".join(tasks) or "evaluations"
        strategies = list(dict.fromkeys(g.strategy for g in self.groups))
        shown = ", ".join(strategies) if len(strategies) <= 5 else f"{len(strategies)} strategies"
        return f"PowerFlow: {named}" + (f" ({shown})" if strategies else "")


def study_of(config: ReportConfig) -> Study:
    """Reads and sorts what the configuration asks for.

    Raises:
        ConfigError: nothing was asked for, or a key that no run has.
    """
    if not config.runs and not config.evaluations:
        raise ConfigError("runs=[]: name run folders or a multirun, e.g. 'runs=[multirun/...]'")
    found = collect(config.runs)
    remarks, notes = list(found.remarks), []
    runs = select(found.runs, config.where or None)
    if len(runs) < len(found.runs):
        notes.append(f"{len(found.runs) - len(runs)} of {len(found.runs)} runs left out by where=")
    if found.runs and not runs:
        remarks.append(f"where={config.where}: no run passes")
    tasks = list(dict.fromkeys(str(r.config.get("task.name")) for r in runs))
    if len(tasks) > 1:
        remarks.append(f"runs of several tasks ({', '.join(tasks)}): their figures do not compare; "
                       f"choose one with 'where={{task.name: {tasks[0]}}}'")  # fmt: skip
    panels, empty = panels_of(runs, config.panels, config.aliases)
    remarks += empty
    keys = _keys(config, runs)
    evaluations, more = read_evaluations(config.evaluations, config.aliases)
    return Study(
        config, runs, remarks + more, notes, found.sweeps, panels, keys,
        keys if config.group_by else keys_of(panels, config.aliases),
        group(runs, keys, config.aliases), headline_of(runs, config.headline), evaluations,
    )  # fmt: skip


def _keys(config: ReportConfig, runs: Sequence[Run]) -> list[str]:
    if config.group_by:
        return [known_key(k, runs, "group_by") for k in config.group_by]
    keys = varying_keys(runs, config.aliases)
    if config.x is not None and runs:
        x = known_key(config.x, runs, "x")
        keys += [x] if x not in keys else []
    return keys


def headline_of(runs: Sequence[Run], wanted: Sequence[str]) -> str | None:
    """The first metric wanted that a run has; of a name ending in @ the greatest k."""
    known = sorted({n for r in runs for n in (*r.final, *r.metrics)})
    for pattern in wanted:
        hits = matching([pattern], known)
        if hits:
            return hits[-1]
    return None

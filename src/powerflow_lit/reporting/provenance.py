"""What was run: commands, commits, versions, time, tokens and dates, as the run folders tell."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from powerflow_lit.reporting.files import number
from powerflow_lit.reporting.grouping import Group
from powerflow_lit.reporting.runs import Run
from powerflow_lit.reporting.tables import short_commit

PLACES = ("run_dir=", "resume=", "hydra.")  # say where a run is written, not what it does


def facts_of(
    groups: Sequence[Group], sweeps: Sequence[tuple[Path, Mapping[str, Any]]]
) -> list[tuple[str, str]]:
    """Names and values for the 'what was run' block."""
    runs = [r for g in groups for r in g.runs]
    seeds = sorted({str(r.seed) for r in runs})
    walls = [w for r in runs if (w := number(r.summary.get("wall_s"))) is not None]
    tokens = [t for r in runs if (t := number(r.summary.get("tokens"))) is not None]
    versions: dict[str, Counter[str]] = {}
    for run in runs:
        said = run.summary.get("versions")
        for name, version in (said if isinstance(said, dict) else {}).items():
            versions.setdefault(str(name), Counter())[str(version)] += 1
    studies = [str(s["study"]) for _, s in sweeps if s.get("study")]
    return [
        ("studies", ", ".join(dict.fromkeys(studies))),
        ("tasks", _counted(r.config.get("task.name") for r in runs)),
        ("models", _counted(r.config.get("model.name") for r in runs)),
        ("runs", "; ".join(f"{g.label}: {g.count}" for g in groups)),
        ("seeds", ", ".join(seeds)),
        ("git commits", _counted(short_commit(r) or "not told" for r in runs)),
        ("versions", "; ".join(f"{name} {', '.join(v)}" for name, v in sorted(versions.items()))),
        ("wall time", _walls(walls)),
        ("tokens sampled", f"{sum(tokens):,.0f} in training" if tokens else ""),
        ("dates", _dates(runs)),
    ]


def _counted(values: Iterable[Any]) -> str:
    counts = Counter(str(v) for v in values if v is not None)
    return ", ".join(f"{v} ({n} runs)" if len(counts) > 1 else v for v, n in counts.items())


def _walls(walls: Sequence[float]) -> str:
    if not walls:
        return ""
    total = sum(walls)
    text = f"{total / 3600:.1f} h" if total >= 5400 else f"{total / 60:.1f} min"
    return f"{text} over {len(walls)} runs ({min(walls):.0f} to {max(walls):.0f} s each)"


def _dates(runs: Sequence[Run]) -> str:
    stamps = [t for r in runs for t in r.written if t > 0]
    if not stamps:
        return ""
    first, last = (datetime.fromtimestamp(t, UTC) for t in (min(stamps), max(stamps)))
    return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC (files' times)"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _joined(command: Sequence[Any]) -> str:
    """One line to paste; the first part may hold several words (`python -m ...`)."""
    program, *rest = map(str, command)
    return " ".join([program, *map(shlex.quote, rest)])


def train_commands(
    runs: Sequence[Run], sweeps: Sequence[tuple[Path, Mapping[str, Any]]]
) -> list[str]:
    """The sweeps' commands as typed, then one for each run outside of them."""
    found = []
    inside: list[Path] = []
    for folder, sweep in sweeps:
        typed = _listed(sweep.get("commands"))
        commands = [_joined(c) for c in typed if isinstance(c, list) and c]
        if commands:
            found += commands
            inside.append(folder.resolve())
    for run in runs:
        if not any(folder in run.folder.resolve().parents for folder in inside):
            kept = [o for o in run.overrides if not o.lstrip("+").startswith(PLACES)]
            found.append(shlex.join(["python", "-m", "powerflow_lit.train", *kept]))
    return list(dict.fromkeys(found))

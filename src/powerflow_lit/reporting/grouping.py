"""Which runs are compared: filters, the keys in which runs differ, groups and their labels."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from powerflow_lit.config.checks import ConfigError
from powerflow_lit.config.identity import NOT_JOB_IDENTITY_BELOW
from powerflow_lit.reporting.files import flat, number
from powerflow_lit.reporting.runs import Run

# one colour for each strategy wherever it appears: Okabe and Ito's for the paper's own, Tol's muted
# ones for its rivals
COLOURS = {
    "powerflow": "#0072B2",
    "powerflow_length": "#88CCEE",
    "la_tb": "#56B4E9",
    "la_tb_blocks": "#CC6677",
    "tb_traj": "#D55E00",
    "tb_token": "#E69F00",
    "tb_token_per_token": "#F0E442",
    "rl_traj": "#CC79A7",
    "rl_token": "#009E73",
    "format_only": "#661100",
    "grpo": "#332288",
    "dr_grpo": "#6699CC",
    "intuitor": "#882255",
    "empo": "#44AA99",
    "ttrl": "#AA4499",
    "one_shot_em": "#999933",
    "flowrl": "#117733",
    "flowrl_unclipped": "#DDCC77",
}
ALWAYS = ("strategy.name", "alpha")
# these change neither what is learned nor what is measured
IGNORED = (
    "seed", "run_dir", "resume", "logger", "tokens_per_microbatch", "logit_chunk_mb",
    *(f"{group}.{name}" for group, names in NOT_JOB_IDENTITY_BELOW.items() for name in names),
)  # fmt: skip
SHORTHAND = {"strategy": "strategy.name", "task": "task.name", "model": "model.name"}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only."""

    label: str
    strategy: str
    rest: tuple[Any, ...]  # values of the grouping keys other than the strategy
    runs: tuple[Run, ...]

    @property
    def counted(self) -> list[Run]:
        """The runs that figures are averaged over: the finished ones, else whatever there is."""
        return [r for r in self.runs if r.finished] or list(self.runs)

    @property
    def count(self) -> str:
        """How many runs stand behind a figure, and what became of the others."""
        finished = sum(r.finished for r in self.runs)
        others: dict[str, int] = {}
        for run in self.runs:
            if not run.finished:
                others[run.status] = others.get(run.status, 0) + 1
        parts = ([str(finished)] if finished else []) + [f"{n} {s}" for s, n in others.items()]
        return " + ".join(parts)


@dataclass(frozen=True)
class Panel:
    """A row of panels: its title and the runs in it ('' for a figure of one row)."""

    name: str
    runs: tuple[Run, ...]


def group(runs: Sequence[Run], keys: Sequence[str], aliases: Mapping[str, str]) -> list[Group]:
    """Runs with the same values of the keys, strategies in the order of their colours."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run.config.get(k) for k in keys), []).append(run)
    order = list(COLOURS)

    def rank(values: tuple[Any, ...]) -> tuple[Any, ...]:
        strategy = found[values][0].strategy
        place = order.index(strategy) if strategy in order else len(order)
        return place, strategy, [sortable(v) for v in values]

    groups = []
    for values in sorted(found, key=rank):
        rest = tuple(v for k, v in zip(keys, values, strict=True) if k != "strategy.name")
        label = label_of(dict(zip(keys, values, strict=True)), aliases)
        groups.append(Group(label, found[values][0].strategy, rest, tuple(found[values])))
    return groups


def label_of(values: Mapping[str, Any], aliases: Mapping[str, str]) -> str:
    """E.g. `powerflow α=4 ψ=-0.5 staleness=2`; keys that a run does not have are left out."""
    parts: list[str] = []
    for key, value in values.items():
        if key == "strategy.name":
            parts.insert(0, str(value))
        elif value is not None:
            parts.append(f"{short_key(key, aliases)}={short_value(value)}")
    return " ".join(parts) or "all runs"


def short_key(key: str, aliases: Mapping[str, str]) -> str:
    """The alias, else the last telling component: log_z._target_ is called log_z."""
    if key in aliases:
        return aliases[key]
    parts = key.split(".")
    while len(parts) > 1 and parts[-1] in ("_target_", "name", "kind"):
        parts.pop()
    return parts[-1]


def short_value(value: Any) -> str:
    """Numbers without trailing zeros; of a dotted class path the class."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    text = str(value)
    return text.rpartition(".")[2] if text.startswith("powerflow_lit.") else text


def sortable(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then texts."""
    found = number(value)
    return (1, 0.0, str(value)) if found is None else (0, found, "")


def varying_keys(runs: Sequence[Run], aliases: Mapping[str, str]) -> list[str]:
    """Strategy, alpha, and the fewest further keys that tell apart runs differing in anything.

    A key whose value follows from the keys before it is left out (a strategy brings its weight,
    an epsilon the two bounds made from it); keys with an alias are preferred. A key that a run
    does not have (older code) makes no difference.
    """
    chosen = [k for k in ALWAYS if any(k in r.config for r in runs)]
    every = {k for r in runs for k in r.config if not _ignored(k)}
    named = [k for k in ("task.name", "model.name", *aliases) if k in every]
    others = sorted(every - set(named), key=lambda k: (k.count("."), k))
    for key in [*named, *others]:
        if key not in chosen and _splits(runs, chosen, key):
            chosen.append(key)
    return chosen


def _splits(runs: Sequence[Run], chosen: Sequence[str], key: str) -> bool:
    seen: dict[tuple[Any, ...], Any] = {}
    for run in runs:
        if key not in run.config:
            continue
        value = run.config[key]
        if seen.setdefault(tuple(run.config.get(k) for k in chosen), value) != value:
            return True
    return False


def _ignored(key: str) -> bool:
    return any(key == i or key.startswith(f"{i}.") for i in IGNORED)


def select(runs: Sequence[Run], where: Any, setting: str = "where") -> list[Run]:
    """The runs that pass a filter: {key: value or values, ...}, or a list of such alternatives.

    Raises:
        ConfigError: a key that no run has, or something that is no filter.
    """
    alternatives = [_normal(w, runs, setting) for w in _listed(where)]
    if not alternatives:
        return list(runs)
    return [r for r in runs if any(_passes(r, a) for a in alternatives)]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _normal(where: Any, runs: Sequence[Run], setting: str) -> dict[str, list[Any]]:
    if not isinstance(where, Mapping):
        raise ConfigError(f"{setting}={where}: a filter is {{key: value or [values]}}, or a list")
    found = {}
    for key, allowed in flat({str(k): v for k, v in where.items()}):
        found[known_key(key, runs, setting)] = _listed(allowed) if allowed is not None else [None]
    return found


def known_key(key: str, runs: Sequence[Run], setting: str) -> str:
    """The dotted key as the runs' config.yaml has it (`strategy` for `strategy.name`).

    Raises:
        ConfigError: no run has it.
    """
    key = SHORTHAND.get(key, key)
    every = {k for r in runs for k in r.config}
    if runs and key not in every:
        close = difflib.get_close_matches(key, sorted(every), n=1)
        hint = f": did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{setting}: no run's config.yaml has {key!r}{hint}")
    return key


def _passes(run: Run, where: Mapping[str, Iterable[Any]]) -> bool:
    return all(any(same(run.config.get(k), v) for v in allowed) for k, allowed in where.items())


def same(value: Any, wanted: Any) -> bool:
    """Equal as numbers, or as texts (a class also by its short name)."""
    left, right = number(value), number(wanted)
    if left is not None and right is not None:
        return left == right
    return str(value) == str(wanted) or short_value(value) == str(wanted)


def panels_of(
    runs: Sequence[Run], panels: Any, aliases: Mapping[str, str]
) -> tuple[list[Panel], list[str]]:
    """Rows of panels by a dotted key or by named filters, and a remark for each empty one.

    Raises:
        ConfigError: a key that no run has, or a panel without name and where.
    """
    if panels is None:
        return [Panel("", tuple(runs))], []
    if isinstance(panels, str):
        key = known_key(panels, runs, "panels")
        values = sorted({run.config.get(key) for run in runs}, key=sortable)
        short = short_key(key, aliases)
        filters = [(f"{short}={short_value(v)}", {key: [v]}) for v in values]
    else:
        if not all(isinstance(p, Mapping) and {"name", "where"} <= p.keys() for p in panels):
            raise ConfigError("panels: a dotted key, or a list of {name: ..., where: {...}}")
        filters = [(str(p["name"]), p["where"]) for p in panels]
    found = [Panel(name, tuple(select(runs, where, "panels"))) for name, where in filters]
    empty = [f"panel {p.name!r}: no run passes its filter" for p in found if not p.runs]
    return [p for p in found if p.runs], empty


def keys_of(panels: Sequence[Panel], aliases: Mapping[str, str]) -> list[str]:
    """Keys that vary within a panel at least; what only tells panels apart is in their titles."""
    found: list[str] = []
    for panel in panels:
        found += [k for k in varying_keys(panel.runs, aliases) if k not in found]
    return found

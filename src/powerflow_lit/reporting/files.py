"""Files of a run as they are found: half-written, empty or missing ones never raise."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

# the C loader is ten times faster, which counts with hundreds of runs
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnreadableError(Exception):
    """A file that is there but cannot be used; the message says why."""


@dataclass(frozen=True)
class Sheet:
    """A csv file: columns by name, whole rows of text; `cut` tells of a half-written last line."""

    columns: Mapping[str, int]
    rows: list[list[str]]
    cut: bool = False


def read_sheet(path: Path) -> Sheet:
    """All whole lines of a csv file; an absent or empty file has none.

    Raises:
        UnreadableError: it is no csv file.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return Sheet({}, [])
    except OSError as error:
        raise UnreadableError(f"{path.name} cannot be read ({error.strerror})") from error
    # a line without its end was being written when the run was killed or the file was read
    whole, _, rest = text.rpartition("\n")
    try:
        lines = list(csv.reader(whole.splitlines()))
    except csv.Error as error:
        raise UnreadableError(f"{path.name} is no csv file ({error})") from error
    if not lines:
        return Sheet({}, [], cut=bool(rest))
    header, *rows = lines
    right = [row for row in rows if len(row) == len(header)]
    columns = {name: i for i, name in enumerate(header)}
    return Sheet(columns, right, cut=bool(rest) or len(right) < len(rows))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is absent.

    Raises:
        UnreadableError: it is truncated or holds something else.
    """
    return _mapping(path, json.loads)


def read_yaml(path: Path) -> Any:
    """A yaml file; None where it is absent.

    Raises:
        UnreadableError: it is no yaml.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=YAML_LOADER)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UnreadableError(f"{path.name} unreadable") from error


def read_config(path: Path) -> dict[str, Any]:
    """config.yaml with dotted keys; empty where it is absent.

    Raises:
        UnreadableError: it is no mapping.
    """
    found = read_yaml(path)
    if found is not None and not isinstance(found, dict):
        raise UnreadableError(f"{path.name} holds no settings")
    return dict(flat(found or {}))


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UnreadableError(f"{path.name} unreadable (truncated?)") from error
    if not isinstance(found, dict):
        raise UnreadableError(f"{path.name} holds no object")
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by dotted key; lists are leaves."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        else:
            yield name, tuple(map(str, value)) if isinstance(value, list) else value


def number(text: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(text, bool):
        return None
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def numbers(mapping: Any) -> dict[str, float]:
    """The finite figures of what should be a mapping of figures."""
    if not isinstance(mapping, Mapping):
        return {}
    found = {str(k): number(v) for k, v in mapping.items()}
    return {k: v for k, v in found.items() if v is not None}


@dataclass(frozen=True)
class Scores:
    """Figures of each evaluation prompt. P prompts, M metrics (names without `val/`)."""

    prompts: tuple[str, ...]
    names: tuple[str, ...]
    values: np.ndarray  # (P, M) float, nan where there is none

    def column(self, name: str) -> np.ndarray:
        """One metric, (P,)."""
        found: np.ndarray = self.values[:, self.names.index(name)]
        return found


@dataclass(frozen=True)
class Problems:
    """problems.csv: one row for each evaluation prompt, evaluation and decoding."""

    sheet: Sheet
    _rows: dict[tuple[int, str], list[list[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = self.sheet.columns
        if not {"decoding", "prompt_id"} <= columns.keys():
            return
        refill, decoding = columns.get("refill"), columns["decoding"]
        for row in self.sheet.rows:
            at = number(row[refill]) if refill is not None else None
            self._rows.setdefault((int(at or 0), row[decoding]), []).append(row)

    def base(self) -> dict[str, Scores]:
        """Scores of the base by name of decoding."""
        return {d: self._scores(rows) for (refill, d), rows in self._rows.items() if refill == 0}

    def final(self) -> Scores | None:
        """The policy's last whole evaluation at T=1; None if it never was evaluated."""
        sizes = {r: len(rows) for (r, d), rows in self._rows.items() if d == "T=1" and r > 0}
        # a run killed while writing leaves an evaluation with too few prompts
        whole = [r for r, size in sizes.items() if size == max(sizes.values())]
        return self._scores(self._rows[max(whole), "T=1"]) if whole else None

    def of(self, benchmark: str) -> Problems:
        """The rows of one benchmark; all of them where no column names any."""
        at = self.sheet.columns.get("benchmark")
        if at is None:
            return self
        rows = [row for row in self.sheet.rows if row[at] == benchmark]
        return Problems(Sheet(self.sheet.columns, rows, self.sheet.cut))

    def decodings(self) -> dict[str, Scores]:
        """Scores by decoding whatever the refill (the folders of `evaluate`)."""
        return {d: self._scores(rows) for (_, d), rows in self._rows.items()}

    def _scores(self, rows: list[list[str]]) -> Scores:
        named = {n: i for n, i in self.sheet.columns.items()
                 if n not in ("benchmark", "refill", "decoding", "prompt_id")}  # fmt: skip
        at = self.sheet.columns["prompt_id"]
        unique = {row[at]: row for row in rows}  # a resumed run may repeat one: the last counts
        values = [[number(row[i]) for i in named.values()] for row in unique.values()]
        return Scores(tuple(unique), tuple(named), np.array(values, dtype=float))


def read_problems(folder: Path) -> Problems | None:
    """The folder's problems.csv, or None where it is absent or unusable."""
    try:
        sheet = read_sheet(folder / "problems.csv")
    except UnreadableError:
        return None
    return Problems(sheet) if sheet.rows else None

"""What an evaluation leaves behind, as it goes on: eval.json, problems.csv, responses.jsonl.

A pair of benchmark and sampler is kept once it is whole; an evaluation that was killed goes on
from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from powerflow_lit.config.checks import ConfigError
from powerflow_lit.config.secrets import hidden
from powerflow_lit.disk import named
from powerflow_lit.evaluating.scores import Scored, Summary
from powerflow_lit.run_folder import append_problems, keep_problems, write_whole

# by name: what is there may be added to, but not be changed
OPEN = ("benchmarks", "samplers")


class Record:
    """The folder of an evaluation.

    Args:
        about: what eval.json says of the model beside settings and figures.
        settings: all that decides the figures, plain values by name.

    Raises:
        ConfigError: the folder holds an evaluation with other settings.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.added = 0  # pairs, in this session
        folder.mkdir(parents=True, exist_ok=True)
        before = _read(folder / "eval.json")
        settings = hidden(json.loads(json.dumps(settings)))  # as it will be read again
        if before:
            settings = _joined(before["settings"], settings, folder)
        self.data: dict[str, Any] = {
            "status": "unfinished",
            **about,
            "settings": settings,
            "benchmarks": before.get("benchmarks", {}),
            "averages": {},
            "calibration": None,
            "judge": before.get("judge"),
            "engine_logp_gap": before.get("engine_logp_gap"),
            "notes": before.get("notes", []),
        }
        self._drop_unfinished()
        self._write()

    def has(self, benchmark: str, sampler: str) -> bool:
        """Whether the pair was finished before."""
        return sampler in self.data["benchmarks"].get(benchmark, {})

    def result(self, benchmark: str, sampler: str) -> dict[str, Any]:
        found: dict[str, Any] = self.data["benchmarks"][benchmark][sampler]
        return found

    def note(self, text: str) -> None:
        """Add a line that a person must know; once only."""
        if text not in self.data["notes"]:
            self.data["notes"].append(text)

    def add(
        self,
        benchmark: str,
        sampler: str,
        prompt_ids: Sequence[int],
        scored: Scored,
        summary: Summary,
        facts: Mapping[str, Any],
    ) -> None:
        """Keep a finished pair; eval.json is written last and tells that the pair is whole.

        Args:
            prompt_ids: the ids of the prompts that `scored.figures` are of.
            facts: what else eval.json says of the pair.
        """
        path = self.folder / "responses.jsonl"
        with named(path), path.open("a") as file:
            for row in scored.rows:
                whole = {"benchmark": benchmark, "sampler": sampler, **row}
                file.write(json.dumps(whole, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        append_problems(self.folder, 0, sampler, prompt_ids, scored.figures, benchmark=benchmark)
        self.data["benchmarks"].setdefault(benchmark, {})[sampler] = {
            "metrics": summary.metrics,
            "intervals": summary.intervals,
            "sampling_errors": summary.sampling_errors,
            **facts,
        }
        self.added += 1
        self._write()

    def finish(self, **over_all: Any) -> None:
        """What is said of the evaluation as a whole (averages, calibration, judge), at its end."""
        self.data |= {"status": "finished", **over_all}
        self._write()

    def _write(self) -> None:
        write_whole(self.folder / "eval.json", json.dumps(hidden(self.data), indent=2) + "\n")

    def _drop_unfinished(self) -> None:
        """Forget the rows of a pair that was being written when the evaluation was killed."""
        whole = {(b, s) for b, found in self.data["benchmarks"].items() for s in found}
        keep_problems(self.folder, lambda row: (row.get("benchmark"), row["decoding"]) in whole)
        path = self.folder / "responses.jsonl"
        if not path.exists():
            return
        aside = path.with_name(path.name + ".tmp")
        with path.open() as old, aside.open("w") as new:  # line by line: it may be large
            for line in old:
                if line.endswith("\n"):
                    row = json.loads(line)
                    if (row["benchmark"], row["sampler"]) in whole:
                        new.write(line)
        os.replace(aside, path)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        found["settings"], found["benchmarks"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no evaluation's: choose another output") from error
    return found


def _joined(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of both; refuses what both name and do not agree on."""
    old, new = dict(_flat(before)), dict(_flat(now))
    for key in sorted(old.keys() | new.keys()):
        group, _, rest = key.partition(".")
        entry = rest.partition(".")[0]
        if group in OPEN and not (entry in before.get(group, {}) and entry in now.get(group, {})):
            continue
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"output={folder} holds an evaluation with {key}={old.get(key)}, now "
                f"{new.get(key)}: choose another output, or delete that folder"
            )
    return {**now, **{group: {**before.get(group, {}), **now.get(group, {})} for group in OPEN}}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves by dotted key."""
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        leaves += _flat(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return leaves

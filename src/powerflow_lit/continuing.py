"""What a run that is to be continued brings along, found before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from powerflow_lit.config.checks import as_dict
from powerflow_lit.config.identity import config_hash
from powerflow_lit.config.processes import TOLD
from powerflow_lit.config.rules import ConfigError
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.config.secrets import hidden
from powerflow_lit.run_folder import is_running, read_summary
from powerflow_lit.sweep import ENDED


def expand_resume(arguments: Sequence[str]) -> list[str]:
    """`resume=<run folder>` brings along what was typed for that run, and its folder.

    Raises:
        ConfigError: the folder is not a run's.
    """
    arguments = list(arguments)
    if TOLD in os.environ:  # started by the first rank with what it made of them
        return arguments
    chosen = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if not chosen or chosen[-1] in ("auto", "null", ""):
        return arguments
    typed = Path(chosen[-1]) / "overrides.yaml"
    if not typed.exists():
        raise ConfigError(f"resume={chosen[-1]}: no run folder there (no overrides.yaml)")
    try:
        saved = [str(argument) for argument in yaml.safe_load(typed.read_text())]
    except (OSError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"resume={chosen[-1]}: overrides.yaml there cannot be read") from error
    once = ("run_dir=", "resume=", "resume_force=")  # meant for that one start
    before = [argument for argument in saved if not argument.startswith(once)]
    return [*before, f"run_dir={chosen[-1]}", *arguments]


def find_unfinished(config: TrainConfig, overrides: Sequence[str]) -> Path:
    """For `resume=auto`: the run_dir that was typed, else the newest unfinished twin's.

    A twin that is still running is none. Without one it is the run_dir of a new run.
    """
    given = Path(config.run_dir)
    if any(override.startswith("run_dir=") for override in overrides):
        return given
    wanted = config_hash(hidden(as_dict(config)))  # as it stands in config.yaml
    twins = [
        path.parent
        # alpha=4 and alpha=4.0 are spelt apart in the folder above
        for path in given.parent.parent.glob("*/*/config.yaml")
        if _hash_of(path) == wanted
        and (read_summary(path.parent) or {}).get("status") not in ENDED
        and not is_running(path.parent)
    ]
    return max(twins, key=lambda folder: folder.stat().st_mtime, default=given)


def _hash_of(path: Path) -> str | None:
    """None where the file is no run's configuration."""
    try:
        saved = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return config_hash(saved) if isinstance(saved, dict) else None


def refuse_another_run(run_dir: Path, resume: str | None) -> None:
    """Raises ConfigError where the folder holds a run and `resume` does not ask for it."""
    if resume is None and (run_dir / "metrics.csv").exists():
        raise ConfigError(
            f"run_dir={run_dir} already holds a run: continue it with resume={run_dir}, "
            "or choose another run_dir"
        )

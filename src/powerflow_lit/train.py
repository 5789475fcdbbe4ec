"""Train a policy towards the alpha-power of its base.

python -m powerflow_lit.train                                  # the embedded model, in minutes
python -m powerflow_lit.train task=creative alpha=0.5
python -m powerflow_lit.train -m strategy=tb_traj,tb_token,powerflow alpha=2,4
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from powerflow_lit import run_folder
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import ConfigError, train_config
from powerflow_lit.config.fallback import with_available_engine
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.config.secrets import hide_in_output
from powerflow_lit.console import final_table, phase_line, quiet, wide_console
from powerflow_lit.continuing import expand_resume, find_unfinished
from powerflow_lit.disk import explained
from powerflow_lit.errors import USER_ERRORS, root_cause
from powerflow_lit.memory_check import check_memory
from powerflow_lit.sweep import ENDED, all_jobs_known, job_state
from powerflow_lit.training import how_to_go_on, run
from powerflow_lit.wandb_login import missing_login, wandb_mode


def announce(config: TrainConfig, run_dir: Path) -> None:
    """What is about to run, in three lines."""
    rollout = config.rollout
    print(
        f"{config.task.name} on {config.model.name}: strategy={config.strategy.name} "
        f"alpha={config.alpha:g} epsilon={config.epsilon:g} seed={config.seed}\n"
        f"{config.refills} refills of {rollout.prompts_per_refill} prompts x "
        f"{rollout.samples_per_prompt} rollouts, {config.buffer.updates_per_refill} updates each, "
        f"into {run_dir}"
    )
    if config.logger.name == "wandb":
        mode = wandb_mode(config.logger.mode)
        why = "no key or login: " if config.logger.mode == "auto" else ""
        hint = f" ({why}upload later with `wandb sync {run_dir}/wandb/offline-run-*`)"
        print(f"W&B {mode}{hint if mode == 'offline' else ''}")


def _job_folder(run_dir: str, output_dir: str, overrides: Sequence[str]) -> str:
    """The folder of a multirun's job: Hydra's, or one below the run_dir that was typed."""
    typed = any(override.startswith("run_dir=") for override in overrides)
    return str(Path(run_dir) / Path(output_dir).name) if typed else output_dir


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="train")
def _main(cfg: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        folder = Path(_job_folder(cfg.run_dir, hydra_config.runtime.output_dir, overrides))
        try:
            return _job(cfg, folder, overrides)
        except Exception:
            # the other jobs go on, and SweepCallback lists this one at the end; a sweeper that
            # optimises must see the error itself
            if not all_jobs_known(hydra_config):
                raise
            return None
    try:
        config = train_config(with_available_engine(cfg))
        if config.resume == "auto":
            config.run_dir = str(find_unfinished(config) or config.run_dir)
        return _headline(_announced_run(config, overrides))
    except USER_ERRORS as error:
        print(f"error: {root_cause(error)}", file=sys.stderr)
        sys.exit(2)


def _job(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> float | None:
    """One job of a sweep: skipped if it has ended before, resumed if it had begun.

    An error is printed and kept in summary.json before it is raised.
    """
    hide_in_output()  # a launcher may have given the job a process of its own
    state = job_state(folder)
    if state in ENDED:
        summary = run_folder.read_summary(folder) or {}
        commit = str(summary.get("git_commit"))[:7]
        print(f"skipped: {folder} {state} before (commit {commit}); delete it to run it again")
        return _headline(summary)
    try:
        config = train_config(with_available_engine(cfg))
        config.run_dir = str(folder)
        config.resume = str(folder) if state in ("unfinished", "failed") else None
        return _headline(_announced_run(config, overrides))
    except Exception as error:
        if not isinstance(error, USER_ERRORS):
            traceback.print_exc()
        print(f"error: {root_cause(error)}", file=sys.stderr)
        if job_state(folder) in ENDED:  # it went wrong after the run itself
            raise
        folder.mkdir(parents=True, exist_ok=True)
        summary = run_folder.read_summary(folder) or {}
        failure = {**summary, "status": "failed", "error": str(root_cause(error))}
        run_folder.write_summary(folder, failure)
        raise


def _announced_run(config: TrainConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The run, with what a person wants to know before and after it."""
    run_dir = Path(config.run_dir)
    quiet()
    if config.model.estimate_only:
        check_memory(config)
        return {}
    missing = missing_login(config.logger.mode) if config.logger.name == "wandb" else None
    if missing is not None:
        raise ConfigError(missing)
    announce(config, run_dir)
    check_memory(config)
    with explained(lambda: how_to_go_on(run_dir)):
        summary = run(config, run_dir, overrides)
    wide_console().print(
        final_table(summary), phase_line(summary), f"run folder: {run_dir}", sep="\n"
    )
    return summary


def _headline(summary: Mapping[str, Any]) -> float | None:
    """The task's first `val/` metric, for sweepers that optimise."""
    return next((float(value) for value in summary.get("final", {}).values()), None)


def main() -> None:
    """Console script `powerflow-train`."""
    hide_in_output()
    sys.argv[1:] = expand_resume(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()

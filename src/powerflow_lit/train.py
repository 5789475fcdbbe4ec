"""Train a policy towards the alpha-power of its base.

python -m powerflow_lit.train                                  # the embedded model, in minutes
python -m powerflow_lit.train task=creative alpha=0.5
python -m powerflow_lit.train -m strategy=tb_traj,tb_token,powerflow alpha=2,4
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

# nothing heavy here: a wrong setting is refused before lightning or transformers is imported
from powerflow_lit import run_folder
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config
from powerflow_lit.config.engines import engine_warning
from powerflow_lit.config.launching import launch, typed_overrides
from powerflow_lit.config.processes import rank_here, started
from powerflow_lit.config.rules import require
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.config.secrets import hide_in_output
from powerflow_lit.continuing import expand_resume, find_unfinished
from powerflow_lit.disk import explained
from powerflow_lit.errors import DIVERGED, in_one_line, is_refusal, line_of
from powerflow_lit.garbage import imports_left_out
from powerflow_lit.preflight import check_here, light_parts, ranks_of
from powerflow_lit.sweep import ENDED, all_jobs_known, job_state
from powerflow_lit.terminal import note_while
from powerflow_lit.wandb_login import wandb_mode


def announce(config: TrainConfig, run_dir: Path) -> None:
    """What is about to run, in three lines."""
    rollout, strategy, ranks = config.rollout, config.strategy, ranks_of(config)
    supervised = " (supervised: it learns from the references)" if strategy.supervised else ""
    unused = "" if strategy.uses_alpha else " (not used)"
    print(
        f"{config.task.name} on {config.model.name}: strategy={strategy.name}{supervised} "
        f"alpha={config.alpha:g}{unused} epsilon={config.epsilon:g} seed={config.seed}"
        f"{f', on {ranks} ranks' if ranks > 1 else ''}\n"
        f"{config.refills} refills of {rollout.prompts_per_refill} prompts x "
        f"{rollout.samples_per_prompt} rollouts, {config.buffer.updates_per_refill} updates each, "
        f"into {run_dir}"
    )
    if config.logger.name == "wandb":
        mode = wandb_mode(config.logger.mode)
        why = "no key or login: " if config.logger.mode == "auto" else ""
        hint = f" ({why}upload later with `wandb sync {run_dir}/wandb/offline-run-*`)"
        print(f"W&B {mode}{hint if mode == 'offline' else ''}")
    sys.stdout.flush()  # also into a file: importing and loading take a while
    if warning := engine_warning(rollout.engine):
        print(warning, file=sys.stderr)


def _job_folder(run_dir: str, output_dir: str, overrides: Sequence[str]) -> str:
    """The folder of a multirun's job: Hydra's, or one below the run_dir that was typed."""
    typed = any(override.startswith("run_dir=") for override in overrides)
    return str(Path(run_dir) / Path(output_dir).name) if typed else output_dir


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="train")
def _main(cfg: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    overrides = typed_overrides()
    if rank_here() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first rank says it all
    if hydra_config.mode == RunMode.MULTIRUN:
        folder = Path(_job_folder(cfg.run_dir, hydra_config.runtime.output_dir, overrides))
        try:
            return _job(cfg, folder, overrides)
        except Exception:
            # the other jobs go on, and SweepCallback lists this one at the end; a sweeper that
            # optimises must see the error itself
            _, count = started() or (0, 1)
            among_others = count > 1  # they are still in this job, not in the next
            if among_others or not all_jobs_known(hydra_config):
                raise
            return None
    with in_one_line():
        config = train_config(cfg)
        if config.resume == "auto" and rank_here() == 0:
            config.run_dir = str(find_unfinished(config, overrides))
        summary = _announced_run(config, overrides)
    if summary.get("status") == "diverged" and rank_here() == 0:
        sys.exit(DIVERGED)
    return _headline(summary)


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
        config = train_config(cfg)
        require(
            ranks_of(config) == 1 or started() is not None,
            "a multirun of jobs with several ranks needs a launcher that starts them all, as "
            "hydra/launcher=slurm does: or run each job by itself",
        )
        config.run_dir = str(folder)
        config.resume = str(folder) if state in ("unfinished", "failed") else None
        return _headline(_announced_run(config, overrides))
    except Exception as error:
        if not is_refusal(error):
            traceback.print_exc()
        print(f"error: {line_of(error)}", file=sys.stderr)
        if job_state(folder) in ENDED or rank_here() > 0:  # it went wrong after the run itself
            raise
        folder.mkdir(parents=True, exist_ok=True)
        summary = run_folder.read_summary(folder) or {}
        failure = {**summary, "status": "failed", "error": line_of(error)}
        run_folder.write_summary(folder, failure)
        raise


def _announced_run(config: TrainConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The run, with what a person wants to know before and after it."""
    run_dir, estimate_only = Path(config.run_dir), config.model.estimate_only
    with imports_left_out():
        if not estimate_only:
            with note_while("checking the configuration"):
                check_here(config)
                parts = light_parts(config)
            announce(config, run_dir)
        with note_while("importing lightning and transformers"):
            from powerflow_lit.console import final_table, phase_line, quiet, wide_console
            from powerflow_lit.memory_check import check_memory
            from powerflow_lit.training import how_to_go_on, run

    quiet()
    check_memory(config)
    if estimate_only:
        return {}
    with explained(lambda: how_to_go_on(run_dir)):
        summary = run(config, run_dir, overrides, parts)
    wide_console().print(
        final_table(summary), phase_line(summary), f"run folder: {run_dir}", sep="\n"
    )
    return summary


def _headline(summary: Mapping[str, Any]) -> float | None:
    """The task's first `val/` metric, for sweepers that optimise."""
    return next((float(value) for value in summary.get("final", {}).values()), None)


def main() -> None:
    """Console script `powerflow-train`."""
    launch(_main, "train", arguments=expand_resume)


if __name__ == "__main__":
    main()

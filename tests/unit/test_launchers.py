"""What a sweep on SLURM would submit, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from powerflow_lit.config import conf_dir


def launcher(name: str, *overrides: str) -> dict[str, Any]:
    asked = [f"hydra/launcher={name}", "hydra.sweep.dir=sweep", "hydra.job.name=train", *overrides]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("train", overrides=asked, return_hydra_config=True)
    node = OmegaConf.masked_copy(config, ["hydra"]).hydra.launcher
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def test_slurm_is_another_name_of_submitit_slurm() -> None:
    assert launcher("slurm") == launcher("submitit_slurm")


def test_its_keys_are_those_of_the_plugin() -> None:
    config = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config")
    assert launcher("submitit_slurm").keys() <= vars(config.SlurmQueueConf()).keys()


def test_the_script_asks_for_a_signal_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    (tmp_path / "srun").write_text("#!/bin/sh\n")  # which submitit looks for, and never calls here
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    settings = launcher(
        "submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.tasks_per_node=8"
    )
    folder = settings.pop("submitit_folder")
    retries = settings.pop("max_num_timeout")
    settings.pop("_target_")
    executor = submitit.AutoExecutor(
        folder=tmp_path / folder, cluster="slurm", slurm_max_num_timeout=retries
    )
    general = ("name", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb",
               "timeout_min", "stderr_to_stdout")  # fmt: skip
    executor.update_parameters(
        **{k if k in general else f"slurm_{k}": v for k, v in settings.items()}
    )
    script = executor._executor._make_submission_file_text("the command", "id")
    for line in ("--signal=USR2@180", "--time=1440", "--partition=gpu", "--ntasks-per-node=8",
                 "--gpus-per-node=1", "--mem=64GB", "--cpus-per-task=8"):  # fmt: skip
        assert f"#SBATCH {line}" in script
    assert executor._executor.max_num_timeout == 100

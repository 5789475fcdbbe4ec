"""Arrows between the rooms of the package point down only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "powerflow_lit"
# room -> third-party packages and rooms that it must never import
HEAVY = {"torch", "lightning", "transformers", "vllm"}
FORBIDDEN = {
    "mendable.py": {*HEAVY, "hydra", "omegaconf", "config"},
    "terminal.py": {*HEAVY, "hydra", "omegaconf", "config"},
    "run_folder.py": {*HEAVY, "hydra", "omegaconf"},
    "continuing.py": {*HEAVY, "hydra", "models"},
    "preflight.py": {"lightning", "transformers", "vllm", "assembly", "module", "datamodule",
                     "training"},
    "train.py": HEAVY,
    "evaluate.py": HEAVY,
    "pretrain.py": {"lightning", "transformers", "vllm", "rollout"},
    "prepare_data.py": {*HEAVY, "datasets"},
    "types.py": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config"},
    "objectives": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config", "models",
                   "rollout", "tasks", "module", "datamodule"},
    "rewards": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config", "models",
                "rollout", "tasks", "objectives", "module", "datamodule"},
    "metrics": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config", "models",
                "rollout", "tasks", "module", "datamodule"},
    "corpora": {"torch", "numpy", "lightning", "hydra", "omegaconf", "transformers", "vllm",
                "config", "models", "rollout", "tasks", "metrics"},
    "config": {"torch", "lightning", "transformers", "vllm", "models", "rollout", "tasks",
               "objectives", "metrics", "module", "datamodule"},
    "models": {"lightning", "hydra", "omegaconf", "vllm", "rollout", "module", "datamodule",
               "tasks", "objectives", "config"},
    "tasks": {"lightning", "hydra", "omegaconf", "vllm", "models", "module", "rollout", "config"},
    "judging": {"lightning", "hydra", "omegaconf", "vllm", "transformers", "models", "rollout",
                "module", "datamodule", "config", "objectives", "assembly", "evaluate"},
    "rollout": {"lightning", "hydra", "omegaconf", "objectives", "module", "datamodule", "tasks",
                "config"},
    "rollout/vllm_server_guard.py": {*HEAVY, "powerflow_lit", "rollout", "models", "config"},
    "module.py": {"hydra", "omegaconf", "config"},
    "optimized_module.py": {"hydra", "omegaconf", "config", "vllm", "rollout", "tasks", "module",
                            "datamodule"},
    "dual.py": {*HEAVY, "hydra", "omegaconf", "config", "objectives", "module", "datamodule"},
    "fresh.py": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config", "models",
                 "rollout", "tasks", "module", "datamodule"},
    "automatic_alpha.py": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config",
                           "models", "rollout", "tasks", "module", "datamodule"},
    "steering.py": {"hydra", "omegaconf", "config", "vllm", "monitor"},
    "devices.py": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "rollout", "module",
                   "datamodule"},
    "datamodule.py": {"hydra", "omegaconf", "config"},
    "rewarding.py": {"hydra", "omegaconf", "config", "vllm", "lightning", "transformers",
                     "datamodule", "callbacks"},
    "scoring.py": {"hydra", "omegaconf", "config", "vllm", "datamodule", "callbacks"},
    "trajectories.py": {"lightning", "hydra", "omegaconf", "vllm", "config", "objectives", "module",
                        "datamodule", "callbacks"},
    "ranks.py": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config", "models",
                 "rollout", "tasks", "objectives", "module", "datamodule"},
    "diverged.py": {"torch", "lightning", "hydra", "omegaconf", "transformers", "vllm", "config",
                    "models", "rollout", "tasks", "objectives", "module", "datamodule"},
    "health.py": {"hydra", "omegaconf", "config", "vllm", "monitor"},
    "callbacks.py": {"hydra", "omegaconf", "config"},
    "checkpoints.py": {"hydra", "omegaconf", "config"},
    "shard_files.py": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config",
                       "models", "rollout", "tasks", "module", "datamodule"},
    "fully_sharded.py": {"hydra", "omegaconf", "transformers", "vllm", "config", "rollout",
                         "tasks", "module", "datamodule"},
    "blocks.py": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config", "models",
                  "rollout", "tasks", "metrics", "objectives", "module", "datamodule"},
    "flow.py": {"hydra", "omegaconf", "config", "lightning", "rollout", "tasks", "module",
                "datamodule"},
    "enumerable.py": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config", "models",
                      "rollout", "tasks", "metrics", "objectives", "module", "datamodule", "log_z"},
    "enumerable_training.py": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config",
                               "models",
                      "rollout", "tasks", "metrics", "module", "datamodule", "log_z"},
    "monitor.py": {"hydra", "omegaconf", "config"},
    "length_control.py": {"lightning", "hydra", "omegaconf", "transformers", "vllm", "config",
                          "models", "rollout", "tasks", "module", "datamodule"},
    "log_z.py": {"hydra", "omegaconf", "config", "lightning"},
    "precision.py": {"hydra", "omegaconf", "config", "transformers", "vllm"},
    "export.py": {"hydra", "omegaconf", "config", "lightning", "vllm"},
    "dashboard.py": {"torch", "models", "rollout", "module", "datamodule", "callbacks"},
    "wandb_login.py": {"torch", "lightning", "models", "config"},
    "samplers": {"lightning", "hydra", "omegaconf", "vllm", "config", "module", "datamodule",
                 "callbacks", "objectives", "evaluating"},
    "evaluating": {"lightning", "hydra", "omegaconf", "vllm", "module", "datamodule", "callbacks",
                   "objectives", "rollout"},
    "published": {"torch", "numpy", "lightning", "hydra", "omegaconf", "transformers", "vllm",
                  "config", "models", "rollout", "tasks", "metrics", "module", "datamodule"},
    "report.py": {"torch", "models", "rollout", "module", "datamodule", "transformers",
                  "lightning", "vllm", "run_folder", "resume"},
    "reporting": {"torch", "models", "rollout", "module", "datamodule", "transformers",
                  "lightning", "vllm", "run_folder", "resume", "hydra", "report"},
}  # fmt: skip


def files_of(room: str) -> list[Path]:
    path = PACKAGE / room
    return [path] if path.is_file() else sorted(path.glob("**/*.py"))


def imported(path: Path) -> set[str]:
    """Top-level packages, and rooms of our own without the package's name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            parts = module.split(".")
            names.add(parts[1] if parts[0] == "powerflow_lit" and len(parts) > 1 else parts[0])
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    files = files_of(room)
    assert files, room
    for path in files:
        assert not imported(path) & FORBIDDEN[room], path


def test_few_files_import_vllm() -> None:
    """The engine in process; the transfer of weights from GPU to GPU; what runs in a server."""
    users = [p.name for p in PACKAGE.glob("**/*.py") if "vllm" in imported(p) - {"rollout"}]
    assert sorted(users) == ["vllm_engine.py", "vllm_server_weights.py", "vllm_server_worker.py"]


def test_no_source_file_is_longer_than_400_lines() -> None:
    long = [p.name for p in PACKAGE.glob("**/*.py") if len(p.read_text().splitlines()) > 400]
    assert long == []

"""Finding what a run can be resumed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel

from powerflow_lit.assembly import lora_settings
from powerflow_lit.config.checks import as_dict
from powerflow_lit.config.identity import config_hash
from powerflow_lit.config.schema import FinetuneConfig, TrainConfig
from powerflow_lit.config.secrets import hidden
from powerflow_lit.models.base import round_weights
from powerflow_lit.models.lora import add_lora, plain_copy
from powerflow_lit.precision import HALF
from powerflow_lit.run_folder import read_summary
from powerflow_lit.sweep import ENDED


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint and how far it had come."""

    path: Path
    progress: tuple[int, int]  # optimizer updates, refills


def checkpoint_of(run_dir: Path) -> ResumePoint | None:
    """The last checkpoint of a run folder, or None if the run had not come that far."""
    path = run_dir / "checkpoints" / "last.ckpt"
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    return ResumePoint(path, (state["global_step"], state["epoch"] + 1))


def load_policy(model: PreTrainedModel, run_dir: Path) -> PreTrainedModel:
    """A run's policy from its last checkpoint, for a run that has not exported yet.

    `model` is what the run started from; an adapter is merged into it.
    """
    path = run_dir / "checkpoints" / "last.ckpt"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    weights = {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    tuned = saved.get("finetune", {})
    if tuned.get("kind") != "lora":
        model.load_state_dict(weights)
        return model
    half = HALF.get(str(saved["trainer"].get("precision")))
    if half is not None:  # as the frozen weights were in training
        round_weights(model, half)
    add_lora(model, lora_settings(FinetuneConfig(**tuned)))
    model.load_state_dict(weights, strict=False)
    return plain_copy(model)


def expand_resume(arguments: Sequence[str]) -> list[str]:
    """`resume=<run folder>` brings along what was typed for that run, and its folder.

    Raises:
        SystemExit: the folder is not a run's.
    """
    arguments = list(arguments)
    chosen = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if not chosen or chosen[-1] in ("auto", "null", ""):
        return arguments
    typed = Path(chosen[-1]) / "overrides.yaml"
    if not typed.exists():
        raise SystemExit(f"error: resume={chosen[-1]}: no run folder there (no overrides.yaml)")
    before = [a for a in yaml.safe_load(typed.read_text()) if not a.startswith("run_dir=")]
    return [*before, f"run_dir={chosen[-1]}", *arguments]


def find_unfinished(config: TrainConfig) -> Path | None:
    """For `resume=auto`: the given run_dir if it holds a run, else the newest unfinished twin."""
    given = Path(config.run_dir)
    if (given / "config.yaml").exists():
        return given
    wanted = config_hash(hidden(as_dict(config)))  # as it stands in config.yaml
    twins = [
        path.parent
        # alpha=4 and alpha=4.0 are spelt apart in the folder above
        for path in given.parent.parent.glob("*/*/config.yaml")
        if config_hash(yaml.safe_load(path.read_text())) == wanted
        and (read_summary(path.parent) or {}).get("status") not in ENDED
    ]
    return max(twins, key=lambda folder: folder.stat().st_mtime, default=None)

"""Finding what a run can be resumed from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel

from powerflow_lit.assembly import lora_settings
from powerflow_lit.config.schema import FinetuneConfig
from powerflow_lit.models.base import round_weights
from powerflow_lit.models.lora import add_lora, plain_copy
from powerflow_lit.precision import HALF


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

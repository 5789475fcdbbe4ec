"""Finding what a run can be resumed from, and refusing what it cannot."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
import yaml
from transformers import PreTrainedModel

from powerflow_lit import __version__
from powerflow_lit.assembly import BY_PROGRESS, lora_settings
from powerflow_lit.checkpoints import GOOD, LAST, PREVIOUS
from powerflow_lit.config.checks import as_dict
from powerflow_lit.config.schema import FinetuneConfig, TrainConfig
from powerflow_lit.config.secrets import hidden
from powerflow_lit.mendable import MendableError
from powerflow_lit.models.base import round_weights
from powerflow_lit.models.lora import add_lora, plain_copy
from powerflow_lit.precision import HALF
from powerflow_lit.shard_files import what_is_missing, whole_weights

# what must be the same on resume, and what is said where it differs
IDENTITY = {
    "alpha": "alpha was {}, now {}",
    "alpha_schedule": "alpha_schedule was {}, now {}",
    "strategy": "strategy was {}, now {}",
    "finetune": "finetune was {}, now {}",
    "log_z": "log_z was {}, now {}",
    "length_control": "the chosen length was {}, now {}",
    "ranks": "it ran on {} ranks, now {}",
    "vocabulary": "the tokenizer's vocabulary differs (fingerprint {}, now {})",
    "weights": "the base model differs (fingerprint of its weights {}, now {})",
}


class CheckpointError(MendableError, ValueError):
    """A run cannot be continued; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that can be read, and how far it had come."""

    path: Path
    updates: int
    refills: int  # whole ones
    identity: Mapping[str, Any]  # see IDENTITY
    damaged: tuple[Path, ...] = ()  # newer ones, which cannot be read


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds. Nothing in it is ever run (`weights_only=True`).

    Raises:
        CheckpointError: it is cut short, altered, holds code, or is none of ours.
    """
    try:
        with ZipFile(path) as parts:
            altered = parts.testzip()  # torch does not look at its checksums
        if altered is not None:
            raise CheckpointError(f"{path} is damaged: {altered} in it was altered")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as error:  # damage comes as an error of zip, pickle, torch or of a codec
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(f"{path} holds code, {found[1]}, which is never run") from error
        raise CheckpointError(f"{path} is damaged: {_first(error)}") from error
    if not isinstance(state, dict) or not {"run", "powerflow", "state_dict"} <= state.keys():
        raise CheckpointError(f"{path} is no checkpoint of powerflow_lit {__version__}")
    if missing := what_is_missing(path, state):
        raise CheckpointError(f"{path} is damaged: {missing}")
    return state


def checkpoint_of(run_dir: Path) -> ResumePoint | None:
    """The newest checkpoint of a run folder that can be read; None if there is none at all.

    Raises:
        CheckpointError: there are some, and none can be read.
    """
    newest = _newest(run_dir)
    if newest is None:
        return None
    path, state, damaged = newest
    run = state["run"]
    return ResumePoint(path, run["updates"], run["refills"], run["identity"], tuple(damaged))


def point_at(path: Path) -> ResumePoint:
    """A checkpoint that another rank has found whole; only its record is looked at here."""
    run = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["run"]
    return ResumePoint(path, run["updates"], run["refills"], run["identity"])


def _newest(run_dir: Path) -> tuple[Path, dict[str, Any], list[Path]] | None:
    """The file, what it holds, and newer files that cannot be read, each of which is named."""
    wrong: list[CheckpointError] = []
    damaged: list[Path] = []
    for name in (LAST, PREVIOUS, GOOD):
        path = run_dir / "checkpoints" / name
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path)
        except CheckpointError as error:
            wrong.append(error)
            damaged.append(path)
            continue
        for reason in wrong:
            print(f"warning: {reason}; going on from {name}", file=sys.stderr)
        return path, state, damaged
    if wrong:
        raise CheckpointError(
            "; ".join(map(str, wrong)) + f"; to begin anew: remove {run_dir / 'checkpoints'}"
        )
    return None


def refuse_another(point: ResumePoint, now: Mapping[str, Any], *, force: bool) -> None:
    """Refuse to continue with another model, vocabulary, alpha or strategy.

    Args:
        now: of the run that is to continue, by the names of IDENTITY; it may hold some only.
        force: warn of it instead.

    Raises:
        CheckpointError: names what differs, and its two values.
    """
    # what a checkpoint did not say when there was no other
    silent = {"ranks": 1, "alpha_schedule": BY_PROGRESS, "length_control": "none"}
    before = {**silent, **point.identity}
    differ = [
        IDENTITY[name].format(before.get(name), value)
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differ and force:
        print(f"warning: resume_force=true: {'; '.join(differ)}", file=sys.stderr)
    elif differ:
        raise CheckpointError(
            f"{point.path} is of another run: {'; '.join(differ)}. Start a new run_dir, or add "
            "resume_force=true to go on all the same"
        )


def set_damaged_aside(point: ResumePoint) -> None:
    """Rename what cannot be read, so that it never takes the place of a good checkpoint."""
    for path in point.damaged:
        os.replace(path, path.with_name(path.name + ".damaged"))


def changed_settings(run_dir: Path, config: TrainConfig) -> list[str]:
    """What the run is now told that it was not told before, as `key: before -> now`."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return []
    before, now = _flat(yaml.safe_load(path.read_text())), _flat(hidden(as_dict(config)))
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in ("run_dir", "resume", "resume_force")
    ]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items())
    return {key: value for part in parts for key, value in part.items()}


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_policy(model: PreTrainedModel, run_dir: Path) -> PreTrainedModel:
    """A run's policy from its newest checkpoint, for a run that has not exported yet.

    `model` is what the run started from; an adapter is merged into it.

    Raises:
        CheckpointError: there is none that can be read.
    """
    newest = _newest(run_dir)
    if newest is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet")
    try:
        state = whole_weights(newest[0], newest[1])
    except Exception as error:  # as of `read_checkpoint`
        raise CheckpointError(_first(error)) from error
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

"""What makes two configurations the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

# what may differ between a run and its continuation
NOT_IDENTITY = (
    "run_dir", "resume", "resume_force", "study", "logger", "callbacks", "logit_chunk_mb",
    "device",
)  # fmt: skip
# a sweep's job is also known by how it is evaluated
NOT_JOB_IDENTITY = (
    "run_dir", "resume", "resume_force", "study", "logger", "hydra",
    "tokens_per_microbatch", "logit_chunk_mb", "device",
)  # fmt: skip
# neither does any of these change a result beyond rounding
NOT_JOB_IDENTITY_BELOW = {
    "model": (
        "packing", "threads", "gradient_checkpointing", "memory_check", "estimate_only",
        "paper_name",
    ),
    "rollout": ("logp_gap_limit", "logp_gap_trajectories"),
    "callbacks": ("console", "export", "export_dtype", "push_to_hub", "push_private",
                  "checkpoint", "samples", "stop_signals"),
}  # fmt: skip


def config_hash(config: Mapping[str, Any], without: tuple[str, ...] = NOT_IDENTITY) -> str:
    """Equal for runs that would do the same, whatever their folder and logging."""
    identity = {k: v for k, v in config.items() if k not in without}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def job_hash(*, _root_: DictConfig) -> str:
    """The resolver behind `${job_hash:}`, which keys the folders of a sweep."""
    plain: dict[str, Any] = {}
    for key in _root_:
        if key not in NOT_JOB_IDENTITY:
            value = None if OmegaConf.is_missing(_root_, key) else _root_[key]
            is_node = OmegaConf.is_config(value)
            plain[str(key)] = OmegaConf.to_container(value, resolve=True) if is_node else value
    for group, names in NOT_JOB_IDENTITY_BELOW.items():
        plain[group] = {k: v for k, v in plain[group].items() if k not in names}
    return config_hash(_floats(plain), without=())[:8]


def _floats(value: Any) -> Any:
    """The same with every whole number as a float: alpha=4 and alpha=4.0 are one job."""
    if isinstance(value, dict):
        return {k: _floats(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_floats(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

"""What makes two configurations the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

# what may differ between a run and its continuation
NOT_IDENTITY = ("run_dir", "resume", "study", "logger", "callbacks")
# a sweep's job is also known by how it is evaluated
NOT_JOB_IDENTITY = ("run_dir", "resume", "study", "logger", "hydra")


def config_hash(config: Mapping[str, Any], without: tuple[str, ...] = NOT_IDENTITY) -> str:
    """Equal for runs that would do the same, whatever their folder and logging."""
    identity = {k: v for k, v in config.items() if k not in without}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def job_hash(*, _root_: DictConfig) -> str:
    """The resolver behind `${job_hash:}`, which keys the folders of a sweep."""
    plain = {}
    for key in _root_:
        if key not in NOT_JOB_IDENTITY:
            value = None if OmegaConf.is_missing(_root_, key) else _root_[key]
            is_node = OmegaConf.is_config(value)
            plain[str(key)] = OmegaConf.to_container(value, resolve=True) if is_node else value
    return config_hash(plain, without=())[:8]


def register_resolvers() -> None:
    """Make `${job_hash:}` known to OmegaConf; safe to call again."""
    OmegaConf.register_new_resolver("job_hash", job_hash, replace=True)

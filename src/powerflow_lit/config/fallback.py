"""Without vLLM a run falls back to the portable engine, and says so."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from powerflow_lit.config import conf_dir


def with_available_engine(cfg: DictConfig) -> DictConfig:
    """The configuration with `rollout=hf`'s engine where vLLM is chosen but not installed."""
    chosen = str(OmegaConf.select(cfg, "rollout.engine._target_", default=""))
    if not chosen.endswith("VllmEngine") or find_spec("vllm") is not None:
        return cfg
    print(
        "vLLM is not installed: rollouts come from transformers (rollout=hf), which is slower. "
        "Install it with `make install`, or `pip install .[vllm]` on a CUDA machine.",
        file=sys.stderr,
    )
    portable = OmegaConf.load(Path(conf_dir()) / "rollout" / "hf.yaml")
    with open_dict(cfg):
        cfg.rollout.engine = portable.engine
    return cfg

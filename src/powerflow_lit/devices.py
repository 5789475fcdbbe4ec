"""The device that a run is planned for: the one that is here, or one of conf/device/."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from powerflow_lit.config.schema import DeviceConfig
from powerflow_lit.models.planning import Speeds
from powerflow_lit.models.workload import Spread

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
SHARDED = ("fsdp", "sharded", "modelparallel")  # in a strategy's name, lower case


@dataclass(frozen=True)
class Device:
    """Where a run will compute."""

    name: str
    free: int  # bytes that it can still give
    total: int
    is_gpu: bool


def device(accelerator: str) -> Device:
    """The device of `trainer.accelerator`, as Lightning will choose it."""
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(0)
        name = f"{torch.cuda.get_device_name(0)} ({total / GIB:.0f} GiB)"
        return Device(name, free, total, is_gpu=True)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this machine's memory", _free_ram(total), total, is_gpu=False)


def planned_device(config: DeviceConfig) -> Device | None:
    """The one of a `device=` choice; None for the one that is here."""
    if config.memory_gib is None:
        return None
    total = int(config.memory_gib * GIB)
    name = f"{config.name} ({config.memory_gib:g} GiB)"
    return Device(name, total - int(config.reserved_gib * GIB), total, is_gpu=True)


def speeds_of(config: DeviceConfig) -> Speeds | None:
    """What times are reckoned with; None where a peak is not known."""
    peaks = (
        config.tflops_16,
        config.tflops_32,
        config.memory_gb_s,
        config.link_gb_s,
        config.network_gb_s,
    )
    if None in peaks:
        return None
    flops_16, flops_32, memory, link, network = (float(peak or 0) for peak in peaks)
    return Speeds(
        flops_16=flops_16 * 1e12,
        flops_32=flops_32 * 1e12,
        memory=memory * 1e9,
        link=link * 1e9,
        network=network * 1e9,
        compute_share=config.compute_share,
        memory_share=config.memory_share,
        link_share=config.link_share,
        decode_step_s=config.decode_step_ms / 1000,
    )


def spread_of(trainer: Mapping[str, Any]) -> Spread:
    """How many devices a `trainer=` choice takes, and how it divides the model among them."""
    chosen = trainer.get("devices", "auto")
    if isinstance(chosen, str) and chosen.lstrip("-").isdigit():
        chosen = int(chosen)
    if isinstance(chosen, int) and chosen > 0:
        here = chosen
    elif isinstance(chosen, list):
        here = len(chosen)
    elif isinstance(chosen, str) and "," in chosen:
        here = len([part for part in chosen.split(",") if part.strip()])
    else:  # auto and -1
        on_gpus = trainer.get("accelerator", "auto") in ("gpu", "cuda", "auto")
        here = max(torch.cuda.device_count(), 1) if on_gpus else 1
    devices = here * int(trainer.get("num_nodes") or 1)
    strategy: Any = trainer.get("strategy") or "auto"
    node = strategy if isinstance(strategy, Mapping) else {"_target_": strategy}
    sharded = any(word in str(node.get("_target_")).lower() for word in SHARDED)
    in_place = bool(node.get("gradient_as_bucket_view"))
    return Spread(
        devices=devices,
        per_machine=here,
        shards=devices if sharded else 1,
        bucketed=devices > 1 and not sharded and not in_place,
    )


def _free_ram(free: int) -> int:
    """Bytes that are free, or hold what can be dropped, within the limit of a container."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cache = dict(x.split() for x in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cache["inactive_file"]))
    except (OSError, ValueError, KeyError):
        pass  # no container, or one without a limit ("max")
    return free

"""Before any weight is loaded: does the run fit its device? The table, the line, the refusal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.table import Table
from transformers import PretrainedConfig

from powerflow_lit.assembly import lora_settings
from powerflow_lit.config import conf_dir
from powerflow_lit.config.schema import FinetuneConfig, TrainConfig
from powerflow_lit.console import wide_console
from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.loading import load_config
from powerflow_lit.models.memory import (
    EngineMemory,
    Estimate,
    Workload,
    architecture,
    estimate,
    needed,
    remedies,
)
from powerflow_lit.precision import HALF

GIB = 2**30
TIGHT = 0.5  # share of the free memory above which a person should see the whole table
CGROUP = Path("/sys/fs/cgroup")


def check_memory(config: TrainConfig) -> None:
    """Print what the run will need: in full where it is asked for or tight, else in a line.

    Raises:
        ModelError: the architecture cannot be read; the run cannot fit its device, with what would
            make it fit.
    """
    model, on = config.model, device(str(config.trainer.get("accelerator", "auto")))
    shape = load_config(
        model.path, trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    work = workload(config, on)
    found = estimate(
        architecture(shape, work.lora, trust_remote_code=model.trust_remote_code), work
    )
    need = needed(found, work, on.total)
    if model.estimate_only or need > TIGHT * on.free:
        share = need - found.total
        wide_console().print(memory_table(found, need, share, on))
    else:
        print(
            f"memory: about {need / GIB:.1f} GiB of {on.free / GIB:.1f} GiB free "
            "(model.estimate_only=true says of what)"
        )
    if need <= on.free:
        return
    refused = refusal(need, on, _remedies(config, shape, work, on))
    if model.estimate_only:
        print(f"It does not fit: {refused}")
    elif model.memory_check:
        raise ModelError(refused)


def workload(config: TrainConfig, on: Device) -> Workload:
    """What of the configuration its memory depends on."""
    model, rollout = config.model, config.rollout
    lora = config.finetune.kind == "lora"
    rounded = HALF.get(str(config.trainer.get("precision")))
    half = None if rounded is None else str(rounded).removeprefix("torch.")
    groups = config.buffer.prompts_per_update
    if groups is None:
        groups = rollout.prompts_per_refill // config.buffer.updates_per_refill
    return Workload(
        dtype=half or model.dtype,
        base_dtype=None if lora else half or model.base_dtype,
        lora=lora_settings(config.finetune) if lora else None,
        autocast=str(config.trainer.get("precision")).endswith("-mixed"),
        gradient_checkpointing=model.gradient_checkpointing,
        tokens_per_microbatch=config.tokens_per_microbatch,
        longest_row=rollout.max_prompt_tokens + rollout.max_new_tokens,
        longest_response=rollout.max_new_tokens,
        rows_per_update=max(groups * rollout.samples_per_prompt, 1),
        logit_chunk_mb=config.logit_chunk_mb,
        head_width=config.log_z.get("width"),
        engine=_engine(config, half or model.dtype, on),
    )


def _engine(config: TrainConfig, policy_dtype: str, on: Device) -> EngineMemory:
    engine = config.rollout.engine
    is_vllm = str(engine.get("_target_", "")).endswith(("VllmEngine", "VllmServerEngine"))
    return EngineMemory(
        name="vllm" if is_vllm else "hf",
        dtype=str(engine["dtype"]) if is_vllm else policy_dtype,
        sequences=int(engine["max_num_seqs" if is_vllm else "sequences_per_batch"]),
        kv_cache_bytes=int(engine["kv_cache_gb"]) * GIB if is_vllm else None,
        device_share=float(engine["gpu_memory_utilization"]) if is_vllm and on.is_gpu else None,
    )


def _remedies(
    config: TrainConfig, shape: PretrainedConfig, work: Workload, on: Device
) -> list[tuple[str, int]]:
    shipped = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "finetune" / "lora.yaml"))
    adapter = lora_settings(FinetuneConfig(**shipped))  # type: ignore[arg-type]
    trusted = config.model.trust_remote_code
    return remedies(shape, work, adapter, on.total, trust_remote_code=trusted)


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


def memory_table(found: Estimate, need: int, engine_share: int, on: Device) -> Table:
    """The estimate line by line, GiB."""
    table = Table(title="memory of this run, GiB (estimated)", title_justify="left")
    for column in ("what", "GiB", "how", "when"):
        table.add_column(column, justify="right" if column == "GiB" else "left")
    for item in found.items:
        table.add_row(item.name, f"{item.size / GIB:.2f}", item.how, item.phase)
    if engine_share:
        table.add_row("vllm engine", f"{engine_share / GIB:.2f}", "its share of the GPU", "always")
    table.add_section()
    table.add_row("needed at the peak", f"{need / GIB:.2f}", "update or rollout, the larger", "")
    table.add_row("free", f"{on.free / GIB:.2f}", on.name, "")
    return table


def refusal(need: int, on: Device, remedies: list[tuple[str, int]]) -> str:
    """Why a run cannot fit, and what would help: the most effective first."""
    advice = ", ".join(f"{name} ({size / GIB:.1f} GiB)" for name, size in remedies)
    return (
        f"this run needs about {need / GIB:.1f} GiB and {on.name} has {on.free / GIB:.1f} GiB "
        f"free. What would help, with what it would then need: {advice or 'a smaller model'}; "
        "model.estimate_only=true shows the estimate, model.memory_check=false starts regardless"
    )

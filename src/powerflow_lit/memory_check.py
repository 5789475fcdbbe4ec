"""Before any weight is loaded: does the run fit its devices, and how long would it take?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf
from rich.table import Table
from transformers import PretrainedConfig

from powerflow_lit.assembly import lora_settings
from powerflow_lit.config import conf_dir
from powerflow_lit.config.schema import FinetuneConfig, TrainConfig
from powerflow_lit.console import wide_console
from powerflow_lit.devices import GIB, Device, device, planned_device, speeds_of, spread_of
from powerflow_lit.models.architecture import Architecture, architecture
from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.loading import load_config
from powerflow_lit.models.memory import MOMENTS, Estimate, engine_room, estimate, remedies
from powerflow_lit.models.planning import Plan, plan
from powerflow_lit.models.workload import EngineNeeds, Workload
from powerflow_lit.precision import HALF

TIGHT = 0.5  # share of the free memory above which a person should see the whole table


def check_memory(config: TrainConfig) -> None:
    """Print what the run will need: in full where it is asked for or tight, else in a line.

    With `model.estimate_only=true` it is planned for the device of `device=`, with the time that a
    refill would take there.

    Raises:
        ModelError: the architecture cannot be read; the run cannot fit its device, with what would
            make it fit.
    """
    model = config.model
    planned = planned_device(config.device) if model.estimate_only else None
    on = planned or device(str(config.trainer.get("accelerator", "auto")))
    shape = load_config(
        model.path, trust_remote_code=model.trust_remote_code, revision=model.revision
    )
    work = workload(config, on)
    sizes = architecture(shape, work.lora, trust_remote_code=model.trust_remote_code)
    found = estimate(sizes, work)
    need = found.total
    if model.estimate_only or need > TIGHT * on.free:
        wide_console().print(memory_table(found, on, work.spread.devices))
    else:
        print(
            f"memory: about {need / GIB:.1f} GiB of {on.free / GIB:.1f} GiB free "
            "(model.estimate_only=true says of what)"
        )
    if model.estimate_only:
        _print_times(config, sizes, work)
    refused = engine_refusal(sizes, work, config) if on.is_gpu else None
    if refused is None and need > on.free:
        refused = refusal(need, on, _remedies(config, shape, work))
    if refused is not None and model.estimate_only:
        print(f"It does not fit: {refused}")
    elif refused is not None and model.memory_check:
        raise ModelError(refused)


def _print_times(config: TrainConfig, sizes: Architecture, work: Workload) -> None:
    speeds = speeds_of(config.device)
    if speeds is None:
        print(
            "no times: the speeds of this device are not known; name one, as in device=h100 "
            "(conf/device/)"
        )
        return
    reckoned = plan(sizes, work, speeds)
    wide_console().print(time_table(reckoned, config.refills))


def workload(config: TrainConfig, on: Device) -> Workload:
    """What of the configuration memory and time of one device depend on."""
    model, rollout = config.model, config.rollout
    lora = config.finetune.kind == "lora"
    rounded = HALF.get(str(config.trainer.get("precision")))
    half = None if rounded is None else str(rounded).removeprefix("torch.")
    groups = config.buffer.prompts_per_update
    if groups is None:
        groups = rollout.prompts_per_refill // config.buffer.updates_per_refill
    spread = spread_of(config.trainer)
    engine = _engine(config, half or model.dtype, on)
    return Workload(
        dtype=half or model.dtype,
        base_dtype=None if lora else half or model.base_dtype,
        lora=lora_settings(config.finetune) if lora else None,
        autocast=str(config.trainer.get("precision")).endswith("-mixed"),
        gradient_checkpointing=model.gradient_checkpointing,
        packing=model.packing,
        tokens_per_microbatch=config.tokens_per_microbatch,
        longest_prompt=rollout.max_prompt_tokens,
        longest_response=rollout.max_new_tokens,
        groups_per_refill=max(math.ceil(rollout.prompts_per_refill / spread.devices), 1),
        groups_per_update=max(math.ceil(groups / spread.devices), 1),
        samples_per_prompt=rollout.samples_per_prompt,
        updates_per_refill=config.buffer.updates_per_refill,
        scorings=_scorings(config, engine),
        logit_chunk_mb=config.logit_chunk_mb,
        head_width=config.log_z.get("width"),
        engine=engine,
        spread=spread,
    )


def _scorings(config: TrainConfig, engine: EngineNeeds) -> int:
    """Passes over a refill that score it: the base's, and the policy's where `log_p_old` is its.

    `auto` is reckoned as the policy's with a 16-bit engine, whose log-probs are too coarse.
    """
    chosen = config.buffer.log_p_old
    if chosen == "trainer":
        return 2
    weight = config.strategy.objective.get("weight")
    kind = weight.get("kind", "none") if isinstance(weight, Mapping) else "none"
    used = kind != "none" or config.buffer.max_staleness > 0
    coarse = engine.name == "hf" or engine.dtype != "float32"
    return 2 if chosen == "auto" and used and coarse and not config.rollout.overlap else 1


def _engine(config: TrainConfig, policy_dtype: str, on: Device) -> EngineNeeds:
    engine = config.rollout.engine
    target = str(engine.get("_target_", ""))
    is_vllm = target.endswith(("VllmEngine", "VllmServerEngine"))
    share = float(engine["gpu_memory_utilization"]) if is_vllm and on.is_gpu else None
    addresses, own = engine.get("addresses") or [], engine.get("devices") or []
    engines = len(addresses) or (int(engine["servers"]) if own else None)
    ranks = int(engine.get("tensor_parallel") or 1)
    return EngineNeeds(
        name="vllm" if is_vllm else "hf",
        dtype=str(engine["dtype"]) if is_vllm else policy_dtype,
        sequences=int(engine["max_num_seqs" if is_vllm else "sequences_per_batch"]),
        kv_cache_bytes=int(engine["kv_cache_gb"]) * GIB if is_vllm else None,
        share_bytes=None if share is None else int(share * on.total),
        sleeps=bool(engine.get("sleep")),
        tensor_parallel=max(len(own) // engines, 1) if engines else ranks,
        engines=engines,
    )


def _remedies(
    config: TrainConfig, shape: PretrainedConfig, work: Workload
) -> list[tuple[str, int]]:
    shipped = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "finetune" / "lora.yaml"))
    adapter = lora_settings(FinetuneConfig(**shipped))  # type: ignore[arg-type]
    return remedies(shape, work, adapter, trust_remote_code=config.model.trust_remote_code)


def memory_table(found: Estimate, on: Device, devices: int) -> Table:
    """The estimate line by line, GiB."""
    each = "" if devices == 1 else f", each of {devices} devices"
    table = Table(title=f"memory of this run, GiB (estimated{each})", title_justify="left")
    for column in ("what", "GiB", "how", "when"):
        table.add_column(column, justify="right" if column == "GiB" else "left")
    for item in found.items:
        table.add_row(item.name, f"{item.size / GIB:.2f}", item.how, item.phase)
    table.add_section()
    for moment in MOMENTS:
        table.add_row("in all", f"{found.at(moment) / GIB:.2f}", "", moment)
    table.add_section()
    table.add_row("needed at the peak", f"{found.total / GIB:.2f}", "the largest of these", "")
    table.add_row("free", f"{on.free / GIB:.2f}", on.name, "")
    return table


def time_table(reckoned: Plan, refills: int) -> Table:
    """The plan line by line, seconds."""
    table = Table(title="time of a refill, seconds (reckoned)", title_justify="left")
    for column in ("what", "s", "how"):
        table.add_column(column, justify="right" if column == "s" else "left")
    for cost in reckoned.costs:
        table.add_row(cost.name, f"{cost.seconds:.2f}", cost.how)
    table.add_section()
    seconds = reckoned.seconds
    rate = f"{reckoned.response_tokens / seconds:,.0f} response tokens a second"
    table.add_row("a refill", f"{seconds:.1f}", f"every response of the greatest length: {rate}")
    hours = seconds * refills / 3600
    table.add_row("the run", f"{seconds * refills:.0f}", f"{refills} refills: {hours:.1f} h")
    return table


def engine_refusal(sizes: Architecture, work: Workload, config: TrainConfig) -> str | None:
    """Why the engine's share of a GPU is too small for it; None where it is not."""
    room = engine_room(sizes, work)
    if room is None or room >= work.longest_row:
        return None
    share = config.rollout.engine.get("gpu_memory_utilization")
    return (
        f"the engine's share of each GPU (rollout.engine.gpu_memory_utilization={share:g}, "
        f"rollout.engine.tensor_parallel={work.engine.tensor_parallel}) holds its weights and "
        f"{max(room, 0)} tokens of cache, a row has {work.longest_row}: raise one of them"
    )


def refusal(need: int, on: Device, remedies: list[tuple[str, int]]) -> str:
    """Why a run cannot fit, and what would help: the most effective first."""
    advice = ", ".join(f"{name} ({size / GIB:.1f} GiB)" for name, size in remedies)
    return (
        f"this run needs about {need / GIB:.1f} GiB and {on.name} has {on.free / GIB:.1f} GiB "
        f"free. What would help, with what it would then need: {advice or 'a smaller model'}; "
        "model.estimate_only=true shows the estimate, model.memory_check=false starts regardless"
    )

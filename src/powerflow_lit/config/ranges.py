"""The range of every number and the options of every choice, one by one."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from powerflow_lit.config.alpha_schedules import check_schedule
from powerflow_lit.config.engines import check_engine_values
from powerflow_lit.config.rules import (
    ConfigError,
    at_least,
    check_numbers,
    is_ours,
    one_of,
    positive,
    require,
)
from powerflow_lit.config.schema import (
    DecodingConfig,
    DeviceConfig,
    EvaluateConfig,
    FinetuneConfig,
    LoggerConfig,
    ModelConfig,
    StrategyConfig,
    TrainConfig,
)

DTYPES = ("float32", "bfloat16", "float16")
ACCELERATORS = ("cpu", "gpu", "cuda", "mps", "tpu", "auto")
# what Lightning's Trainer takes
PRECISIONS = (
    "32-true", "32", "bf16-true", "bf16-mixed", "bf16", "16-true", "16-mixed", "16",
    "64-true", "64", "transformer-engine", "transformer-engine-float16",
)  # fmt: skip
LARGEST_SEED = 2**32 - 1  # numpy's
STATISTICS = ("length_mean",)  # of the first refill, for strategy.calibrate
# no process can take the other two
STOPPABLE = tuple(s.name for s in signal.Signals if s.name not in ("SIGKILL", "SIGSTOP"))
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# what the run itself gives to Lightning's Trainer, and where it is set
SET_BY_THE_RUN = {
    "max_epochs": "refills=",
    "max_steps": "refills=",
    "min_steps": "refills=",
    "max_time": "refills= (and stop a run by a signal: it is saved)",
    "limit_train_batches": "refills= and buffer.updates_per_refill=",
    "overfit_batches": "rollout.prompts_per_refill=",
    "fast_dev_run": "debug=fast",
    "min_epochs": "refills=",
    "callbacks": "callbacks=",
    "logger": "logger=",
    "default_root_dir": "run_dir=",
    "enable_checkpointing": "callbacks.checkpoint.every_n_refills=",
    "enable_progress_bar": "callbacks.console.every_n_refills=",
    "gradient_clip_val": "optimizer.grad_clip=",
    "gradient_clip_algorithm": "optimizer.grad_clip=",
    "accumulate_grad_batches": "buffer.prompts_per_update=",
    "reload_dataloaders_every_n_epochs": "nothing: a refill is an epoch",
    "num_sanity_val_steps": "nothing: there is no validation loop",
    "enable_model_summary": "nothing: it would list the frozen base",
    "use_distributed_sampler": "nothing: the buffer deals out the updates",
    "log_every_n_steps": "nothing: every update is logged",
}


def check_finite(node: Any, name: str = "") -> None:
    """Raises ConfigError where any number of the configuration is NaN or infinite."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            check_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for place, value in enumerate(node):
            check_finite(value, f"{name}[{place}]")
    elif isinstance(node, float) and not math.isfinite(node):
        raise ConfigError(f"{name}={node}: must be a finite number")


def check_train_ranges(config: TrainConfig) -> None:
    """Every value of a training run by itself."""
    _check_alpha(config.alpha)
    require(
        0 < config.epsilon < 1, f"epsilon={config.epsilon}: must lie in (0, 1), e.g. epsilon=0.2"
    )
    min_p = config.guard.min_p
    require(
        0 <= min_p < 1,
        f"guard.min_p={min_p}: must lie in [0, 1); 0 is no guard, guard=min_p takes 0.05",
    )
    evaluation = config.callbacks.evaluation
    _check_seeds({"seed": config.seed, "callbacks.evaluation.seed": evaluation.seed})
    check_model(config.model)
    psi = config.strategy.format_penalty
    require(psi <= 0, f"strategy.format_penalty={psi}: a penalty is 0 or negative")
    positive({"strategy.loss_scale": config.strategy.loss_scale})
    _check_calibrate(config.strategy.calibrate)
    _check_rollouts(config)
    _check_optimizer(config)
    _check_callbacks(config)
    _check_log_z(config.log_z)
    _check_blocks(config.strategy)
    check_schedule(config.alpha_schedule)
    _check_length_control(config.length_control)
    _check_trainer(config.trainer)
    _check_device(config.device)
    _check_logger(config.logger)


def check_evaluate_ranges(config: EvaluateConfig) -> None:
    """Every value of an evaluation by itself."""
    _check_alpha(config.alpha)
    _check_seeds({"seed": config.seed, "bootstrap.seed": config.bootstrap.seed})
    require(
        not config.model.estimate_only,
        "model.estimate_only=true: an estimate is made for training only (powerflow_lit.train)",
    )
    check_model(config.model)
    at_least(
        1,
        {
            "samples_per_prompt": config.samples_per_prompt,
            "rollout.max_new_tokens": config.rollout.max_new_tokens,
            "rollout.max_prompt_tokens": config.rollout.max_prompt_tokens,
            "tokens_per_microbatch": config.tokens_per_microbatch,
            "bootstrap.draws": config.bootstrap.draws,
        },
    )
    _check_chunk(config.logit_chunk_mb)
    check_engine_values(config.rollout.engine)
    level = config.bootstrap.level
    require(0 < level < 1, f"bootstrap.level={level}: must lie in (0, 1), e.g. 0.95")
    _check_decodings("decodings", config.decodings)


def check_model(model: ModelConfig) -> None:
    """The model's own values, without a look at its folder."""
    one_of("model.kind", model.kind, ("base", "instruct"))
    one_of("model.prompt_route", model.prompt_route, ("auto", "plain", "chat"))
    for name in ("dtype", "base_dtype", "engine_dtype"):
        one_of(f"model.{name}", getattr(model, name), DTYPES)
    require(bool(model.path.strip()), "model.path is empty: give a hub id or a folder")
    at_least(1, {"model.threads": model.threads})


def check_finetune(tuned: FinetuneConfig) -> None:
    """All weights or an adapter, and what belongs to either."""
    one_of("finetune", tuned.kind, ("full", "lora"))
    require(
        tuned.dropout == 0,
        f"finetune.dropout={tuned.dropout}: must be 0, since log-probs must be those of the "
        "sampled policy",
    )
    positive({"finetune.lr_factor": tuned.lr_factor})
    settings = {n: getattr(tuned, n) for n in ("rank", "lora_alpha", "target_modules")}
    given = {name: value for name, value in settings.items() if value is not None}
    if tuned.kind == "full":
        for name, value in given.items():
            raise ConfigError(f"finetune.{name}={value} needs finetune=lora")
        return
    for name in settings.keys() - given.keys():
        raise ConfigError(f"finetune.{name}=null: finetune=lora needs it")
    at_least(1, {"finetune.rank": tuned.rank})
    positive({"finetune.lora_alpha": tuned.lora_alpha or 0})


def _check_alpha(alpha: float) -> None:
    require(alpha > 0, f"alpha={alpha}: must be positive (1 is the identity)")


def _check_chunk(logit_chunk_mb: float) -> None:
    require(logit_chunk_mb > 0, f"logit_chunk_mb={logit_chunk_mb}: must be positive, in MB")


def _check_seeds(seeds: Mapping[str, int]) -> None:
    for name, seed in seeds.items():
        require(0 <= seed <= LARGEST_SEED, f"{name}={seed}: must lie in [0, {LARGEST_SEED}]")


def _check_calibrate(constants: Mapping[str, Any]) -> None:
    for name, value in constants.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            one_of(f"strategy.calibrate.{name}", value, STATISTICS)


def _check_rollouts(config: TrainConfig) -> None:
    rollout, buffer = config.rollout, config.buffer
    at_least(
        1,
        {
            "refills": config.refills,
            "rollout.prompts_per_refill": rollout.prompts_per_refill,
            "rollout.samples_per_prompt": rollout.samples_per_prompt,
            "rollout.max_new_tokens": rollout.max_new_tokens,
            "rollout.max_prompt_tokens": rollout.max_prompt_tokens,
            "rollout.logp_gap_trajectories": rollout.logp_gap_trajectories,
            "buffer.updates_per_refill": buffer.updates_per_refill,
            "buffer.prompts_per_update": buffer.prompts_per_update,
            "tokens_per_microbatch": config.tokens_per_microbatch,
        },
    )
    at_least(0, {"buffer.max_staleness": buffer.max_staleness})
    shares = {"rollout.base_share": rollout.base_share, "buffer.min_ess": buffer.min_ess}
    for name, share in shares.items():
        require(0 <= share < 1, f"{name}={share}: must lie in [0, 1); 0 switches it off")
    positive({"rollout.logp_gap_limit": rollout.logp_gap_limit})
    check_engine_values(rollout.engine)
    _check_chunk(config.logit_chunk_mb)
    one_of("buffer.log_p_old", buffer.log_p_old, ("auto", "engine", "trainer", "none"))


def _check_optimizer(config: TrainConfig) -> None:
    optimizer = config.optimizer
    names = ("lr", "log_z_lr", "grad_clip", "log_z_grad_clip")
    positive({f"optimizer.{name}": getattr(optimizer, name) for name in names})
    at_least(
        0,
        {
            "optimizer.weight_decay": optimizer.weight_decay,
            "optimizer.warmup_steps": optimizer.warmup_steps,
        },
    )
    at_least(1, {"optimizer.max_skipped_in_a_row": optimizer.max_skipped_in_a_row})
    betas = optimizer.betas
    require(
        len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        f"optimizer.betas={betas}: AdamW takes two in [0, 1), e.g. [0.9, 0.95]",
    )


def _check_callbacks(config: TrainConfig) -> None:
    chosen = config.callbacks
    at_least(
        1,
        {
            "callbacks.evaluation.samples_per_prompt": chosen.evaluation.samples_per_prompt,
            "callbacks.evaluation.max_prompts": chosen.evaluation.max_prompts,
            "callbacks.evaluation.every_n_refills": chosen.evaluation.every_n_refills,
            "callbacks.selfcheck.prompts": chosen.selfcheck.prompts,
            "callbacks.selfcheck.every_n_refills": chosen.selfcheck.every_n_refills,
            "callbacks.checkpoint.every_n_refills": chosen.checkpoint.every_n_refills,
            "callbacks.checkpoint.every_n_updates": chosen.checkpoint.every_n_updates,
            "callbacks.console.every_n_refills": chosen.console.every_n_refills,
        },
    )
    at_least(0, {"callbacks.samples.per_refill": chosen.samples.per_refill})
    for name in chosen.stop_signals:
        one_of("callbacks.stop_signals", name, STOPPABLE)
    _check_decodings("callbacks.evaluation.base_decodings", chosen.evaluation.base_decodings)
    if chosen.export_dtype is not None:
        one_of("callbacks.export_dtype", chosen.export_dtype, DTYPES)
    repo = chosen.push_to_hub
    if repo is not None:
        require(
            HUB_NAME.fullmatch(repo) is not None,
            f"callbacks.push_to_hub={repo}: must be <user>/<name>",
        )
        require(
            chosen.export,
            f"callbacks.push_to_hub={repo} needs callbacks.export=true: it uploads export/",
        )


def _check_decodings(key: str, decodings: Sequence[DecodingConfig]) -> None:
    for place, decoding in enumerate(decodings):
        name = f"{key}[{place}]"
        heat, top_p, min_p = decoding.temperature, decoding.top_p, decoding.min_p
        require(heat >= 0, f"{name}.temperature={heat}: must be 0 (greedy) or more")
        require(0 < top_p <= 1, f"{name}.top_p={top_p}: must lie in (0, 1]; 1 leaves nothing out")
        require(0 <= min_p < 1, f"{name}.min_p={min_p}: must lie in [0, 1); 0 leaves nothing out")


def _check_log_z(node: Mapping[str, Any]) -> None:
    """Options and ranges by the parameter's name; which there are is the class's to say."""
    if not is_ours(node):
        return
    options = {
        "source": ("policy", "base"), "pool": ("mean", "last"), "scope": ("global", "prompt"),
    }  # fmt: skip
    for name in options.keys() & node.keys():
        one_of(f"log_z.{name}", node[name], options[name])
    numbers = {n: node[n] for n in ("rate", "value", "width", "warmup_steps") if n in node}
    check_numbers("log_z", numbers, whole=("width", "warmup_steps"))
    rate = numbers.get("rate", 1)
    require(0 < rate <= 1, f"log_z.rate={rate}: must lie in (0, 1], the share of the newest value")
    at_least(1, {"log_z.width": numbers.get("width")})
    at_least(0, {"log_z.warmup_steps": numbers.get("warmup_steps")})


def _check_blocks(strategy: StrategyConfig) -> None:
    """Blocks of a whole number of tokens, and a head for the flow between them."""
    spread, flow = strategy.objective.get("spread"), strategy.flow
    size = spread.get("block_size") if isinstance(spread, Mapping) else None
    if size is not None:
        check_numbers("strategy.objective.spread", {"block_size": size}, whole=("block_size",))
        at_least(1, {"strategy.objective.spread.block_size": size})
        require(
            flow is not None,
            "strategy.flow=null with strategy.objective.spread.block_size: log V between the "
            "blocks must come from somewhere: take strategy=la_tb_blocks",
        )
    if flow is not None and is_ours(flow):
        check_numbers("strategy.flow", {"width": flow.get("width")}, whole=("width",))
        at_least(1, {"strategy.flow.width": flow.get("width")})


def _check_length_control(node: Mapping[str, Any]) -> None:
    """Ranges by the parameter's name, each of which our own class takes."""
    if not is_ours(node) or "scope" not in node:
        return
    group = "length_control"
    one_of(f"{group}.scope", node["scope"], ("global", "prompt"))
    tokens, bounds, longest = node.get("tokens"), node["bounds"], node["max_tokens"]
    names = ("factor", "follow", "rate", "max_step")
    numbers = {name: node[name] for name in names}
    check_numbers(group, {**numbers, **({} if tokens is None else {"tokens": tokens})})
    positive({f"{group}.{name}": numbers[name] for name in ("factor", "rate", "max_step")})
    follow = numbers["follow"]
    require(0 <= follow <= 1, f"{group}.follow={follow}: must lie in [0, 1]; 0 is dual ascent")
    require(
        tokens is None or 1 < tokens < longest,
        f"{group}.tokens={tokens}: must lie between 1 and rollout.max_new_tokens={longest}",
    )
    require(
        isinstance(bounds, list) and len(bounds) == 2,
        f"{group}.bounds={bounds}: must be two numbers, as in [-10, 10]",
    )
    check_numbers(f"{group}.bounds", {str(place): bound for place, bound in enumerate(bounds)})
    low, high = bounds
    require(low < high, f"{group}.bounds={bounds}: the first must be the lesser, as in [-10, 10]")


def _check_trainer(node: Mapping[str, Any]) -> None:
    for name in SET_BY_THE_RUN.keys() & node.keys():
        raise ConfigError(f"trainer.{name}: the run sets it itself; set {SET_BY_THE_RUN[name]}")
    if "accelerator" in node:
        one_of("trainer.accelerator", node["accelerator"], ACCELERATORS)
    if "precision" in node and node["precision"] is not None:
        one_of("trainer.precision", str(node["precision"]), PRECISIONS)
    devices = node.get("devices", "auto")
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    counted = isinstance(devices, int) and not isinstance(devices, bool)
    require(
        devices == "auto" or (counted and (devices >= 1 or devices == -1))
        or (isinstance(devices, list | str) and len(devices) > 0 and devices != "all"),
        f"trainer.devices={devices}: must be 1 or more, -1 or auto for all, or a list",
    )  # fmt: skip


def _check_device(device: DeviceConfig) -> None:
    """A device that is planned for."""
    numbers = {f"device.{name}": value for name, value in vars(device).items() if name != "name"}
    positive({n: v for n, v in numbers.items() if v is not None and n != "device.reserved_gib"})
    at_least(0, {"device.reserved_gib": device.reserved_gib})
    for name in ("compute_share", "memory_share", "link_share"):
        share = getattr(device, name)
        require(share <= 1, f"device.{name}={share}: must lie in (0, 1], a share of the peak")
    memory = device.memory_gib
    require(
        memory is None or device.reserved_gib < memory,
        f"device.reserved_gib={device.reserved_gib}: must be less than device.memory_gib={memory}",
    )


def _check_logger(logger: LoggerConfig) -> None:
    one_of("logger.mode", logger.mode, ("auto", "online", "offline"))
    bad = sorted(set(logger.project) & set("/\\#?%:"))
    require(
        bool(logger.project) and not bad,
        f"logger.project={logger.project}: W&B takes a name without {' '.join(bad or '/')}"
        + ("; the user or team is logger.entity=" if "/" in bad else ""),
    )

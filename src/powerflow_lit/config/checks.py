"""Refuses a wrong configuration in one line, before any model or engine loads."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from powerflow_lit.config.schema import EvaluateConfig, ModelConfig, TrainConfig

Schema = TypeVar("Schema")
UNSTOPPABLE = (signal.SIGKILL, signal.SIGSTOP)  # no process can take these
DTYPES = ("float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A configuration value that cannot work; the message names value, range and remedy."""


def typed(cfg: DictConfig, schema: type[Schema]) -> Schema:
    """The resolved configuration as a typed object.

    Raises:
        ConfigError: an unknown key (also one forced in with `+`), a wrong type, a missing value.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        return OmegaConf.to_object(  # type: ignore[return-value]
            OmegaConf.merge(OmegaConf.structured(schema), plain)
        )
    except ConfigKeyError as error:
        raise ConfigError(_unknown_key(error, schema)) from error
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or "configuration"
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error


def train_config(cfg: DictConfig) -> TrainConfig:
    """The checked configuration of a training run.

    Raises:
        ConfigError: see `typed`; also values out of range or in contradiction.
    """
    config = typed(cfg, TrainConfig)
    _check_ranges(config)
    _check_combinations(config)
    _check_finetune(config)
    _check_monitor(config)
    return config


def evaluate_config(cfg: DictConfig) -> EvaluateConfig:
    """The checked configuration of an evaluation.

    Raises:
        ConfigError: see `typed`; also values out of range.
    """
    config = typed(cfg, EvaluateConfig)
    _require(config.alpha > 0, f"alpha={config.alpha}: must be positive (1 is the identity)")
    _require(
        not config.model.estimate_only,
        "model.estimate_only=true: an estimate is made for training only (powerflow_lit.train)",
    )
    _check_model(config.model)
    at_least_one = {
        "samples_per_prompt": config.samples_per_prompt,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
        "rollout.max_prompt_tokens": config.rollout.max_prompt_tokens,
        "tokens_per_microbatch": config.tokens_per_microbatch,
        "bootstrap.draws": config.bootstrap.draws,
    }
    _check_sizes(at_least_one, config.logit_chunk_mb)
    level = config.bootstrap.level
    _require(0 < level < 1, f"bootstrap.level={level}: must lie in (0, 1), e.g. 0.95")
    for place, decoding in enumerate(config.decodings):
        key = f"decodings[{place}]"
        heat, top_p, min_p = decoding.temperature, decoding.top_p, decoding.min_p
        _require(heat >= 0, f"{key}.temperature={heat}: must be 0 (greedy) or more")
        _require(0 < top_p <= 1, f"{key}.top_p={top_p}: must lie in (0, 1]; 1 leaves nothing out")
        _require(0 <= min_p < 1, f"{key}.min_p={min_p}: must lie in [0, 1); 0 leaves nothing out")
    return config


def _check_model(model: ModelConfig) -> None:
    _one_of("model.kind", model.kind, ("base", "instruct"))
    _one_of("model.prompt_route", model.prompt_route, ("auto", "plain", "chat"))
    for name in ("dtype", "base_dtype", "engine_dtype"):
        _one_of(f"model.{name}", getattr(model, name), DTYPES)


def _check_sizes(at_least_one: Mapping[str, int], logit_chunk_mb: float) -> None:
    for name, value in at_least_one.items():
        _require(value >= 1, f"{name}={value}: must be 1 or more")
    _require(logit_chunk_mb > 0, f"logit_chunk_mb={logit_chunk_mb}: must be positive, in MB")


def _check_ranges(config: TrainConfig) -> None:
    _require(config.alpha > 0, f"alpha={config.alpha}: must be positive (1 is the identity)")
    _require(
        0 < config.epsilon < 1, f"epsilon={config.epsilon}: must lie in (0, 1), e.g. epsilon=0.2"
    )
    min_p = config.guard.min_p
    _require(
        0 <= min_p < 1,
        f"guard.min_p={min_p}: must lie in [0, 1); 0 is no guard, guard=min_p takes 0.05",
    )
    _check_model(config.model)
    if config.callbacks.export_dtype is not None:
        _one_of("callbacks.export_dtype", config.callbacks.export_dtype, DTYPES)
    _one_of("buffer.log_p_old", config.buffer.log_p_old, ("auto", "engine", "trainer"))
    _one_of("logger.mode", config.logger.mode, ("auto", "online", "offline"))
    psi = config.strategy.format_penalty
    _require(psi <= 0, f"strategy.format_penalty={psi}: a penalty is 0 or negative")
    at_least_one = {
        "refills": config.refills,
        "rollout.prompts_per_refill": config.rollout.prompts_per_refill,
        "rollout.samples_per_prompt": config.rollout.samples_per_prompt,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
        "buffer.updates_per_refill": config.buffer.updates_per_refill,
        "optimizer.max_skipped_in_a_row": config.optimizer.max_skipped_in_a_row,
        "rollout.logp_gap_trajectories": config.rollout.logp_gap_trajectories,
        "callbacks.evaluation.samples_per_prompt": config.callbacks.evaluation.samples_per_prompt,
        "callbacks.selfcheck.prompts": config.callbacks.selfcheck.prompts,
        "callbacks.evaluation.every_n_refills": config.callbacks.evaluation.every_n_refills,
        "callbacks.selfcheck.every_n_refills": config.callbacks.selfcheck.every_n_refills,
        "callbacks.checkpoint.every_n_refills": config.callbacks.checkpoint.every_n_refills,
        "callbacks.console.every_n_refills": config.callbacks.console.every_n_refills,
    }
    if (every := config.callbacks.checkpoint.every_n_updates) is not None:
        at_least_one["callbacks.checkpoint.every_n_updates"] = every
    for name in config.callbacks.stop_signals:
        known = tuple(s.name for s in signal.Signals if s not in UNSTOPPABLE)
        _one_of("callbacks.stop_signals", name, known)
    most = config.callbacks.evaluation.max_prompts
    if most is not None:
        at_least_one["callbacks.evaluation.max_prompts"] = most
    _check_sizes(at_least_one, config.logit_chunk_mb)
    staleness = config.buffer.max_staleness
    _require(staleness >= 0, f"buffer.max_staleness={staleness}: must be 0 or more")
    betas = config.optimizer.betas
    _require(len(betas) == 2, f"optimizer.betas={betas}: AdamW takes two, e.g. [0.9, 0.95]")


def _check_combinations(config: TrainConfig) -> None:
    prompts, updates = config.rollout.prompts_per_refill, config.buffer.updates_per_refill
    _require(
        config.buffer.prompts_per_update is not None or prompts % updates == 0,
        f"rollout.prompts_per_refill={prompts} is not divisible by "
        f"buffer.updates_per_refill={updates}: an update holds whole prompt groups",
    )
    is_rl = _is_rl(config)
    _require(
        not is_rl or config.alpha > 1,
        f"alpha={config.alpha} with strategy={config.strategy.name}: beta = 1/(alpha-1) must be "
        "positive, so alpha > 1; for alpha < 1 take a balance strategy",
    )
    start = config.alpha_schedule.get("start", config.alpha)
    _require(
        not is_rl or start > 1,
        f"alpha_schedule.start={start} with strategy={config.strategy.name}: needs alpha > 1 from "
        "the start",
    )
    log_z = str(config.log_z.get("_target_", "")).rpartition(".")[2]
    needs_group = is_rl or log_z in ("GroupLogZ", "GroupLooLogZ")
    _require(
        not needs_group or config.rollout.samples_per_prompt > 1,
        f"rollout.samples_per_prompt={config.rollout.samples_per_prompt} with a baseline from the "
        "prompt's group: needs 2 or more (or log_z=head)",
    )


def _check_finetune(config: TrainConfig) -> None:
    tuned = config.finetune
    _one_of("finetune", tuned.kind, ("full", "lora"))
    _require(
        tuned.dropout == 0,
        f"finetune.dropout={tuned.dropout}: must be 0, since log-probs must be those of the "
        "sampled policy",
    )
    _require(tuned.lr_factor > 0, f"finetune.lr_factor={tuned.lr_factor}: must be positive")
    settings = {n: getattr(tuned, n) for n in ("rank", "lora_alpha", "target_modules")}
    given = {name: value for name, value in settings.items() if value is not None}
    if tuned.kind == "full":
        for name, value in given.items():
            raise ConfigError(f"finetune.{name}={value} needs finetune=lora")
        return
    for name in settings.keys() - given.keys():
        raise ConfigError(f"finetune.{name}=null: finetune=lora needs it")
    _require((tuned.rank or 0) >= 1, f"finetune.rank={tuned.rank}: must be 1 or more")


def _check_monitor(config: TrainConfig) -> None:
    monitor = config.monitor
    _require(
        0 < monitor.pull_factor < 1,
        f"monitor.pull_factor={monitor.pull_factor}: must lie in (0, 1), e.g. 0.5",
    )
    _require(
        0 < monitor.pull_recovery <= 1,
        f"monitor.pull_recovery={monitor.pull_recovery}: must lie in (0, 1], e.g. 0.1",
    )
    is_rl = _is_rl(config)
    for name, rule in monitor.rules.items():
        key = f"monitor.rules.{name}"
        _one_of(f"{key}.action", rule.action, ("warn", "stop", "pull"))
        if rule.relative is not None:
            _one_of(f"{key}.relative", rule.relative, ("factor", "difference"))
        _require(rule.patience >= 1, f"{key}.patience={rule.patience}: must be 1 or more")
        _require(
            rule.above is not None or rule.below is not None,
            f"{key}: has no bound, so it can never be broken: set above or below",
        )
        _require(
            rule.above is None or rule.below is None or rule.below < rule.above,
            f"{key}: below={rule.below} and above={rule.above} leave no value unbroken",
        )
        _require(
            not (is_rl and rule.action == "pull"),
            f"{key}.action=pull with strategy={config.strategy.name}: beta = 1/(alpha-1) grows "
            "without bound as alpha nears 1; take action=stop or a balance strategy",
        )


def _is_rl(config: TrainConfig) -> bool:
    return str(config.strategy.objective.get("_target_", "")).endswith("PolicyGradientObjective")


def _unknown_key(error: ConfigKeyError, schema: type) -> str:
    wrong = str(error.full_key or error.key)
    parent, _, leaf = wrong.rpartition(".")
    node: Any = OmegaConf.structured(schema)
    if parent:  # below a name that the user chose the schema holds nothing, but the error knows
        node = OmegaConf.select(node, parent) or OmegaConf.structured(error.object_type)
    known = list(node.keys())
    close = difflib.get_close_matches(leaf, [str(k) for k in known], n=1)
    prefix = f"{parent}." if parent else ""
    hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(map(str, known))}"
    return f"unknown key '{wrong}': {hint}"


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    _require(value in options, f"{name}={value}: choose one of {', '.join(options)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def as_dict(config: Any) -> Mapping[str, Any]:
    """A typed configuration as plain containers, for config.yaml."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True)  # type: ignore[return-value]

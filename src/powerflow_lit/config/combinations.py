"""Values that are right by themselves and contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powerflow_lit.config.rules import one_of, require
from powerflow_lit.config.schema import TrainConfig

SPREAD = ".FullyShardedStrategy"  # of trainer=fsdp
SCALED_LOSS = ("16-mixed", "16")  # precisions for which Lightning scales the loss


def check_combinations(config: TrainConfig) -> None:
    """What strategy, log Z, alpha and the sizes of a refill ask of each other."""
    _check_updates(config)
    _check_log_p_old(config)
    _check_spread(config.trainer)
    precision = config.trainer.get("precision")
    require(
        not (config.optimizer.fused and str(precision) in SCALED_LOSS),
        f"optimizer.fused=true with trainer.precision={precision}: the loss is scaled for float16, "
        "and gradients would be clipped before it is undone: leave it null, or take bf16-mixed",
    )
    is_rl = _is_rl(config)
    require(
        not is_rl or config.alpha > 1,
        f"alpha={config.alpha} with strategy={config.strategy.name}: beta = 1/(alpha-1) must be "
        "positive, so alpha > 1; for alpha < 1 take a balance strategy",
    )
    start = config.alpha_schedule.get("start", config.alpha)
    require(
        not is_rl or start > 1,
        f"alpha_schedule.start={start} with strategy={config.strategy.name}: needs alpha > 1 from "
        "the start",
    )
    log_z = str(config.log_z.get("_target_", "")).rpartition(".")[2]
    needs_group = is_rl or log_z in ("GroupLogZ", "GroupLooLogZ")
    require(
        not needs_group or config.rollout.samples_per_prompt > 1,
        f"rollout.samples_per_prompt={config.rollout.samples_per_prompt} with a baseline from the "
        "prompt's group: needs 2 or more (or log_z=head)",
    )


def _check_spread(trainer: Mapping[str, Any]) -> None:
    """What spreads a model over devices does so in one way, in some precisions."""
    strategy, precision = trainer.get("strategy"), str(trainer.get("precision"))
    if isinstance(strategy, str):
        require(
            not strategy.startswith(("fsdp", "deepspeed", "model_parallel")),
            f"trainer.strategy={strategy}: log-probs are computed past the wrapper that it puts "
            "around the model: take trainer=fsdp (docs/sharding.md)",
        )
    elif isinstance(strategy, Mapping) and str(strategy.get("_target_")).endswith(SPREAD):
        require(
            precision not in SCALED_LOSS,
            f"trainer.precision={precision} with trainer=fsdp: a rank would see the infinities of "
            "its own part alone: take bf16-mixed",
        )


def check_monitor(config: TrainConfig) -> None:
    """The monitor's rules, each by itself and with the strategy."""
    monitor = config.monitor
    require(
        0 < monitor.pull_factor < 1,
        f"monitor.pull_factor={monitor.pull_factor}: must lie in (0, 1), e.g. 0.5",
    )
    require(
        0 < monitor.pull_recovery <= 1,
        f"monitor.pull_recovery={monitor.pull_recovery}: must lie in (0, 1], e.g. 0.1",
    )
    is_rl = _is_rl(config)
    for name, rule in monitor.rules.items():
        key = f"monitor.rules.{name}"
        one_of(f"{key}.action", rule.action, ("warn", "stop", "pull"))
        if rule.relative is not None:
            one_of(f"{key}.relative", rule.relative, ("factor", "difference"))
        require(rule.patience >= 1, f"{key}.patience={rule.patience}: must be 1 or more")
        require(
            rule.above is not None or rule.below is not None,
            f"{key}: has no bound, so it can never be broken: set above or below",
        )
        require(
            rule.above is None or rule.below is None or rule.below < rule.above,
            f"{key}: below={rule.below} and above={rule.above} leave no value unbroken",
        )
        require(
            not (is_rl and rule.action == "pull"),
            f"{key}.action=pull with strategy={config.strategy.name}: beta = 1/(alpha-1) grows "
            "without bound as alpha nears 1; take action=stop or a balance strategy",
        )


def _check_updates(config: TrainConfig) -> None:
    prompts, buffer = config.rollout.prompts_per_refill, config.buffer
    updates, per_update = buffer.updates_per_refill, buffer.prompts_per_update
    require(
        per_update is not None or prompts % updates == 0,
        f"rollout.prompts_per_refill={prompts} is not divisible by "
        f"buffer.updates_per_refill={updates}: an update holds whole prompt groups",
    )
    held = prompts * (buffer.max_staleness + 1)
    require(
        per_update is None or per_update <= held,
        f"buffer.prompts_per_update={per_update}: the buffer holds {held} prompt groups at most "
        f"(rollout.prompts_per_refill={prompts}, buffer.max_staleness={buffer.max_staleness})",
    )


def _check_log_p_old(config: TrainConfig) -> None:
    chosen, overlap = config.buffer.log_p_old, config.rollout.overlap
    weight = config.strategy.objective.get("weight")
    kind = weight.get("kind", "none") if isinstance(weight, Mapping) else "none"
    require(
        chosen != "none" or kind == "none",
        f"buffer.log_p_old=none with strategy.objective.weight.kind={kind}: the importance weight "
        "needs the behaviour log-probs: take auto, engine or trainer",
    )
    require(
        not overlap or chosen in ("auto", "engine"),
        f"buffer.log_p_old={chosen} with rollout.overlap=true: when the rollouts are there, the "
        "trainer's weights have moved on, so the engine's log-probs are kept: take auto or engine",
    )
    require(
        not overlap or not config.rollout.engine.get("sleep"),
        "rollout.engine.sleep=true with rollout.overlap=true: the engine is at work while the "
        "trainer makes updates, so it cannot give its memory away: set one of them to false",
    )
    require(
        not overlap or config.guard.min_p == 0,
        f"guard.min_p={config.guard.min_p} with rollout.overlap=true: what the guard allows is "
        "found by the trainer, whose weights have moved on: take guard=none or overlap=false",
    )


def _is_rl(config: TrainConfig) -> bool:
    return str(config.strategy.objective.get("_target_", "")).endswith("PolicyGradientObjective")

"""What stale trajectories and samples of the base ask of the rest of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powerflow_lit.config.rules import require
from powerflow_lit.config.schema import TrainConfig


def is_policy_gradient(config: TrainConfig) -> bool:
    """Whether the strategy is an RL twin of a balance objective."""
    return str(config.strategy.objective.get("_target_", "")).endswith("PolicyGradientObjective")


def _weight_of(config: TrainConfig) -> tuple[str, Mapping[str, Any]]:
    """Key and settings of the objective's importance weight, also of one that another divides
    (`PerToken`); empty where there is none."""
    key, node = "strategy.objective.weight", config.strategy.objective.get("weight")
    while isinstance(node, Mapping) and isinstance(node.get("weight"), Mapping):
        key, node = f"{key}.weight", node["weight"]
    return key, node if isinstance(node, Mapping) else {}


def check_off_policy(config: TrainConfig) -> None:
    """`buffer.min_ess` has something to drop, and `rollout.base_share` somewhere to come from."""
    buffer = config.buffer
    require(
        not buffer.min_ess or buffer.max_staleness > 0,
        f"buffer.min_ess={buffer.min_ess:g} with buffer.max_staleness=0: it drops stale "
        "trajectories, and none are held: raise max_staleness or set min_ess=0",
    )
    require(
        not buffer.min_ess or buffer.log_p_old != "none",
        f"buffer.min_ess={buffer.min_ess:g} with buffer.log_p_old=none: what is too stale is told "
        "from behaviour log-probs: take auto, engine or trainer",
    )
    if config.rollout.base_share:
        _check_base_share(config)


def _check_base_share(config: TrainConfig) -> None:
    rollout, strategy = config.rollout, config.strategy
    given = f"rollout.base_share={rollout.base_share:g}"
    samples = rollout.base_share * rollout.samples_per_prompt
    own = rollout.samples_per_prompt - samples
    require(
        abs(samples - round(samples)) < 1e-9 and own >= 2,
        f"{given} of rollout.samples_per_prompt={rollout.samples_per_prompt} rollouts are "
        f"{samples:g}: must be a whole number that leaves the policy 2 or more",
    )
    policys_own = (
        is_policy_gradient(config)
        or strategy.reward is not None
        or "entropy_temperature" in strategy.objective
    )
    require(
        not policys_own,
        f"{given} with strategy={strategy.name}: it learns from the policy's own samples alone; "
        "those of another take a balance strategy without rewards, such as powerflow",
    )
    key, weight = _weight_of(config)
    require(
        weight.get("kind", "none") == "none" or weight.get("epsilon_low") is not None,
        f"{given} with {key}.epsilon_low=null: what the policy has lost would "
        "count for nothing, which base samples are to mend: give epsilon_low, e.g. 0.2",
    )
    require(
        not rollout.overlap,
        f"{given} with rollout.overlap=true: the engine cannot hold the base's weights while it "
        "samples from the policy's: set one of them back",
    )
    require(
        not rollout.score_while_generating,
        f"{given} with rollout.score_while_generating=true: the base's own rollouts are not scored "
        "early: set one of them back",
    )
    require(
        config.guard.min_p == 0,
        f"{given} with guard.min_p={config.guard.min_p}: the guard allows tokens of the policy, "
        "and the base would sample others: take guard=none or base_share=0",
    )
    sharing = rollout.engine.get("tensor_parallel", 1)
    require(
        sharing == 1,
        f"{given} with rollout.engine.tensor_parallel={sharing}: weights of the base are not given "
        "to an engine that several ranks hold: set one of them back",
    )

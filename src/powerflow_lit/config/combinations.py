"""Values that are right by themselves and contradict each other."""

from __future__ import annotations

from collections.abc import Mapping

from powerflow_lit.config.off_policy import check_off_policy, is_policy_gradient
from powerflow_lit.config.rules import one_of, require
from powerflow_lit.config.schema import TrainConfig

SPREAD = ".FullyShardedStrategy"  # of trainer=fsdp
SCALED_LOSS = ("16-mixed", "16")  # precisions for which Lightning scales the loss
# as in the room of rewards, which imports torch; a test holds them against each other
SUPERVISED = "correct"
READABLE = ("answer_class", "self_certainty", SUPERVISED)


def check_combinations(config: TrainConfig) -> None:
    """What strategy, log Z, alpha and the sizes of a refill ask of each other."""
    _check_updates(config)
    _check_log_p_old(config)
    check_off_policy(config)
    _check_reward(config)
    _check_full_vocabulary(config)
    _check_tensor_parallel(config)
    _check_spread(config)
    _check_length_control(config)
    precision = config.trainer.get("precision")
    require(
        not (config.optimizer.fused and str(precision) in SCALED_LOSS),
        f"optimizer.fused=true with trainer.precision={precision}: the loss is scaled for float16, "
        "and gradients would be clipped before it is undone: leave it null, or take bf16-mixed",
    )
    is_rl = is_policy_gradient(config)
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
    _check_automatic_alpha(config)
    log_z = str(config.log_z.get("_target_", "")).rpartition(".")[2]
    needs_group = is_rl or log_z in ("GroupLogZ", "GroupLooLogZ")
    require(
        not needs_group or config.rollout.samples_per_prompt > 1,
        f"rollout.samples_per_prompt={config.rollout.samples_per_prompt} with a baseline from the "
        "prompt's group: needs 2 or more (or log_z=head)",
    )


def _check_automatic_alpha(config: TrainConfig) -> None:
    """A schedule that aims at a target needs a strategy that follows alpha all the way."""
    schedule, name = config.alpha_schedule, config.strategy.name
    if "target" not in schedule:
        return
    require(
        config.strategy.uses_alpha,
        f"alpha_schedule.target with strategy={name}, which does not use alpha: take "
        "alpha_schedule=constant, or a strategy that uses it",
    )
    if not is_policy_gradient(config):
        return
    low = schedule.get("alpha_min", 0)
    require(
        low > 1,
        f"alpha_schedule.alpha_min={low} with strategy={name}: beta = 1/(alpha-1) must be positive "
        "wherever alpha goes: set it above 1, e.g. 1.1",
    )
    require(
        schedule.get("scope") != "prompt",
        f"alpha_schedule.scope=prompt with strategy={name}: its beta = 1/(alpha-1) is one for all "
        "prompts: take scope=global or a balance strategy",
    )


def _check_spread(config: TrainConfig) -> None:
    """What spreads a model over devices does so in one way, in some precisions."""
    trainer = config.trainer
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
        require(
            not str(config.rollout.engine.get("_target_")).endswith(".VllmServerEngine"),
            "rollout=vllm_server with trainer=fsdp: servers are given weights by one rank, which "
            "holds a part of them: take rollout=vllm, or trainer=ddp",
        )
        require(
            not config.rollout.score_while_generating,
            "rollout.score_while_generating=true with trainer=fsdp: ranks make every pass "
            "together, and their prompts finish at different times: take trainer=ddp or "
            "set it to false",
        )


def _check_length_control(config: TrainConfig) -> None:
    """A chosen length has a place in trajectory balance alone, and is steered by its own means."""
    node, strategy = config.length_control, config.strategy
    weight, mismatch = (strategy.objective.get(name) for name in ("weight", "mismatch"))
    if node.get("_target_") == "powerflow_lit.length_control.LengthControl":  # none
        per_token = isinstance(weight, Mapping) and str(weight.get("_target_")).endswith("PerToken")
        require(
            not per_token,
            f"strategy={strategy.name} without a chosen length: it would shrink as in tb_traj; add "
            "length_control=target, or take strategy=powerflow",
        )
        return
    target = str(mismatch.get("_target_")) if isinstance(mismatch, Mapping) else ""
    own = target.startswith("powerflow_lit.")
    require(
        (target and not own) or target.endswith(".tb_traj_mismatch"),
        f"length_control=target with strategy={strategy.name}: its objective fixes the length "
        "(PowerFlow's log Z' is a price at which log Z is 0), so that none can be chosen: take "
        "strategy=powerflow_length or tb_traj",
    )
    require(
        config.rollout.samples_per_prompt > 1,
        f"length_control=target with rollout.samples_per_prompt={config.rollout.samples_per_prompt}"
        ": lengths are compared within the rollouts of a prompt: needs 2 or more",
    )
    require(
        config.buffer.log_p_old != "none",
        "length_control=target with buffer.log_p_old=none: the price is set by the log-probs of "
        "the policy that sampled: take auto, engine or trainer",
    )
    require(
        not str(config.log_z.get("_target_")).endswith(".FixedLogZ"),
        "length_control=target with log_z=fixed: log Z follows from the price: take log_z=group",
    )


def _check_length_rules(config: TrainConfig) -> None:
    """No rule of the monitor is broken by the very length that was chosen."""
    node = config.length_control
    tokens, factor = node.get("tokens"), node.get("factor")
    for name, rule in config.monitor.rules.items():
        if rule.metric != "rollout/length_mean" or factor is None:
            continue
        if rule.relative == "factor":
            chosen, key = (factor, "factor") if tokens is None else (None, "")
        else:
            chosen, key = (tokens, "tokens") if rule.relative is None else (None, "")
        if chosen is None:
            continue
        for side, bound in (("below", rule.below), ("above", rule.above)):
            broken = bound is not None and (chosen < bound if side == "below" else chosen > bound)
            require(
                not broken,
                f"length_control.{key}={chosen:g} breaks the monitor's rule {name} "
                f"({side}={bound}): set monitor.rules.{name}.{side}, or add "
                f"~monitor.rules.{name}",
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
    _check_length_rules(config)
    is_rl = is_policy_gradient(config)
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
        require(
            config.strategy.uses_alpha or rule.action != "pull",
            f"{key}.action=pull with strategy={config.strategy.name}, which does not use alpha: "
            "take action=warn or stop",
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
    for name in ("weight", "surrogate"):
        weight = config.strategy.objective.get(name)
        for key in ("kind", "ratio"):  # of an importance weight, of PPO's clip
            value = weight.get(key, "none") if isinstance(weight, Mapping) else "none"
            require(
                chosen != "none" or value == "none",
                f"buffer.log_p_old=none with strategy.objective.{name}.{key}={value}: the "
                "importance weight needs the behaviour log-probs: take auto, engine or trainer",
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
    early = config.rollout.score_while_generating
    require(
        not early or not overlap,
        "rollout.score_while_generating=true with rollout.overlap=true: the trainer makes updates "
        "while the engine samples, so the base cannot score meanwhile: set one of them to false",
    )
    require(
        not early or config.guard.min_p == 0,
        f"guard.min_p={config.guard.min_p} with rollout.score_while_generating=true: what the base "
        "may count is known when the policy has scored all of a refill: set one of them off",
    )


def _check_reward(config: TrainConfig) -> None:
    """A reward reads what there is, and references only where the strategy says so."""
    strategy, samples = config.strategy, config.rollout.samples_per_prompt
    reward = strategy.reward
    reads = [] if reward is None else reward.reads
    for name in reads:
        one_of("strategy.reward.reads", name, READABLE)
    if strategy.supervised:
        require(
            SUPERVISED in reads,
            f"strategy.supervised=true, but strategy.reward.reads does not hold {SUPERVISED}: set "
            "strategy.supervised=false",
        )
    else:
        require(
            SUPERVISED not in reads,
            f"strategy.reward.reads={reads} reads the reference answers: such a strategy says so "
            "by strategy.supervised=true",
        )
    if reward is None:
        return
    require(
        samples > 1,
        f"rollout.samples_per_prompt={samples} with strategy={strategy.name}: a reward counts "
        "against those of the prompt's other rollouts: needs 2 or more",
    )
    share = reward.trained_share
    require(0 < share <= 1, f"strategy.reward.trained_share={share}: must lie in (0, 1]")
    trained = share * samples
    require(
        trained >= 2 and trained == round(trained),
        f"strategy.reward.trained_share={share:g} of rollout.samples_per_prompt={samples} rollouts "
        f"are {trained:g}: must be a whole number of 2 or more",
    )
    require(
        not config.rollout.overlap or "self_certainty" not in reads,
        "rollout.overlap=true with a reward that reads self_certainty: the policy that sampled has "
        "moved on when rewards are made, so its certainty is lost: take overlap=false",
    )


def _check_full_vocabulary(config: TrainConfig) -> None:
    """Certainties and entropies are over the full vocabulary, a guarded policy is not."""
    strategy, min_p = config.strategy, config.guard.min_p
    reads = [] if strategy.reward is None else strategy.reward.reads
    over_all = "self_certainty" in reads or "entropy_temperature" in strategy.objective
    require(
        min_p == 0 or not over_all,
        f"guard.min_p={min_p} with strategy={strategy.name}: its certainty or entropy is over the "
        "full vocabulary, which the guarded policy does not use: take guard=none",
    )
    require(
        "entropy_temperature" not in strategy.objective or strategy.format_penalty == 0,
        f"strategy.format_penalty={strategy.format_penalty} with strategy={strategy.name}: an "
        "entropy has no place for a penalty: set it to 0",
    )


def _check_tensor_parallel(config: TrainConfig) -> None:
    """Ranks that hold one engine together are neighbours in one machine, and work at one time."""
    sharing = config.rollout.engine.get("tensor_parallel", 1)
    require(
        isinstance(sharing, int) and not isinstance(sharing, bool) and sharing >= 1,
        f"rollout.engine.tensor_parallel={sharing}: must be a whole number, 1 or more",
    )
    devices = config.trainer.get("devices", "auto")
    here = len(devices) if isinstance(devices, list) else devices
    require(
        not isinstance(here, int) or here < 1 or here % sharing == 0,
        f"rollout.engine.tensor_parallel={sharing} with trainer.devices={devices}: the devices of "
        "a machine must divide into groups that share an engine",
    )
    require(
        sharing == 1 or not config.rollout.overlap,
        f"rollout.engine.tensor_parallel={sharing} with rollout.overlap=true: the ranks of an "
        "engine sample at one time, between updates: set one of them back",
    )

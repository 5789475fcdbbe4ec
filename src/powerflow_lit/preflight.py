"""What can be wrong with a run on this machine, found in seconds.

Neither lightning nor transformers is imported, no model is loaded and no engine is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from powerflow_lit.config.engines import check_engine
from powerflow_lit.config.launching import TRACEBACKS
from powerflow_lit.config.places import check_writable
from powerflow_lit.config.processes import devices_asked, rank_here, started
from powerflow_lit.config.rules import ConfigError, require
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.continuing import refuse_another_run
from powerflow_lit.errors import is_refusal, line_of, root_cause
from powerflow_lit.mendable import MendableError
from powerflow_lit.models.errors import no_chat_template, unknown_words
from powerflow_lit.models.folders import context_of, divides_heads, has_chat_template, resolve_path
from powerflow_lit.wandb_login import missing_login

if TYPE_CHECKING:
    from powerflow_lit.tasks.base import Task
    from powerflow_lit.types import Prompt

ENCODED_AT_ONCE = 1024  # prompts


@dataclass(frozen=True)
class Parts:
    """What a run is built from and costs nothing to build."""

    objective: Any  # of the strategy
    task: Task  # its prompts are read


def check_here(config: TrainConfig) -> None:
    """The engine, the run folder and the model's folder; imports nothing heavy.

    Raises:
        ConfigError: vLLM is chosen and missing, the run folder is another run's or cannot be
            written to, W&B is to be online without a login, prompt and response are longer than the
            model's context.
        ModelError: a local model folder is not there, or is none, or lacks a chat template where
            one is asked for.
    """
    check_engine(config.rollout.engine)
    if rank_here() == 0:  # the others are told the folder of the first
        refuse_another_run(Path(config.run_dir), config.resume)
    check_writable("run_dir", config.run_dir)
    missing = missing_login(config.logger.mode) if config.logger.name == "wandb" else None
    require(missing is None, str(missing))
    folder = Path(resolve_path(config.model.path))
    context = context_of(folder) if folder.is_dir() else None
    if config.model.prompt_route == "chat" and folder.is_dir() and not has_chat_template(folder):
        raise no_chat_template()
    rollout = config.rollout
    sharing = int(rollout.engine.get("tensor_parallel", 1))
    require(
        sharing == 1 or not folder.is_dir() or divides_heads(folder, sharing),
        f"rollout.engine.tensor_parallel={sharing}: the attention heads of {config.model.path} "
        "cannot be divided among so many ranks: take a divisor of their number",
    )
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    require(
        context is None or longest <= context,
        f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} and "
        f"rollout.max_new_tokens={rollout.max_new_tokens} take {longest} tokens together, the "
        f"context of {config.model.path} is {context}: lower one of them",
    )


def light_parts(config: TrainConfig) -> Parts:
    """Builds what a wrong value shows in, and tries it; imports torch and the task's libraries.

    Raises:
        ConfigError: the device is not there, a `_target_` refuses its values (objective and reward
            also those that they read when they are called), the reward cannot be computed on the
            task, or there are too few prompts for a refill.
        TaskError: the task's data cannot be used.
        ModelError: the model's tokenizer does not know the words of a prompt.
    """
    check_device(config)
    check_ranks(config)
    objective = _objective(config)
    _built("log_z", config.log_z)
    if config.strategy.flow is not None:
        _built("strategy.flow", config.strategy.flow)
    task: Task = _built("task.build", config.task.build)
    _check_reward(config, task)
    train, evaluation = task.train_prompts(), task.eval_prompts()
    require(len(evaluation) > 0, f"task {config.task.name} has no evaluation prompts")
    _check_shared_engine(config, len(evaluation))
    _check_prompts(config, train)
    return Parts(objective, task)


def check_device(config: TrainConfig) -> None:
    """Raises ConfigError where the trainer's device is not there, or not so often."""
    import torch

    accelerator, devices = config.trainer.get("accelerator"), config.trainer.get("devices")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        if accelerator == "gpu" and torch.backends.mps.is_available():
            return  # Lightning takes Apple's for one too
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        why = "torch sees no GPU here" if built else "this torch is built for the CPU"
        raise ConfigError(
            f"trainer.accelerator={accelerator}: {why}: take trainer=cpu, or with several ranks "
            "trainer.accelerator=cpu (powerflow-doctor says what is installed)"
        )
    if accelerator == "mps":
        require(
            torch.backends.mps.is_available(),
            "trainer.accelerator=mps: torch sees no such device here: take trainer=cpu",
        )
    if accelerator in ("gpu", "cuda") and isinstance(devices, int):
        here = torch.cuda.device_count()
        require(devices <= here, f"trainer.devices={devices}: torch sees {here} here")


def ranks_of(config: TrainConfig) -> int:
    """Processes of the run, one for each device of each node; torch counts them where none did."""
    devices = devices_asked(config.trainer)
    if devices is None:
        import torch

        on_gpu = config.trainer.get("accelerator", "auto") in ("gpu", "cuda", "auto")
        devices = max(torch.cuda.device_count(), 1) if on_gpu else 1
    return devices * int(config.trainer.get("num_nodes", 1))


def check_ranks(config: TrainConfig) -> None:
    """Raises ConfigError where the ranks that there are, or will be, cannot share the run."""
    trainer, found, world = config.trainer, started(), ranks_of(config)
    asked = f"trainer.devices={trainer.get('devices', 'auto')}"
    nodes = int(trainer.get("num_nodes", 1))
    asked += f" and trainer.num_nodes={nodes}" if nodes > 1 else ""
    require(
        found is None or found[1] == world,
        f"{asked} make {world} ranks, but {found and found[1]} were started: give torchrun or "
        "srun as many processes a node as trainer.devices, and trainer.num_nodes the nodes",
    )
    require(
        nodes == 1 or found is not None,
        f"trainer.num_nodes={nodes}: Lightning starts processes on this machine only: start them "
        "with torchrun or srun (docs/distributed.md)",
    )
    strategy = str(trainer.get("strategy", ""))
    require(
        not any(how in strategy for how in ("spawn", "fork", "notebook")),
        f"trainer.strategy={strategy}: its processes are copies of this one, which holds an "
        "engine and open files: take trainer=ddp",
    )
    groups = {"rollout.prompts_per_refill": config.rollout.prompts_per_refill}
    if config.buffer.prompts_per_update is not None:
        groups["buffer.prompts_per_update"] = config.buffer.prompts_per_update
    else:
        name = "rollout.prompts_per_refill / buffer.updates_per_refill"
        groups[name] = config.rollout.prompts_per_refill // config.buffer.updates_per_refill
    for name, count in groups.items():
        require(
            count % world == 0,
            f"{name}={count} is not divisible by the {world} ranks of {asked}: it counts the "
            "prompt groups of all ranks, and each takes as many of them",
        )


def _built(name: str, node: Mapping[str, Any]) -> Any:
    """What a `_target_` node describes.

    Its own refusal is passed on, that of its arguments names the node, a fault in it is raised as
    it is.
    """
    try:
        return instantiate(node)
    except InstantiationException as error:
        cause = root_cause(error)
        if isinstance(cause, MendableError):
            raise cause from error
        if not is_refusal(error):
            raise
        raise ConfigError(f"{name}: {line_of(error)}") from error


def _objective(config: TrainConfig) -> Any:
    """The strategy's objective, after another one of its kind was called without gradients.

    It was called at the schedule's first and last alpha: some values are read only then, and a run
    would stop at its first update. What else goes wrong in this trial is left for the run to show.
    """
    import torch

    from powerflow_lit.objectives import LossInputs, ObjectiveError

    log_prob, zeros = torch.full((2, 2), -1.0), torch.zeros(2)
    inputs = LossInputs(
        log_pf=log_prob,
        log_p_base=log_prob,
        log_p_old=log_prob,
        mask=torch.ones(2, 2, dtype=torch.bool),
        log_z=zeros,
        format_penalty=zeros,
        prompt_index=torch.zeros(2, dtype=torch.long),
        reward=None if config.strategy.reward is None else torch.tensor([0.0, 1.0]),
        token_entropy=torch.ones(2, 2),
        log_flow=torch.zeros(2, 1),
    )
    constants = config.strategy.calibrate
    numbers = {n: 1.0 if isinstance(v, str) else float(v) for n, v in constants.items()}
    schedule = _built("alpha_schedule", config.alpha_schedule)
    try:
        objective = _built("strategy.objective", config.strategy.objective)
        trial = _built("strategy.objective", config.strategy.objective)
    except ObjectiveError as error:
        raise ConfigError(f"strategy={config.strategy.name}: {error}") from error
    alpha: Any = None
    try:
        with torch.no_grad():
            for alpha in _alphas(schedule, config.alpha):  # on two trajectories of two tokens
                trial(inputs, alpha=alpha, **numbers)
    except ObjectiveError as error:
        raise ConfigError(f"strategy={config.strategy.name}: {error}") from error
    except TypeError as error:
        if not TRACEBACKS.get():
            raise ConfigError(f"strategy={config.strategy.name}: {error}") from error
        raise
    except Exception as error:  # as of an objective which reads more than these inputs hold
        require(
            not isinstance(alpha, torch.Tensor),
            f"alpha_schedule.scope=prompt with strategy={config.strategy.name}: it takes no alpha "
            f"for each trajectory ({line_of(error)}): take scope=global",
        )
        return objective
    return objective


def _alphas(schedule: Any, alpha: float) -> list[Any]:
    """The first and the last alpha of a schedule, and (2,) where each prompt has its own."""
    import torch

    own = getattr(schedule, "of_prompts", lambda prompt_id: None)(torch.arange(2))
    return [schedule(alpha, 0.0), schedule(alpha, 1.0), *([] if own is None else [own])]


def _check_reward(config: TrainConfig, task: Task) -> None:
    """That the strategy's reward can be computed on the task; it is tried on two rollouts."""
    chosen = config.strategy.reward
    if chosen is None:
        return
    import torch

    from powerflow_lit.rewards import RewardError, RewardInputs
    from powerflow_lit.rewards.inputs import checked_reward

    name = f"strategy={config.strategy.name}"
    require(
        "answer_class" not in chosen.reads or task.has_answers,
        f"{name} compares the answers of a prompt's rollouts, and task={config.task.name} has "
        "none: take a task with answers, such as arithmetic or reasoning",
    )
    if config.strategy.supervised:
        prompts = task.train_prompts()
        unknown = [p.id for p in prompts if task.is_correct(p, "") is None]
        require(
            not unknown,
            f"{name} is supervised, and {len(unknown)} of {len(prompts)} training prompts of "
            f"task={config.task.name} have no reference: leave them out, or take an unsupervised "
            "strategy",
        )
    two = torch.zeros(2, dtype=torch.long)
    read = {"answer_class": two, "self_certainty": torch.ones(2), "correct": two.bool()}
    inputs = RewardInputs(
        prompt_index=two,
        lengths=two + 1,
        formatted=two.bool(),
        truncated=two.bool(),
        read={reader: read[reader] for reader in chosen.reads},
    )
    try:
        checked_reward(_built("strategy.reward.function", chosen.function), inputs)
    except RewardError as error:
        raise ConfigError(f"{name}: {error}") from error
    except TypeError as error:
        if TRACEBACKS.get():
            raise
        raise ConfigError(f"{name}: {error}") from error


def _check_shared_engine(config: TrainConfig, evaluation: int) -> None:
    """Every rank that shares an engine asks it, in evaluations too: each needs a prompt."""
    sharing, ranks = config.rollout.engine.get("tensor_parallel", 1), ranks_of(config)
    most = config.callbacks.evaluation.max_prompts
    asked = evaluation if most is None else min(evaluation, most)
    require(
        sharing == 1 or asked >= ranks,
        f"rollout.engine.tensor_parallel={sharing}: {asked} evaluation prompts for {ranks} ranks, "
        "each of which needs one: raise callbacks.evaluation.max_prompts",
    )


def _check_prompts(config: TrainConfig, prompts: Sequence[Prompt]) -> None:
    """Enough training prompts, and enough within the token limit as far as can be told here.

    A prompt's text alone has no more tokens than the prompt as the model will read it.
    """
    needed, limit = config.rollout.prompts_per_refill, config.rollout.max_prompt_tokens
    require(
        len(prompts) >= needed,
        f"task {config.task.name} has {len(prompts)} training prompts, but "
        f"rollout.prompts_per_refill={needed} are needed at once",
    )
    encode = _encoder(Path(resolve_path(config.model.path)) / "tokenizer.json")
    if encode is None:
        return
    usable = 0
    for start in range(0, len(prompts), ENCODED_AT_ONCE):
        usable += sum(len(i) <= limit for i in encode(prompts[start : start + ENCODED_AT_ONCE]))
        if usable >= needed:
            return
    raise ConfigError(
        f"rollout.max_prompt_tokens={limit}: {usable} of {len(prompts)} training prompts are that "
        f"short, but rollout.prompts_per_refill={needed} are needed at once: raise the one or "
        "lower the other"
    )


def _encoder(file: Path) -> Callable[[Sequence[Prompt]], list[list[int]]] | None:
    """From prompts to the token ids of their text; None where the model has no such file here."""
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises bare ones; loading it names what is wrong
        return None
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")

    def encode(prompts: Sequence[Prompt]) -> list[list[int]]:
        texts = [prompt.text for prompt in prompts]
        rows = [row.ids for row in tokenizer.encode_batch(texts, add_special_tokens=False)]
        for prompt, ids in zip(prompts, rows, strict=True):
            if unknown is not None and unknown in ids:
                raise unknown_words(prompt)
        return rows

    return encode

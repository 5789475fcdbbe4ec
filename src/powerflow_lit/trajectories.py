"""From sampled responses to trajectories, and which of them a run may train on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.models.prompting import decode
from powerflow_lit.rollout import EngineError
from powerflow_lit.rollout.ahead import Sampled
from powerflow_lit.tasks.base import Task
from powerflow_lit.types import Prompt, Trajectory

BASE_VERSION = 0  # the policy before its first update is the base


def trajectories_of(
    sampled: Sampled,
    prompts: Sequence[Prompt],
    prompt_ids: Mapping[int, tuple[int, ...]],
    *,
    first_group: int,
    task: Task,
    tokenizer: Tokenizer,
) -> list[Trajectory]:
    """The responses of a refill, prompt after prompt, and of each the policy's before the base's.

    Log-probs under the base are still to come.

    Args:
        prompt_ids: token ids by the prompt's id.
        first_group: number of the first prompt's group.
    """
    none = torch.zeros(0)
    trajectories = []
    of_base = sampled.of_base or [[] for _ in prompts]
    groups = zip(prompts, sampled.groups, of_base, strict=True)
    for number, (prompt, own, extra) in enumerate(groups):
        for place, completion in enumerate([*own, *extra]):
            from_base = place >= len(own)
            response = decode(tokenizer, completion.token_ids)
            trajectories.append(
                Trajectory(
                    prompt=prompt,
                    group=first_group + number,
                    prompt_ids=prompt_ids[prompt.id],
                    response_ids=completion.token_ids,
                    response=response,
                    truncated=completion.truncated,
                    formatted=task.is_formatted(response),
                    correct=task.is_correct(prompt, response),
                    policy_version=BASE_VERSION if from_base else sampled.policy_version,
                    log_p_old=completion.log_p_old,
                    log_p_base=none,
                    from_base=from_base,
                )
            )
    return trajectories


def refuse_stale(
    trajectories: Sequence[Trajectory], refill: int, *, oldest: int, newest: int
) -> None:
    """Raises EngineError if any of the policy's was sampled from weights older than those of update
    `oldest`, or from others than the policy, which has made `newest`, ever had."""
    versions = [t.policy_version for t in own_samples(trajectories)]
    stale = [version for version in versions if not oldest <= version <= newest]
    if stale:
        raise EngineError(
            f"stale weights: {len(stale)} of {len(versions)} trajectories of refill "
            f"{refill} were sampled from the policy of update {stale[0]}, but it has made "
            f"{newest}" + (f", and may be behind to {oldest}" if oldest < newest else "")
        )


def own_samples(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """Those that the policy has sampled, in their order; the others are the frozen base's."""
    return [t for t in trajectories if not t.from_base]


def refuse_unknown(trajectories: Iterable[Trajectory]) -> None:
    """Raises EngineError where behaviour log-probs that a resumed run needs were not kept."""
    unknown = sum(bool(t.log_p_old.isnan().any()) for t in trajectories)
    if unknown:
        raise EngineError(
            f"{unknown} trajectories of the replay buffer were kept without behaviour "
            "log-probs, which this run needs: resume it with the strategy, buffer.log_p_old "
            "and buffer.max_staleness of before"
        )

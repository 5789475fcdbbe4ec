"""Rollouts from which nothing can be learnt, recognised by what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from powerflow_lit.types import Trajectory


@dataclass(frozen=True)
class Finding:
    """What is wrong with a refill's trajectories, all of them."""

    name: str  # empty | truncated | one_token | identical
    text: str  # one line: the number, what it means, what to try


def findings(trajectories: Sequence[Trajectory], *, max_new_tokens: int) -> list[Finding]:
    """What holds for every trajectory of a refill; none of it stops a run.

    An empty response is its end-of-sequence token alone. Of responses cut at a limit of one token
    it is said that they are cut, and of empty ones not that they are all the same.
    """
    n = len(trajectories)
    longest = max(t.length for t in trajectories)
    truncated = all(t.truncated for t in trajectories)
    ended = not any(t.truncated for t in trajectories)
    if ended and longest == 1:
        return [_empty(n)]
    found = []
    if truncated:
        found.append(_truncated(n, max_new_tokens))
    elif ended and all(t.length == 2 for t in trajectories):
        found.append(_one_token(n))
    if (same := _identical(trajectories)) is not None:
        found.append(same)
    return found


def _empty(n: int) -> Finding:
    return Finding(
        "empty",
        f"all {n} responses are empty: the model ends each at once, and nothing but that is "
        "learnt. From the start on, the prompt is not in the form that it knows: look at "
        "samples.jsonl, try another model.prompt_route; later, the policy has collapsed: lower "
        "optimizer.lr, or let monitor=stop end such a run",
    )


def _truncated(n: int, max_new_tokens: int) -> Finding:
    return Finding(
        "truncated",
        f"all {n} responses are cut at rollout.max_new_tokens={max_new_tokens}: none is a whole "
        "trajectory, and what is learnt are beginnings. Raise it; if that does not help, the "
        "model's end-of-sequence token may be another one: see model.stop_tokens",
    )


def _one_token(n: int) -> Finding:
    return Finding(
        "one_token",
        f"all {n} responses are one token and the end: there is no length to average over. If "
        "the task asks for more, try another model.prompt_route or, had they been longer before, "
        "a lower optimizer.lr",
    )


def _identical(trajectories: Sequence[Trajectory]) -> Finding | None:
    groups: dict[int, set[tuple[int, ...]]] = {}
    for t in trajectories:
        groups.setdefault(t.group, set()).add(t.response_ids)
    n = len(trajectories)
    if n == len(groups) or any(len(responses) > 1 for responses in groups.values()):
        return None  # prompts with a single response each have no other to differ from
    distinct = len(set().union(*groups.values()))
    which = "the same" if distinct == 1 else f"the same for each of the {len(groups)} prompts"
    return Finding(
        "identical",
        f"all {n} responses are {which}: with no other to compare with, a prompt's group shows "
        "no direction, and the policy stays as it is. It is too sure of itself: try an alpha "
        "nearer to 1 or a lower optimizer.lr, or begin with a model that is less sharp",
    )

"""The rewards of the paper's rivals: `(RewardInputs, *, ...) -> (N,)`, one number a rollout."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from powerflow_lit.rewards.inputs import RewardError, RewardInputs

Unparsed = Literal["zero", "singleton"]
Gate = Literal["none", "max_entropy", "top_frequency"]


def correct_answer(inputs: RewardInputs) -> Tensor:
    """1 where the answer is the reference, else 0: supervised (GRPO, FlowRL)."""
    return inputs.correct.double()


def self_certainty(inputs: RewardInputs) -> Tensor:
    """KL(uniform || p_t) + log V, its mean over the response (Intuitor, arXiv 2505.19590), nats."""
    return inputs.self_certainty


def answer_frequency(
    inputs: RewardInputs, *, unparsed: Unparsed, gate: Gate, least_frequency: float
) -> Tensor:
    """The share of the prompt's rollouts with an equivalent answer (EMPO, arXiv 2504.05812).

    Args:
        unparsed: a rollout without an answer gets 0, or 1/G as a class of its own.
        gate: a group that is too uncertain gets 0 throughout, so that it teaches nothing:
            `max_entropy`, where no two rollouts agree (the semantic entropy is log G);
            `top_frequency`, where no answer has a share of `least_frequency`.
        least_frequency: see `gate`; in (0, 1].

    Raises:
        RewardError: another option, or a share outside (0, 1].
    """
    for value, options in ((unparsed, Unparsed), (gate, Gate)):
        if value not in get_args(options):
            raise RewardError(f"'{value}' is none of {', '.join(get_args(options))}")
    if not 0 < least_frequency <= 1:
        raise RewardError(f"least_frequency={least_frequency}: must lie in (0, 1], e.g. 0.25")
    count, size = _class_sizes(inputs)
    parsed = inputs.answer_class >= 0
    # without an answer a rollout agrees with nobody, itself included where it is to get nothing
    reward = torch.where(parsed, count, float(unparsed == "singleton")) / size
    top = _group_max(torch.where(parsed, count, 1.0), inputs.prompt_index)
    if gate == "max_entropy":
        return torch.where(top > 1, reward, 0.0)
    if gate == "top_frequency":
        return torch.where(top / size >= least_frequency, reward, 0.0)
    return reward


def majority_vote(inputs: RewardInputs) -> Tensor:
    """1 where the answer is the prompt's most frequent one, else 0 (TTRL, arXiv 2504.16084).

    Of several most frequent ones the first to appear counts. Who has no answer does not vote, and a
    prompt without any answer rewards nobody.
    """
    count, _ = _class_sizes(inputs)
    parsed = inputs.answer_class >= 0
    votes = torch.where(parsed, count, 0.0)
    leads = parsed & (votes == _group_max(votes, inputs.prompt_index))
    place = torch.arange(len(votes), device=votes.device)
    first = -_group_max(torch.where(leads, -place, -len(votes)).double(), inputs.prompt_index)
    label = inputs.answer_class[first.long().clamp(max=len(votes) - 1)]  # of the first that leads
    return (parsed & (inputs.answer_class == label)).double()


def _class_sizes(inputs: RewardInputs) -> tuple[Tensor, Tensor]:
    """Rollouts of the prompt in each one's answer class, and in all: (N,) double each."""
    prompt, answer = inputs.prompt_index, inputs.answer_class
    pairs = torch.stack([prompt, answer], dim=1)
    _, which, sizes = pairs.unique(dim=0, return_inverse=True, return_counts=True)
    _, group, totals = prompt.unique(return_inverse=True, return_counts=True)
    return sizes[which].double(), totals[group].double()


def _group_max(x: Tensor, prompt_index: Tensor) -> Tensor:
    """Largest value of each row's prompt group, (N,) -> (N,)."""
    _, group = prompt_index.unique(return_inverse=True)
    top = x.new_full((int(group.max()) + 1,), -torch.inf)
    return top.scatter_reduce(0, group, x, "amax")[group]

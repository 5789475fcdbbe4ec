"""Every reward equals a plain loop over the definition, and reads nothing that it does not name."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powerflow_lit.config import combinations
from powerflow_lit.rewards import (
    READABLE,
    SUPERVISED,
    RewardError,
    RewardInputs,
    answer_frequency,
    correct_answer,
    majority_vote,
    self_certainty,
)
from powerflow_lit.rewards.inputs import checked_reward
from powerflow_lit.rollout import ReplayBuffer
from powerflow_lit.rollout.metrics import rollout_metrics
from powerflow_lit.tasks.arithmetic import Arithmetic
from powerflow_lit.tasks.base import Task
from powerflow_lit.tasks.boxed import BoxedAnswers
from powerflow_lit.types import Prompt, Trajectory, TrajectoryBatch

# (prompt, answer class) of each rollout, prompts interleaved
Rollouts = list[tuple[int, int]]
ROLLOUTS = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), min_size=1, max_size=24)


def inputs(rollouts: Rollouts, **more: torch.Tensor) -> RewardInputs:
    n = len(rollouts)
    return RewardInputs(
        prompt_index=torch.tensor([7 * p for p, _ in rollouts]),
        lengths=torch.ones(n, dtype=torch.long),
        formatted=torch.tensor([a >= 0 for _, a in rollouts]),
        truncated=torch.zeros(n, dtype=torch.bool),
        read={"answer_class": torch.tensor([a for _, a in rollouts]), **more},
    )


def groups(rollouts: Rollouts) -> dict[int, list[int]]:
    """Answer classes of each prompt, in order."""
    found: dict[int, list[int]] = {}
    for prompt, answer in rollouts:
        found.setdefault(prompt, []).append(answer)
    return found


def frequency_by_hand(rollouts: Rollouts, unparsed: str, gate: str, least: float) -> list[float]:
    """EMPO's definition: cluster, semantic entropy, share of the cluster."""
    rewards = []
    for prompt, answer in rollouts:
        answers = groups(rollouts)[prompt]
        size = len(answers)
        # a response without an answer is a cluster of its own
        clusters = Counter(a if a >= 0 else f"none {i}" for i, a in enumerate(answers))
        shares = [count / size for count in clusters.values()]
        entropy = -sum(p * math.log(p) for p in shares)
        reward = clusters[answer] / size if answer >= 0 else (1 / size if unparsed != "zero" else 0)
        if gate == "max_entropy" and entropy > math.log(size) - 1e-9:
            reward = 0.0
        if gate == "top_frequency" and max(shares) < least:
            reward = 0.0
        rewards.append(reward)
    return rewards


@settings(max_examples=60, deadline=None)
@given(
    rollouts=ROLLOUTS,
    unparsed=st.sampled_from(["zero", "singleton"]),
    gate=st.sampled_from(["none", "max_entropy", "top_frequency"]),
    least=st.sampled_from([0.25, 0.5, 0.9]),
)
def test_an_answers_frequency_is_its_clusters_share_behind_either_gate(
    rollouts: Rollouts, unparsed: str, gate: str, least: float
) -> None:
    found = answer_frequency(
        inputs(rollouts),
        unparsed=unparsed,  # type: ignore[arg-type]
        gate=gate,  # type: ignore[arg-type]
        least_frequency=least,
    )
    assert found.tolist() == pytest.approx(frequency_by_hand(rollouts, unparsed, gate, least))


def test_the_gates_of_empo_worked_out_by_hand() -> None:
    frequency = partial(answer_frequency, least_frequency=0.5)
    two_agree = inputs([(0, 0), (0, 1), (0, 0), (0, -1)])
    nobody = inputs([(0, 0), (0, 1), (0, 2), (0, -1)])
    assert frequency(two_agree, unparsed="zero", gate="max_entropy").tolist() == [0.5, 0.25, 0.5, 0]
    assert frequency(nobody, unparsed="zero", gate="max_entropy").tolist() == [0, 0, 0, 0]
    assert frequency(nobody, unparsed="singleton", gate="none").tolist() == [0.25] * 4
    assert frequency(two_agree, unparsed="zero", gate="top_frequency").tolist()[0] == 0.5
    strict = answer_frequency(
        two_agree, unparsed="zero", gate="top_frequency", least_frequency=0.51
    )
    assert strict.tolist() == [0, 0, 0, 0]


def majority_by_hand(rollouts: Rollouts) -> list[float]:
    rewards = []
    for prompt, answer in rollouts:
        votes = Counter(a for a in groups(rollouts)[prompt] if a >= 0)
        label = votes.most_common(1)[0][0] if votes else None  # of several the first to appear
        rewards.append(float(answer >= 0 and answer == label))
    return rewards


@settings(max_examples=60, deadline=None)
@given(rollouts=ROLLOUTS)
def test_a_majority_rewards_the_votes_for_it_and_nobody_without_votes(rollouts: Rollouts) -> None:
    assert majority_vote(inputs(rollouts)).tolist() == majority_by_hand(rollouts)


def test_correctness_and_certainty_are_passed_on() -> None:
    three = [(0, 0), (0, 1), (1, -1)]
    right, sure = torch.tensor([True, False, True]), torch.tensor([0.5, 2.0, 1.0])
    assert correct_answer(inputs(three, correct=right)).tolist() == [1.0, 0.0, 1.0]
    assert self_certainty(inputs(three, self_certainty=sure)).tolist() == [0.5, 2.0, 1.0]


# --- what a reward may see -----------------------------------------------------------------------


@pytest.mark.parametrize("reward", [correct_answer, self_certainty])
def test_what_a_strategy_does_not_name_its_reward_cannot_see(reward: object) -> None:
    assert callable(reward)
    with pytest.raises(RewardError, match=r"uses \w+: name it in strategy.reward.reads"):
        reward(inputs([(0, 0)]))


def test_configuration_and_rewards_know_the_same_names() -> None:
    assert combinations.READABLE == READABLE
    assert combinations.SUPERVISED == SUPERVISED


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(3), r"returned \(3,\), not a tensor \(2,\)"),
        ([0.0, 1.0], r"returned list, not a tensor \(2,\)"),
        (torch.tensor([0.0, math.nan]), "returned nan at rollout 1"),
    ],
)
def test_a_reward_must_be_one_finite_number_a_rollout(returned: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        checked_reward(lambda _: returned, inputs([(0, 0), (0, 1)]))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unparsed": "skip"}, "'skip' is none of zero, singleton"),
        ({"gate": "entropy"}, "'entropy' is none of none, max_entropy"),
        ({"least_frequency": 0.0}, "least_frequency=0.0"),
    ],
)
def test_options_that_do_not_exist_are_named(options: dict[str, object], message: str) -> None:
    chosen = {"unparsed": "zero", "gate": "none", "least_frequency": 0.25, **options}
    with pytest.raises(RewardError, match=message):
        answer_frequency(inputs([(0, 0)]), **chosen)  # type: ignore[arg-type]


# --- equivalence of answers, from the task -------------------------------------------------------


class Answers(BoxedAnswers):
    name, headline = "answers", "pass@1"

    def train_prompts(self) -> list[Prompt]:
        return []

    def eval_prompts(self) -> list[Prompt]:
        return []


def boxed(*answers: str | None) -> list[str]:
    return ["no box" if a is None else f"so \\boxed{{{a}}}" for a in answers]


def test_answers_of_the_same_meaning_are_one_class() -> None:
    responses = boxed(r"\frac{1}{2}", "0.5", None, "3", "x=3", r"\dfrac12", "4", None)
    found = Answers().answer_classes(Prompt(0, "q", None), responses)
    assert found == [0, 0, -1, 1, 1, 0, 2, -1]


def test_the_embedded_task_compares_answers_as_text() -> None:
    task = Arithmetic(train_size=1, eval_size=1, seed=0)
    assert isinstance(next(iter(task.train_prompts())), Prompt)
    assert task.answer_classes(Prompt(0, "q"), boxed("3", "1+2", "3", None)) == [0, 1, 0, -1]


def test_a_task_without_answers_says_so() -> None:
    class Prose(Answers):
        answer = Task.answer

    assert Answers().has_answers
    assert not Prose().has_answers


# --- rewards on their way to the loss ------------------------------------------------------------


def rollout(group: int, reward: float | None) -> Trajectory:
    return Trajectory(
        prompt=Prompt(group, "q"), group=group, prompt_ids=(1,), response_ids=(5, 2), response="r",
        truncated=False, formatted=True, correct=None, policy_version=0, reward=reward,
        log_p_old=torch.tensor([-0.5, -0.25]), log_p_base=torch.tensor([-1.0, -0.5]),
    )  # fmt: skip


def test_rewards_outlive_a_checkpoint_and_reach_the_batch(tmp_path: Path) -> None:
    buffers = [
        ReplayBuffer(max_staleness=0, updates_per_refill=1, prompts_per_update=None, seed=0)
        for _ in range(2)
    ]
    buffers[0].add([rollout(g, r) for g, r in ((0, 0.25), (0, 1.0), (1, -3.5), (1, 0.0))], 0)
    torch.save(buffers[0].state_dict(), tmp_path / "state")
    buffers[1].load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for buffer in buffers:
        (batch,) = buffer.updates(pad_id=0)
        batch = batch.to(torch.device("cpu"))
        assert batch.reward is not None
        found = sorted(zip(batch.prompt_id.tolist(), batch.reward.tolist(), strict=True))
        assert found == [(0, 0.25), (0, 1.0), (1, -3.5), (1, 0.0)]


def test_rollouts_without_rewards_make_a_batch_without_and_a_mixture_is_refused() -> None:
    assert TrajectoryBatch.collate([rollout(0, None)], pad_id=0).reward is None
    with pytest.raises(ValueError, match="1 of 2 trajectories have a reward"):
        TrajectoryBatch.collate([rollout(0, None), rollout(0, 1.0)], pad_id=0)


def test_metrics_say_how_many_prompts_teach_nothing() -> None:
    rewards = [(0, 1.0), (0, 1.0), (1, 0.0), (1, 1.0), (2, 0.5), (2, 0.5)]
    found = rollout_metrics([rollout(g, r) for g, r in rewards])
    assert found["rollout/reward_mean"] == pytest.approx(4 / 6)
    assert found["rollout/reward_std"] == pytest.approx(statistics.pstdev(r for _, r in rewards))
    assert found["rollout/reward_flat_frac"] == pytest.approx(2 / 3)
    assert not any("reward" in name for name in rollout_metrics([rollout(0, None)]))

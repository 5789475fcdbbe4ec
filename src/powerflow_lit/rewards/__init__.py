"""Rewards of rollouts as pure functions of what a refill holds; one place for each definition."""

from powerflow_lit.rewards.inputs import READABLE, SUPERVISED, RewardError, RewardInputs
from powerflow_lit.rewards.rewards import (
    answer_frequency,
    correct_answer,
    majority_vote,
    self_certainty,
)

__all__ = [
    "READABLE",
    "SUPERVISED",
    "RewardError",
    "RewardInputs",
    "answer_frequency",
    "correct_answer",
    "majority_vote",
    "self_certainty",
]

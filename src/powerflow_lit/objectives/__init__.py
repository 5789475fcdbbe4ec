"""The paper's objectives and its rivals' as pure functions; one place for each equation."""

from powerflow_lit.objectives.balance import (
    BalanceObjective,
    flowrl_mismatch,
    format_only_mismatch,
    la_tb,
    la_tb_mismatch,
    powerflow,
    tb_token,
    tb_token_mismatch,
    tb_traj,
    tb_traj_mismatch,
    token_variance,
)
from powerflow_lit.objectives.blockwise import BlockVariance
from powerflow_lit.objectives.entropy import EntropyObjective
from powerflow_lit.objectives.inputs import (
    LossInputs,
    LossOutput,
    NonFiniteInputError,
    ObjectiveError,
)
from powerflow_lit.objectives.log_z import group_log_z, leave_one_out_log_z
from powerflow_lit.objectives.policy_gradient import (
    PolicyGradientObjective,
    RewardObjective,
    rl_token,
    rl_traj,
)
from powerflow_lit.objectives.weights import ImportanceWeight, PpoClip

__all__ = [
    "BalanceObjective",
    "BlockVariance",
    "EntropyObjective",
    "ImportanceWeight",
    "LossInputs",
    "LossOutput",
    "NonFiniteInputError",
    "ObjectiveError",
    "PolicyGradientObjective",
    "PpoClip",
    "RewardObjective",
    "flowrl_mismatch",
    "format_only_mismatch",
    "group_log_z",
    "la_tb",
    "la_tb_mismatch",
    "leave_one_out_log_z",
    "powerflow",
    "rl_token",
    "rl_traj",
    "tb_token",
    "tb_token_mismatch",
    "tb_traj",
    "tb_traj_mismatch",
    "token_variance",
]

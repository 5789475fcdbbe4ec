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
    Alpha,
    LossInputs,
    LossOutput,
    NonFiniteInputError,
    ObjectiveError,
)
from powerflow_lit.objectives.length_price import (
    LengthFit,
    PerToken,
    length_fit,
    solve_length_price,
    tilted_length,
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
    "Alpha",
    "BalanceObjective",
    "BlockVariance",
    "EntropyObjective",
    "ImportanceWeight",
    "LengthFit",
    "LossInputs",
    "LossOutput",
    "NonFiniteInputError",
    "ObjectiveError",
    "PerToken",
    "PolicyGradientObjective",
    "PpoClip",
    "RewardObjective",
    "flowrl_mismatch",
    "format_only_mismatch",
    "group_log_z",
    "la_tb",
    "la_tb_mismatch",
    "leave_one_out_log_z",
    "length_fit",
    "powerflow",
    "rl_token",
    "rl_traj",
    "solve_length_price",
    "tb_token",
    "tb_token_mismatch",
    "tb_traj",
    "tb_traj_mismatch",
    "tilted_length",
    "token_variance",
]

"""Generation engines and the replay buffer."""

from powerflow_lit.rollout.buffer import ReplayBuffer
from powerflow_lit.rollout.engine import EngineError, RolloutEngine

__all__ = ["EngineError", "ReplayBuffer", "RolloutEngine"]

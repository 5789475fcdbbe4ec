"""The errors that a user can mend; entry points print them in one line, without a traceback."""

from hydra.errors import InstantiationException

from powerflow_lit.config.checks import ConfigError
from powerflow_lit.disk import DiskError
from powerflow_lit.judging.endpoint import JudgeError
from powerflow_lit.models.loading import ModelError
from powerflow_lit.monitor import MonitorError
from powerflow_lit.objectives import ObjectiveError
from powerflow_lit.resume import CheckpointError
from powerflow_lit.rollout import EngineError
from powerflow_lit.tasks.base import TaskError

USER_ERRORS = (
    ConfigError, ModelError, TaskError, EngineError, ObjectiveError, MonitorError,
    JudgeError, CheckpointError, DiskError, InstantiationException,
)  # fmt: skip


def root_cause(error: Exception) -> BaseException:
    """What an `_target_` said when it refused its arguments, without Hydra's frame around it."""
    wrapped = isinstance(error, InstantiationException) and error.__cause__ is not None
    return error.__cause__ if wrapped and error.__cause__ else error

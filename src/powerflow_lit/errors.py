"""The errors that a user can mend; entry points print them in one line, without a traceback."""

from powerflow_lit.config.checks import ConfigError
from powerflow_lit.models.loading import ModelError
from powerflow_lit.objectives import ObjectiveError
from powerflow_lit.rollout import EngineError
from powerflow_lit.tasks.base import TaskError

USER_ERRORS = (ConfigError, ModelError, TaskError, EngineError, ObjectiveError)

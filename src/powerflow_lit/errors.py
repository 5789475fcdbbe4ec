"""How the errors that a user can mend are shown: in one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException

from powerflow_lit.config.launching import refuse
from powerflow_lit.mendable import MendableError

USER_ERRORS = (MendableError, InstantiationException)
DIVERGED = 4  # exit code


def root_cause(error: BaseException) -> BaseException:
    """What an `_target_` said when it refused its arguments, without Hydra's frame around it."""
    wrapped = isinstance(error, InstantiationException) and error.__cause__ is not None
    return error.__cause__ if wrapped and error.__cause__ else error


def line_of(error: BaseException) -> str:
    """An error's message in one line."""
    cause = root_cause(error)
    return " ".join(str(cause).split()) or type(cause).__name__


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turns errors that a user can mend into their line on stderr and exit code 2."""
    try:
        yield
    except USER_ERRORS as error:
        refuse(line_of(error))

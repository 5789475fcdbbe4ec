"""How the errors that a user can mend are shown: in one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException

from powerflow_lit.config.launching import TRACEBACKS, refuse
from powerflow_lit.mendable import MendableError

FEW_WORDS = 3  # of a message that does not say what it is about, such as "math domain error"
USER_ERRORS = (MendableError, InstantiationException)
DIVERGED = 4  # exit code


def root_cause(error: BaseException) -> BaseException:
    """What an `_target_` said when it refused its arguments, without Hydra's frame around it."""
    wrapped = isinstance(error, InstantiationException) and error.__cause__ is not None
    return error.__cause__ if wrapped and error.__cause__ else error


def is_refusal(error: BaseException) -> bool:
    """Whether a line says all about an error; of any other a traceback has to be seen.

    That is what this package says of a value, and what a class says of its arguments: that it was
    not found, a TypeError or a ValueError; Lightning's Trainer also says it with errors of other
    types. Who asked for tracebacks gets a line of the first only.
    """
    cause = root_cause(error)
    if isinstance(cause, MendableError):
        return True
    if not isinstance(error, InstantiationException) or TRACEBACKS.get():
        return False
    if str(error).startswith("Error locating target"):
        missing = isinstance(cause.__cause__, ModuleNotFoundError | None)
        return missing or "is an attribute of" in str(cause)  # else its module has a fault
    of_lightning = str(error).startswith("Error in call to target 'lightning.")
    return cause is error or of_lightning or isinstance(cause, TypeError | ValueError)


def line_of(error: BaseException) -> str:
    """An error's message in one line, with its type's name where the message alone is too short."""
    cause = root_cause(error)
    words = str(cause).split()
    if isinstance(cause, MendableError) or len(words) > FEW_WORDS:
        return " ".join(words)
    return ": ".join([type(cause).__name__, *([" ".join(words)] if words else [])])


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turns errors that a user can mend into their line on stderr and exit code 2.

    A fault in a class of the user's own passes, for its traceback.
    """
    try:
        yield
    except USER_ERRORS as error:
        if not is_refusal(error):
            raise
        refuse(line_of(error))

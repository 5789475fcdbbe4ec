"""Python's search for garbage, kept away from the half a million objects that imports leave.

The libraries of a run leave nothing to collect, yet Python looks through all that they have made
again and again while it imports them, and vLLM asks for it several times more as it starts.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def not_searched() -> Iterator[None]:
    """Within, nothing is searched for garbage, unless a library asks for it."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


@contextmanager
def imports_left_out() -> Iterator[None]:
    """For a process's heavy imports: not searched meanwhile, nor later.

    Only the first time that it ends: a later job of the same process would leave out what the one
    before it no longer needs, models among it.
    """
    with not_searched():
        yield
        _leave_out()


@cache
def _leave_out() -> None:
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries would report all of it as leaked

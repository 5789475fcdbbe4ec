"""Searches for garbage: none while libraries are imported, and what they made is never in one."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from powerflow_lit.garbage import not_searched

# 40,000 containers make 57 searches of the youngest objects by themselves
SEARCHES = """
import gc
from powerflow_lit.garbage import imports_left_out, not_searched

class Job:
    pass

searches = []
gc.callbacks.append(lambda phase, info: searches.append(phase))
with imports_left_out():
    library = [[] for _ in range(40_000)]
assert not searches, searches
left_out = gc.get_freeze_count()
assert left_out >= 40_000, left_out
assert gc.isenabled()

first = Job()  # what a job leaves behind, in a circle
first.itself = first
with imports_left_out():
    pass
del first
assert gc.get_freeze_count() == left_out
assert gc.collect() >= 1
more = [[] for _ in range(40_000)]
assert searches, "searched again"
"""


def test_imports_are_not_searched_and_a_later_job_leaves_nothing_out() -> None:
    subprocess.run([sys.executable, "-c", SEARCHES], check=True)


def test_searching_goes_on_after_an_error_and_stays_off_where_it_was_off() -> None:
    with not_searched():
        assert not gc.isenabled()
    with pytest.raises(ValueError, match="refused"), not_searched():
        raise ValueError("refused")
    assert gc.isenabled()
    gc.disable()
    try:
        with not_searched():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

"""Compares answers as mathematics; runs as a process of its own (see `tasks/symbolic.py`).

Reads a line of JSON `[answer, reference]`, writes `1` or `0`. A comparison that takes more than
the given CPU seconds ends this process: the timer's signal has no handler, so that the kernel
stops even a single huge operation inside sympy, and no handler of anybody's is touched.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Expr, Float

MEMORY = 4 << 30  # bytes of address space
DIGITS = 5e-6  # of a decimal: six digits, five places where there are more (as in answers.py)
NOISE = 1e-9  # exact values agree to this share of their size; sympy chops what is tiny to 0
LATEX = [LatexExtractionConfig(boxed_match_priority=0)]


@lru_cache(maxsize=4096)
def parsed(latex: str) -> list[Any]:
    """The expression written by `latex`, in a list; empty where it cannot be understood."""
    found: list[Any] = parse(
        f"\\boxed{{{latex}}}",
        LATEX,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return found


def same(answer: str, reference: str) -> bool:
    """Whether both are understood and mean the same."""
    target, gold = parsed(answer), parsed(reference)
    if not target or not gold or not _close(target[0], gold[0]):
        return False
    decimals = _number(target[0]) and _number(gold[0]) and _decimal(target[0], gold[0])
    return decimals or verify(gold, target, allow_set_relation_comp=True, timeout_seconds=None)


def _close(a: Any, b: Any) -> bool:
    """False for two numbers that differ; True where either is no number."""
    if not (_number(a) and _number(b)):
        return True
    x, y = a.doit().evalf(30), b.doit().evalf(30)
    if not (x.is_number and y.is_number):
        return True
    if _decimal(a, b):
        return bool(abs(x - y) <= DIGITS * min(1, abs(y)))
    return bool(abs(x - y) <= NOISE * max(abs(x), abs(y)))


def _number(a: Any) -> bool:
    return isinstance(a, Expr) and not a.free_symbols and bool(a.is_number)


def _decimal(*expressions: Basic) -> bool:
    return any(e.has(Float) for e in expressions)


def serve(cpu_seconds: float) -> None:
    """Answers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to deal with
    logging.disable(logging.CRITICAL)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no reply
    replies.write("ready\n")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            equal = same(*json.loads(line))
        except (Exception, RecursionError):  # sympy raises whatever it likes on odd input
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write("1\n" if equal else "0\n")


if __name__ == "__main__":
    serve(float(sys.argv[1]))

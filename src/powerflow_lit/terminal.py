"""The terminal as the entry points use it; imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


def wide_console() -> Console:
    """The terminal as it is, or wide lines where output goes to a file."""
    return Console() if Console().is_terminal else Console(width=140)


@contextmanager
def note_while(text: str) -> Iterator[None]:
    """A line on the terminal for as long as something takes; nothing where there is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    sys.stderr.write(f"{text} ...\r")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

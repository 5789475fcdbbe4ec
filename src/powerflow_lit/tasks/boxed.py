"""Answers in `\\boxed{}`: extraction with brace matching."""

from __future__ import annotations

MARK = "\\boxed{"


def last_boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}`, nested braces kept; None if there is none."""
    start = text.rfind(MARK)
    while start >= 0:
        depth = 0
        for position in range(start + len(MARK) - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len(MARK) : position].strip()
        start = text.rfind(MARK, 0, start)
    return None

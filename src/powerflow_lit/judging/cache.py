"""Answers of a server, kept line by line, so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def key_of(request: Mapping[str, Any]) -> str:
    """sha256 of a request: model, messages or text, and all sampling parameters."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


class AnswerCache:
    """A jsonl file of `{"key": ..., **answer}`, appended as answers arrive; safe between threads.

    A line that a killed run left torn is passed over, and the next answer starts a new line.

    Args:
        path: the file, made with its folder on the first answer; None keeps answers in memory.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._answers: dict[str, dict[str, Any]] = {}
        self._torn = False
        if self.path is not None and self.path.exists():
            content = self.path.read_bytes()
            self._torn = bool(content) and not content.endswith(b"\n")
            for line in content.splitlines():
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            answer = json.loads(line)
            self._answers[answer.pop("key")] = answer
        except (ValueError, KeyError, AttributeError, TypeError):
            return  # torn

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> dict[str, Any] | None:
        return self._answers.get(key)

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keeps an answer, in the file before this returns."""
        line = json.dumps({"key": key, **answer}, ensure_ascii=True) + "\n"
        with self._lock:
            self._answers[key] = dict(answer)
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._torn else line)
            self._torn = False

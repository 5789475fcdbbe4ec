"""Tasks whose answers stand in `\\boxed{}`: extraction with brace matching, and their figures."""

from __future__ import annotations

from powerflow_lit.tasks.base import Sampled, Task, correctness_metrics
from powerflow_lit.types import Prompt

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


class BoxedAnswers(Task):
    """A task with reference answers, the response's being its last `\\boxed{}`."""

    def is_formatted(self, response: str) -> bool:
        return self.answer(response) is not None

    def same_answer(self, answer: str, reference: str) -> bool:
        """Whether an extracted answer is the reference's."""
        return answer == reference

    def answer(self, response: str) -> str | None:
        return last_boxed(response)

    def is_correct(self, prompt: Prompt, response: str) -> bool | None:
        return self._is_right(prompt, self.answer(response))

    def score(self, sample: Sampled) -> dict[str, float]:
        answers = [self.answer(r.text) for r in sample.responses]
        correct = [bool(self._is_right(sample.prompt, a)) for a in answers]
        unique = {r.token_ids for r, right in zip(sample.responses, correct, strict=True) if right}
        return {
            **correctness_metrics(answers, correct),
            f"unique_correct@{len(correct)}": len(unique),
            **self.text_metrics(sample),
        }

    def _is_right(self, prompt: Prompt, answer: str | None) -> bool | None:
        if prompt.reference is None:
            return None
        return answer is not None and self.same_answer(answer, prompt.reference)

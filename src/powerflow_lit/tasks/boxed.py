"""Tasks whose answers stand in `\\boxed{}`: their format, their correctness and their figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from powerflow_lit.metrics.at_k import cluster
from powerflow_lit.tasks import answers as equality
from powerflow_lit.tasks.answers import last_boxed as last_boxed
from powerflow_lit.tasks.answers import parsable
from powerflow_lit.tasks.base import Sampled, Task, class_numbers, correctness_metrics
from powerflow_lit.types import Prompt


class BoxedAnswers(Task):
    """A task with reference answers, the response's being its last `\\boxed{}`.

    Attributes:
        marks_unparsable: set by `check_references` where a reference cannot be matched by any
            response; the figures then say which prompts those are, and avg@k without them.
    """

    is_prose = False
    marks_unparsable = False

    def is_formatted(self, response: str) -> bool:
        return self.answer(response) is not None

    def same_answer(self, answer: str, reference: str) -> bool:
        """Whether an extracted answer means the same as the reference (docs/scoring.md)."""
        return equality.same_answer(answer, reference)

    def answer(self, response: str) -> str | None:
        return last_boxed(response)

    def meaning(self, prompt: Prompt, answer: str) -> str:
        """What an extracted answer says for this prompt, where that is not the answer itself."""
        return answer

    def answer_classes(self, prompt: Prompt, responses: Sequence[str]) -> list[int]:
        boxes = [self.answer(response) for response in responses]
        answers = [None if box is None else self.meaning(prompt, box) for box in boxes]
        return class_numbers(cluster(answers, self.same_answer))

    def is_correct(self, prompt: Prompt, response: str) -> bool | None:
        box = self.answer(response)
        return self._is_right(prompt, None if box is None else self.meaning(prompt, box))

    def score(self, sample: Sampled) -> dict[str, float]:
        boxes = [self.answer(r.text) for r in sample.responses]
        answers = [None if box is None else self.meaning(sample.prompt, box) for box in boxes]
        correct = [bool(self._is_right(sample.prompt, a)) for a in answers]
        unique = {r.token_ids for r, right in zip(sample.responses, correct, strict=True) if right}
        figures = {
            **correctness_metrics(self._votes(sample.prompt, answers, correct), correct),
            f"unique_correct@{len(correct)}": len(unique),
            **self.text_metrics(sample),
        }
        if self.marks_unparsable:
            lost = sample.prompt.reference is not None and not parsable(sample.prompt.reference)
            average = f"avg@{len(correct)}"
            figures["unparsable_reference"] = float(lost)
            figures[f"{average}_parsable"] = math.nan if lost else figures[average]
        return figures

    def check_references(self, prompts: Sequence[Prompt]) -> tuple[str, ...]:
        """Notes on references that no response can match; without any, none.

        Such prompts keep counting as wrong, as in other evaluators, but figures and notes say so.
        """
        given = [p.reference for p in prompts if p.reference is not None]
        lost = [r for r in given if not parsable(r)]
        if not lost:
            return ()
        self.marks_unparsable = True
        examples = ", ".join(lost[:3])
        return (
            f"{len(lost)} of {len(given)} references cannot match even themselves (cut at a "
            f"brace?), e.g. {examples}: their questions count as wrong in avg@k; "
            f"avg@k_parsable is over the other {len(given) - len(lost)}",
        )

    def _votes(
        self, prompt: Prompt, answers: Sequence[str | None], correct: Sequence[bool]
    ) -> list[str | None]:
        """Each answer's equivalence class; what equals the reference is one class."""
        pairs = list(zip(answers, correct, strict=True))
        wrong = cluster([None if right else a for a, right in pairs], self.same_answer)
        return [
            prompt.reference if right else vote
            for (_, right), vote in zip(pairs, wrong, strict=True)
        ]

    def _is_right(self, prompt: Prompt, answer: str | None) -> bool | None:
        if prompt.reference is None:
            return None
        return answer is not None and self.same_answer(answer, prompt.reference)

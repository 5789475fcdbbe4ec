"""`task=creative`: short jokes, poems and stories for a topic, judged by their grammar."""

from __future__ import annotations

from collections.abc import Sequence

from powerflow_lit.corpora import creative as corpus
from powerflow_lit.tasks.base import Sampled, Task
from powerflow_lit.types import Prompt


class Creative(Task):
    """All prompts of the grammar, for training and evaluation alike (as the paper's 300 are few).

    Quality is the share of valid pieces; diversity counts the modes (ideas) and the unique valid
    pieces among the samples of a prompt.
    """

    name = "creative"

    def __init__(self) -> None:
        self.headline = "quality"
        self._requests = corpus.requests()
        self._prompts = [Prompt(i, r.prompt) for i, r in enumerate(self._requests)]

    def train_prompts(self) -> Sequence[Prompt]:
        return self._prompts

    def eval_prompts(self) -> Sequence[Prompt]:
        return self._prompts

    def is_correct(self, prompt: Prompt, response: str) -> bool:
        return corpus.parse(self._requests[prompt.id], response) is not None

    def score(self, sample: Sampled) -> dict[str, float]:
        request = self._requests[sample.prompt.id]
        parsed = [(r.text, corpus.parse(request, r.text)) for r in sample.responses]
        valid = [(text, p.mode) for text, p in parsed if p is not None]
        k = len(parsed)
        return {
            "quality": len(valid) / k,
            f"modes@{k}": len({mode for _, mode in valid}),
            f"unique_valid@{k}": len({text for text, _ in valid}),
            **self.text_metrics(sample),
        }

"""Makes an engine give every response the length that the workload says.

The k-th response to a prompt gets the k-th length of that prompt, in whatever order an engine is
asked. Both contenders meet the same hooks, one at vLLM's engine core and one at `generate` of
transformers, below everything that they do themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMixin

Ids = tuple[int, ...]


class ImposedLengths:
    """Deals out the lengths of a workload; `restart` before each refill.

    Args:
        lengths: of the responses, by the prompt's token ids.
    """

    def __init__(self, lengths: Mapping[Ids, Sequence[int]]) -> None:
        self._lengths = lengths
        self._given: Counter[Ids] = Counter()
        self._at_most: int | None = None
        self._begun: dict[Ids, int] = {}  # tokens to come, by those that are there

    def restart(self, at_most: int | None = None) -> None:
        """Begin the next refill, every response cut to so many tokens where that is given."""
        self._given.clear()
        self._begun.clear()
        self._at_most = at_most

    def next(self, prompt: Ids) -> int | None:
        """The length of the next response to the prompt; None where the workload has no say."""
        lengths = self._lengths.get(prompt)
        if lengths is None:
            return None
        self._given[prompt] += 1
        length = lengths[(self._given[prompt] - 1) % len(lengths)]
        return length if self._at_most is None else min(length, self._at_most)

    # --- vLLM -----------------------------------------------------------------------------------

    def install_in_vllm(self) -> None:
        """Each request runs to its length, end-of-sequence tokens notwithstanding."""
        from vllm.v1.engine.core_client import InprocClient

        add_request, lengths = InprocClient.add_request, self

        def add_imposed(client: Any, request: Any) -> Any:
            length = lengths.next(tuple(request.prompt_token_ids or ()))
            if length is not None and request.sampling_params is not None:
                # a clone: requests may share one object
                parameters = request.sampling_params.clone()
                parameters.max_tokens = length
                parameters.ignore_eos = True
                parameters.stop_token_ids = []
                parameters._eos_token_id = None  # set from `ignore_eos` before this hook
                request.sampling_params = parameters
            return add_request(client, request)

        InprocClient.add_request = add_imposed

    # --- transformers ---------------------------------------------------------------------------

    def install_in_transformers(self, eos_id: int) -> None:
        """Each row ends at its length with an end-of-sequence token, and not before.

        A row that is taken up again, as our engine does in stages, keeps its length.
        """
        generate, lengths = GenerationMixin.generate, self

        def generate_imposed(model: Any, inputs: Any = None, **options: Any) -> Any:
            ids = inputs if inputs is not None else options["input_ids"]
            keep = options["attention_mask"].bool()
            kept = [tuple(i[k].tolist()) for i, k in zip(ids, keep, strict=True)]
            rows = [lengths.still(row) for row in kept]
            known = [row for row in rows if row is not None]
            if len(known) < len(rows):
                return generate(model, inputs, **options)
            own = options.pop("logits_processor", None) or []
            ends = EndsAt(torch.tensor(known), eos_id, prompt_width=ids.shape[1])
            options["logits_processor"] = LogitsProcessorList([*own, ends])
            output = generate(model, inputs, **options)
            made = output[:, ids.shape[1] :].tolist()
            for row, new, length in zip(kept, made, known, strict=True):
                lengths.leave(row + tuple(new), length - len(new))
            return output

        GenerationMixin.generate = generate_imposed

    def still(self, row: Ids) -> int | None:
        """Tokens that a row has yet to make: of a response that was begun, or of a new one."""
        return self._begun.pop(row) if row in self._begun else self.next(row)

    def leave(self, row: Ids, tokens: int) -> None:
        """The row as `generate` leaves it, with so many tokens to come."""
        if tokens > 0:
            self._begun[row] = tokens


class EndsAt(LogitsProcessor):
    """Forbids the end of sequence before a row's length and forces it there.

    Args:
        lengths: (N,) tokens of each response, its end included.
        prompt_width: tokens of the padded prompts.
    """

    def __init__(self, lengths: Tensor, eos_id: int, *, prompt_width: int) -> None:
        self.lengths, self.eos_id, self.prompt_width = lengths, eos_id, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        made = input_ids.shape[1] - self.prompt_width
        ends = (self.lengths == made + 1).nonzero()[:, 0].to(scores.device)
        scores = scores.clone()
        scores[:, self.eos_id] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, self.eos_id] = 0.0
        return scores

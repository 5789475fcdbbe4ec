"""What the arithmetic alone takes on this machine: `python -m benchmarks.bound JSON`.

The same model through the same kernels, fed with exactly the useful tokens (unpadded, each prompt
once a group) as dense rows of equal length. Scoring is one pass of the base without gradients,
with log-probs at the response tokens; an update is one pass with gradients and a step of fused
AdamW. What neither needs is left out: no behaviour log-probs, no metrics, no log Z.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from benchmarks.models import shape_of
from benchmarks.sampler import StaticSampler
from benchmarks.turns import Gate
from benchmarks.workloads import FIRST_WORD, Workload

WHOLE_LOGITS_MB = 256  # logits up to here are made at once, more of them by the chunk
CHUNK_ROWS = 128
TOKENS_AT_ONCE = (2048, 8192)  # budgets of a pass; the faster is taken


@dataclass(frozen=True)
class Dense:
    """Rows of equal length that hold so many tokens, of which so many are of responses."""

    rows: int
    length: int
    response_tokens: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @classmethod
    def of(cls, useful: int, response_tokens: int, sequences: int) -> Dense:
        """The shape next to so many sequences that holds the useful tokens most nearly."""
        around = range(max(1, round(0.9 * sequences)), round(1.1 * sequences) + 1)
        shapes = [(rows, max(1, round(useful / rows))) for rows in around]
        rows, length = min(shapes, key=lambda s: (abs(s[0] * s[1] - useful), abs(s[0] - sequences)))
        return cls(rows, length, min(response_tokens, rows * length))

    def parts(self, tokens_at_once: int) -> list[Dense]:
        """Cut into passes of at most so many tokens; the responses are shared out evenly."""
        per_pass = max(1, tokens_at_once // self.length)
        passes = -(-self.rows // per_pass)
        even = [self.rows * (i + 1) // passes - self.rows * i // passes for i in range(passes)]
        ends = [self.response_tokens * sum(even[: i + 1]) // self.rows for i in range(passes)]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return [Dense(r, self.length, n) for r, n in zip(even, counts, strict=True)]


def score_and_updates(workload: Workload) -> tuple[Dense, list[Dense]]:
    """The tokens of a refill's scoring and of its updates."""
    whole = Dense.of(workload.useful_tokens, workload.response_tokens, workload.trajectories)
    share = workload.updates
    update = Dense.of(
        workload.useful_tokens // share, workload.response_tokens // share,
        workload.trajectories // share,
    )  # fmt: skip
    return whole, [update] * share


def negative_log_prob(model: Any, part: Dense, ids: Tensor) -> Tensor:
    """Summed over the response tokens of a pass, () nats. ids: (rows, length)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    states = hidden.reshape(-1, hidden.shape[-1])[: part.response_tokens]
    targets = ids.reshape(-1)[: part.response_tokens]
    weight = model.lm_head.weight
    if len(states) * len(weight) * 4 <= WHOLE_LOGITS_MB * 1e6:
        return cross_entropy(linear(states, weight), targets, reduction="sum")
    fused: Any = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is not None:  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS)
        return fused(states, weight, targets, reduction="sum", options=options)  # type: ignore[no-any-return]
    from powerflow_lit.models.linear_log_prob import linear_log_prob

    return -linear_log_prob(
        states, weight, targets,
        bias=None, scale=1.0, soft_cap=None, temperature=1.0, rows_per_chunk=CHUNK_ROWS,
    ).sum()  # fmt: skip


class Bound:
    """Scoring, updates and sampling of one refill."""

    def __init__(self, workload: Workload, folder: str, *, device: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        load: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        self.policy = AutoModelForCausalLM.from_pretrained(folder, **load).to(device).eval()
        self.base = AutoModelForCausalLM.from_pretrained(folder, **load).to(device).eval()
        self.base.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=True)
        self.vocabulary = shape_of(workload.shape).vocabulary
        self.to_score, self.to_update = score_and_updates(workload)
        self.sampler = StaticSampler(
            self.base, workload.prompt_ids(self.vocabulary), workload.response_lengths()
        )
        self.tokens_at_once = dict.fromkeys(("score", "update"), max(TOKENS_AT_ONCE))

    def tune(self) -> None:
        """Choose the budget of a pass by the rate of one pass of each; also the warm-up."""
        self.optimizer.zero_grad(set_to_none=True)
        jobs = {"score": (self.to_score, self._pass_over_base),
                "update": (self.to_update[0], self._pass_with_gradient)}  # fmt: skip
        for name, (dense, run) in jobs.items():
            run(dense.parts(TOKENS_AT_ONCE[0])[0])
            rates = {}
            for budget in TOKENS_AT_ONCE:
                part = dense.parts(budget)[0]
                rates[budget] = part.tokens / _timed(partial(run, part))
            self.tokens_at_once[name] = max(rates, key=rates.__getitem__)

    def score(self) -> None:
        for part in self.to_score.parts(self.tokens_at_once["score"]):
            self._pass_over_base(part)

    def update(self) -> None:
        """All updates of a refill."""
        for dense in self.to_update:
            self.optimizer.zero_grad(set_to_none=True)
            for part in dense.parts(self.tokens_at_once["update"]):
                self._pass_with_gradient(part)
            self.optimizer.step()

    @torch.no_grad()
    def _pass_over_base(self, part: Dense) -> None:
        negative_log_prob(self.base, part, self._ids(part))

    def _pass_with_gradient(self, part: Dense) -> None:
        negative_log_prob(self.policy, part, self._ids(part)).backward()

    def _ids(self, part: Dense) -> Tensor:
        shape = (part.rows, part.length)
        return torch.randint(FIRST_WORD, self.vocabulary, shape, device=self.policy.device)


def _timed(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    settings: Mapping[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    workload = Workload(**settings["workload"])
    gate = Gate()
    bound = Bound(workload, settings["model"], device="cpu", dtype="float32")
    bound.tune()
    tokens = 0
    while True:
        gate.wait(tokens_so_far=tokens, tokens_at_once=bound.tokens_at_once)
        with gate.phase("rollout"):
            tokens += bound.sampler()[1]
        with gate.phase("score"):
            bound.score()
        with gate.phase("update"):
            bound.update()


if __name__ == "__main__":
    main()

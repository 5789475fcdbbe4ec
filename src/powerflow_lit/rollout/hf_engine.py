"""Portable rollouts with `transformers`' own `generate`: slower than vLLM, runs anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.lora import plain_copy
from powerflow_lit.models.sharding import whole
from powerflow_lit.rollout.decoding import FewLeft, prefill, row_cache
from powerflow_lit.rollout.engine import (
    SEED_STRIDE,
    EngineError,
    EngineSpec,
    NonFiniteRolloutError,
    OnFinished,
    check_weights,
)
from powerflow_lit.types import Completion, Sampling, TokenBatch


class RefuseNonFinite(LogitsProcessor):
    """Ends generation at the first logits that cannot be sampled from, with a name for it.

    On the CPU torch would say that a probability tensor holds NaN; a GPU's process would be lost.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        greatest = scores.amax(-1)  # (N,); NaN where any is
        if not bool(greatest.isfinite().all()):
            bad = int((~greatest.isfinite()).sum())
            raise NonFiniteRolloutError(
                f"the next token's logits hold NaN or infinity in {bad} of {len(scores)} responses"
            )
        return scores


class DrawFromSeeds(LogitsProcessor):
    """Leaves each response's next token, drawn from a seed of its own, as that of greatest score.

    With E from the exponential distribution, the greatest of log p - log E is a draw from p, which
    is how `torch.multinomial` draws one. But that takes all rows' from one seed: what a prompt got
    would depend on those beside it, and so on the rank that samples it.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def keep(self, rows: Sequence[int]) -> None:
        """The rows that go on; the others have left the batch."""
        self._generators = [self._generators[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)  # (N, V)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()


class HfEngine:
    """Samples from its own copy of the policy; same interface and results as `VllmEngine`.

    Args:
        spec: the policy, whose architecture is copied; `sync` brings the weights.
        sequences_per_batch: responses decoded at once.
        tokens_per_microbatch: budget of the scoring pass that yields the log-probs.
        logit_chunk_mb: float32 logits held at once in that pass, MB.
    """

    name = "hf"

    def __init__(
        self,
        spec: EngineSpec,
        *,
        sequences_per_batch: int,
        tokens_per_microbatch: int,
        logit_chunk_mb: float,
    ) -> None:
        self._model: Any = plain_copy(spec.policy)
        # a chat model may bring a repetition penalty and the like, by which `generate` would decode
        self._model.generation_config = GenerationConfig()
        self.dtype = str(spec.policy.dtype).removeprefix("torch.")
        self._pad_id, self._eos_ids = spec.pad_id, spec.eos_ids
        self._sequences_per_batch = sequences_per_batch
        self._tokens_per_microbatch = tokens_per_microbatch
        self._logit_chunk_mb = logit_chunk_mb
        self.policy_version = -1

    @torch.no_grad()
    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        own = self._model.state_dict()
        check_weights(weights, set(own))
        for name, tensor in weights.items():
            own[name].copy_(whole(tensor))
        self.policy_version = policy_version

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        max_new_tokens: Sequence[int] | None = None,
        on_finished: OnFinished | None = None,
    ) -> list[list[Completion]]:
        if self.policy_version < 0:
            raise EngineError("generate before the first sync")
        limits = max_new_tokens or [sampling.max_new_tokens] * len(prompts)
        with_log_probs = len(prompts) if sampling.log_probs is None else sampling.log_probs
        scored = with_log_probs * sampling.samples_per_prompt  # responses
        rows = [
            _Row(list(prompt), limit, sampling.seed + SEED_STRIDE * index + sample)
            for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
            for sample in range(sampling.samples_per_prompt)
        ]
        completions: list[Completion] = []
        n = sampling.samples_per_prompt
        finished = tokens = 0
        for start in range(0, len(rows), self._sequences_per_batch):
            tick = _tick(on_progress, len(completions), tokens)
            chosen = rows[start : start + self._sequences_per_batch]
            batch = self._generate(chosen, sampling, tick, max(scored - start, 0))
            completions += batch
            tokens += sum(len(c.token_ids) for c in batch)
            if on_progress is not None:
                on_progress(len(completions), tokens)
            while on_finished is not None and (finished + 1) * n <= len(completions):
                on_finished(finished, completions[finished * n : (finished + 1) * n])
                finished += 1
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        batch = TokenBatch.collate(rows, self._pad_id).to(self._model.device)
        with torch.no_grad():
            scores = response_scores(
                self._model,
                batch,
                tokens_per_microbatch=self._tokens_per_microbatch,
                logit_chunk_mb=self._logit_chunk_mb,
            )
        return [
            row[: len(response)].tolist()
            for row, (_, response) in zip(scores.log_prob.cpu(), rows, strict=True)
        ]

    def rest(self) -> None:
        """Nothing: it holds no memory but its copy of the policy."""

    def close(self) -> None:
        self._model, self.policy_version = None, -1

    def _generate(
        self,
        rows: list[_Row],
        sampling: Sampling,
        tick: Callable[[], None] | None,
        scored: int,
    ) -> list[Completion]:
        """Completions of the rows, the first `scored` of them with log-probs."""
        responses = self._responses(rows, sampling, tick)
        # generate's own scores are (T, N, V): a second pass needs far less memory
        few = [(row.prompt, ids) for row, ids in zip(rows, responses, strict=True)][:scored]
        scores = self.score(few) if few else []
        return [
            Completion(
                tuple(ids),
                tuple(scores[i]) if i < len(scores) else (),
                truncated=ids[-1] not in self._eos_ids,
            )
            for i, ids in enumerate(responses)
        ]

    def _responses(
        self, rows: list[_Row], sampling: Sampling, tick: Callable[[], None] | None
    ) -> list[list[int]]:
        """Token ids of each row's response, decoded in stages that ever fewer rows take part in."""
        device = self._model.device
        prompts = list(dict.fromkeys(tuple(row.prompt) for row in rows))
        of_prompt = torch.tensor([prompts.index(tuple(row.prompt)) for row in rows], device=device)
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad_id)
        attention = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # left padding, as generate wants it
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention[row, width - len(prompt) :] = 1
        ids, attention = ids.to(device), attention.to(device)
        cache = row_cache(self._model)
        if cache is not None:
            prefill(self._model, cache, ids, attention)
            cache.batch_select_indices(of_prompt)
        ids, attention = ids[of_prompt], attention[of_prompt]
        draws = None if sampling.temperature == 0 else DrawFromSeeds([r.seed for r in rows], device)
        responses: list[list[int]] = [[] for _ in rows]
        left = list(range(len(rows)))
        while left:
            limits = [rows[i].limit - len(responses[i]) for i in left]
            few = FewLeft(limits, self._eos_ids, may_stop=cache is not None, tick=tick)
            config = GenerationConfig(
                do_sample=False,  # the greatest score is the draw
                max_new_tokens=max(limits),
                pad_token_id=self._pad_id,
                eos_token_id=list(self._eos_ids),
            )
            before = ids.shape[1]
            ids = self._model.generate(
                ids,
                attention_mask=attention,
                generation_config=config,
                past_key_values=cache,
                stopping_criteria=StoppingCriteriaList([few]),
                logits_processor=_processors(sampling, draws),
            )
            for i, made, limit in zip(left, ids[:, before:].tolist(), limits, strict=True):
                responses[i] += self._cut(made[:limit])
            stays = few.working.nonzero()[:, 0]
            left = [left[i] for i in stays.tolist()]
            if not left:
                break
            stays = stays.to(device)
            ids = ids[stays]
            made = attention.new_ones(len(left), ids.shape[1] - attention.shape[1])
            attention = torch.cat([attention[stays], made], dim=1)
            assert cache is not None  # or all rows would have ended
            cache.batch_select_indices(stays)
            if draws is not None:
                draws.keep(stays.tolist())
        return responses

    def _cut(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self._eos_ids), len(ids))
        return ids[: end + 1]


@dataclass(frozen=True)
class _Row:
    """One response to be sampled."""

    prompt: list[int]
    limit: int  # tokens
    seed: int


def _processors(sampling: Sampling, draws: DrawFromSeeds | None) -> LogitsProcessorList:
    """From logits to scores whose greatest is the next token, in vLLM's and `generate`'s order."""
    chosen: list[LogitsProcessor] = [RefuseNonFinite()]
    if draws is None:
        return LogitsProcessorList(chosen)
    if sampling.temperature != 1:
        chosen.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_p < 1:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        chosen.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList([*chosen, draws])


def _tick(
    on_progress: Callable[[int, int], None] | None, done: int, tokens: int
) -> Callable[[], None] | None:
    """A call for each token, in which a run that is asked to stop may raise."""
    return None if on_progress is None else lambda: on_progress(done, tokens)

"""What an evaluation needs of its engine, and what decides its figures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.config.checks import as_dict
from powerflow_lit.config.schema import EvaluateConfig
from powerflow_lit.evaluating.benchmarks import Benchmark
from powerflow_lit.models.loading import ModelError
from powerflow_lit.samplers import Decoding, EvaluationSettings, Policy, Sampler

GAP_PROMPTS, GAP_TOKENS = 4, 256  # on which engine and trainer are compared
# of an engine: how much memory it takes and how fast it is, not what it samples from
ENGINE_MEANS = (
    "_partial_", "max_num_seqs", "kv_cache_gb", "gpu_memory_utilization", "enforce_eager",
    "sequences_per_batch", "tokens_per_microbatch", "logit_chunk_mb",
    "addresses", "servers", "devices", "weight_transfer", "weights_dir", "start_s", "request_s",
    "wait_for_server_s",
)  # fmt: skip
# of a judge or an embedder: how its server is reached, not what it answers
SERVER_MEANS = (
    "base_url", "api_key_env", "timeout_s", "max_retries", "concurrency", "batch_size", "cache",
    "probe", "device",
)  # fmt: skip


def longest_sequence(
    config: EvaluateConfig,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    benchmarks: Sequence[Benchmark],
    samplers: Mapping[str, Sampler],
    settings: EvaluationSettings,
) -> int:
    """Tokens of the longest sequence, prompt included.

    Raises:
        ModelError: a sampler needs more than the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    longest = 0
    for benchmark in benchmarks:
        for name, sampler in samplers.items():
            needed = sampler.tokens_needed(
                tokenizer,
                config.model.prompt_route,  # type: ignore[arg-type]
                benchmark.prompts,
                benchmark.prompt_ids,
                settings,
            )
            if context is not None and needed > context:
                own = ", or samplers.vs_standard.tokens_per_call" if "vs" in name else ""
                raise ModelError(
                    f"{benchmark.name} with {name} needs {needed} tokens of context, "
                    f"{config.model.path} has {context}: lower rollout.max_new_tokens{own}"
                )
            longest = max(longest, needed)
    return longest


def settings_of(
    config: EvaluateConfig,
    nodes: Mapping[str, Any],
    samplers: Mapping[str, Sampler],
    model: PreTrainedModel,
) -> dict[str, Any]:
    """All that decides the figures, for eval.json and for going on with an old folder."""
    whole = as_dict(config)
    names = ("path", "revision", "stop_tokens", "prompt_route", "dtype", "engine_dtype")
    engine = {k: v for k, v in config.rollout.engine.items() if k not in ENGINE_MEANS}
    return {
        "model": {n: whole["model"][n] for n in names} | {"weights": fingerprint(model)},
        "rollout": {
            "max_new_tokens": config.rollout.max_new_tokens,
            "max_prompt_tokens": config.rollout.max_prompt_tokens,
            "engine": engine,
        },
        "samples_per_prompt": config.samples_per_prompt,
        "seed": config.seed,
        "bootstrap": whole["bootstrap"],
        "judge": _what_decides(config.judge or {}),
        "embedder": _what_decides(config.embedder or {}),
        "benchmarks": dict(nodes),
        "samplers": {
            n: config.samplers.get(n) or (asdict(s) if isinstance(s, Decoding) else {})
            for n, s in samplers.items()
        },
    }


def engine_gap(policy: Policy, prompt_ids: Sequence[tuple[int, ...]]) -> float:
    """Largest difference of engine and trainer on tokens of a few prompts, nats.

    What an engine lost or muddled of the weights would otherwise show in figures alone.
    """
    chosen = [ids[:GAP_TOKENS] for ids in prompt_ids if len(ids) > 1][:GAP_PROMPTS]
    rows = [(ids[:1], ids[1:]) for ids in chosen]
    if not rows:
        return 0.0
    pairs = zip(policy.log_probs(rows, 1.0), policy.engine.score(rows), strict=True)
    return max(float(np.abs(ours[: len(theirs)] - theirs).max()) for ours, theirs in pairs)


def _what_decides(node: Mapping[str, Any]) -> dict[str, Any]:
    """A judge's or an embedder's configuration without how its server is reached."""
    return {
        key: _what_decides(value) if isinstance(value, Mapping) else value
        for key, value in node.items()
        if key not in SERVER_MEANS
    }


def fingerprint(model: PreTrainedModel) -> str:
    """Of a few numbers of every weight: training moves all of them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def embedder_name(embed: Any) -> str:
    """What diversity_semantic was measured with."""
    return str(getattr(embed, "name", None) or getattr(embed, "__name__", type(embed).__name__))

"""One evaluation in its folder: builds everything, samples, scores, and says how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.assembly import build_engine, build_model
from powerflow_lit.config.checks import ConfigError
from powerflow_lit.config.schema import EvaluateConfig
from powerflow_lit.evaluating import calibration
from powerflow_lit.evaluating.benchmarks import Benchmark, located, prepared
from powerflow_lit.evaluating.plan import (
    embedder_name,
    engine_gap,
    longest_sequence,
    settings_of,
)
from powerflow_lit.evaluating.record import Record
from powerflow_lit.evaluating.session import averages, evaluate_all
from powerflow_lit.judging.assessors import Assessor, CreativeJudge
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.resume import load_policy
from powerflow_lit.run_folder import export_of, git_commit, versions
from powerflow_lit.samplers import Decoding, EvaluationSettings, Policy, Sampler
from powerflow_lit.tasks.base import Task
from powerflow_lit.tasks.boxed import BoxedAnswers
from powerflow_lit.tasks.creative_writing import CreativeWriting


def run(config: EvaluateConfig) -> dict[str, Any]:
    """What eval.json in the output folder says at the end.

    Raises:
        ConfigError: contradictory settings, or the folder holds an evaluation with other ones.
        TaskError, ModelError, EngineError: data, model or engine cannot be used.
    """
    published = None
    if config.calibrate is not None:  # what can be wrong shows before a model loads
        published = calibration.row_of(config.calibrate, config.model.paper_name)
    samplers = build_samplers(config)
    nodes = benchmark_nodes(config)
    tasks: dict[str, Task] = {name: instantiate(node) for name, node in nodes.items()}
    embedder = instantiate(config.embedder) if _has_target(config.embedder) else None
    assessor: Assessor | None = instantiate(config.judge) if _has_target(config.judge) else None
    for task in tasks.values():
        task.embed = embedder or task.embed
        if isinstance(assessor, CreativeJudge):
            if isinstance(task, BoxedAnswers):
                raise ConfigError(
                    f"judge=creative with {task.name}: it judges poems, stories and jokes; for "
                    "solutions take judge=strategies"
                )
            if isinstance(task, CreativeWriting):
                assessor.genre_of = task.genre  # it knows the lists that its prompts are from
    try:
        record = _evaluated(config, nodes, tasks, samplers, assessor)
    finally:
        for part in (assessor, embedder):
            getattr(part, "close", lambda: None)()
    names = list(tasks)
    over_all = averages(record, names, list(samplers), config.bootstrap)
    if assessor is not None and record.added:  # else what an earlier session said stands
        record.data["judge"] = assessor.record()
    calibrated = None
    if config.calibrate is not None and published is not None:
        calibrated = calibration.calibrated(
            config.calibrate, published, record.data, names, over_all, config.bootstrap.level
        )
    record.finish(averages=over_all, calibration=calibrated)
    return record.data


def _evaluated(
    config: EvaluateConfig,
    nodes: Mapping[str, Any],
    tasks: Mapping[str, Task],
    samplers: Mapping[str, Sampler],
    assessor: Assessor | None,
) -> Record:
    """The record with every pair of benchmark and sampler in it."""
    model, tokenizer = build_model(config.model)
    if config.run is not None and export_of(Path(config.run)) is None:
        model = load_policy(model, Path(config.run))
    benchmarks = [
        prepared(
            name,
            task,
            tokenizer,
            route=config.model.prompt_route,  # type: ignore[arg-type]
            max_prompt_tokens=config.rollout.max_prompt_tokens,
        )
        for name, task in tasks.items()
    ]
    settings = EvaluationSettings(
        config.samples_per_prompt, config.rollout.max_new_tokens, config.seed
    )
    longest = longest_sequence(config, model, tokenizer, benchmarks, samplers, settings)
    about = {
        "model": config.model.path,
        "run": config.run,
        "alpha": config.alpha,
        "paper_name": config.model.paper_name,
        "task": None if config.benchmarks else config.task.name,
        "samples_per_prompt": config.samples_per_prompt,
        "embedder": embedder_name(next(iter(tasks.values())).embed),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    record = Record(Path(config.output), about, settings_of(config, nodes, samplers, model))
    for benchmark in benchmarks:
        for note in benchmark.notes:
            record.note(f"{benchmark.name}: {note}")
            print(f"{benchmark.name}: {note}")
    _sample(config, record, model, tokenizer, benchmarks, samplers, settings, longest, assessor)
    return record


def _sample(
    config: EvaluateConfig,
    record: Record,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    benchmarks: list[Benchmark],
    samplers: Mapping[str, Sampler],
    settings: EvaluationSettings,
    longest: int,
    assessor: Assessor | None,
) -> None:
    """Start the engine and evaluate every pair that the record lacks; no engine if it has all."""
    if all(record.has(b.name, s) for b in benchmarks for s in samplers):
        print("every benchmark and sampler was evaluated before")
        return
    portable = str(config.rollout.engine["_target_"]).endswith("HfEngine")
    if torch.cuda.is_available() and (portable or any(s.scores for s in samplers.values())):
        model.to("cuda")  # type: ignore[arg-type]
    engine = build_engine(
        config.rollout.engine,
        config.model,
        model,
        tokenizer,
        max_model_len=longest,
        seed=config.seed,
    )
    try:
        engine.sync(policy_weights(model), 0)
        policy = Policy(
            engine,
            model,
            tokenizer,
            config.model.prompt_route,  # type: ignore[arg-type]
            config.tokens_per_microbatch,
            config.logit_chunk_mb,
        )
        gap = engine_gap(policy, benchmarks[0].prompt_ids)
        record.data["engine_logp_gap"] = gap
        if not gap <= config.rollout.logp_gap_limit:
            record.note(
                f"engine and trainer differ by up to {gap:.3g} nats a token (limit "
                f"{config.rollout.logp_gap_limit:g}): rounding where model.engine_dtype is of 16 "
                "bits (under 1 or so), else the figures are not the model's"
            )
        evaluate_all(policy, benchmarks, samplers, settings, record, assessor, config.bootstrap)
    finally:
        engine.close()


def build_samplers(config: EvaluateConfig) -> dict[str, Sampler]:
    """Decodings by their own names, then the samplers of `sampler=` by theirs.

    A decoding that is listed twice, or is one of the samplers, is made once.

    Raises:
        ConfigError: none at all.
    """
    named: dict[str, Sampler] = {n: instantiate(node) for n, node in config.samplers.items()}
    plain = [Decoding(d.temperature, min_p=d.min_p, top_p=d.top_p) for d in config.decodings]
    found: dict[str, Sampler] = {d.name: d for d in plain if d not in named.values()}
    found |= named
    if not found:
        raise ConfigError("decodings=[] and no sampler=: name at least one way of sampling")
    return found


def benchmark_nodes(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """What builds each benchmark's task: the chosen ones, or else the task itself."""
    nodes = dict(config.benchmarks)
    if config.benchmark_dir is not None:
        if not nodes:
            raise ConfigError(f"benchmark_dir={config.benchmark_dir} without benchmark=")
        nodes = located(nodes, Path(config.benchmark_dir))
    return nodes or {config.task.name: config.task.build}


def _has_target(node: Mapping[str, Any] | None) -> bool:
    return bool(node) and node is not None and node.get("_target_") is not None

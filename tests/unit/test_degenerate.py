"""Rollouts that are all empty, cut, the same or one token, from a real engine of a bent model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from powerflow_lit.assembly import build_engine, build_model, build_module, reward_settings
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config
from powerflow_lit.config.schema import TrainConfig
from powerflow_lit.log_z import LogZ
from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.models.prompting import decode, encode_prompts
from powerflow_lit.rewarding import Rewarder
from powerflow_lit.rollout.degenerate import findings
from powerflow_lit.types import Sampling, TokenBatch, Trajectory, TrajectoryBatch
from tests.tiny_models import make_scripted_model

END, NEWLINE, A, B, C = 2, 17, 5, 6, 7  # a prompt ends in a new line
SURE, NEVER = 30.0, -30.0
LIMIT = 6
# what follows a token, or any that is not named (None); see make_scripted_model
SCRIPTS: dict[str, Mapping[int | None, Mapping[int, float]]] = {
    "empty": {None: {END: SURE}},
    "truncated": {None: {END: NEVER}},
    "identical": {None: {}, NEWLINE: {A: SURE}, A: {B: SURE}, B: {C: SURE}, C: {END: SURE}},
    "one_token": {None: {END: SURE}, NEWLINE: {END: NEVER, NEWLINE: NEVER}},
    "truncated_identical": {None: {A: SURE}},
    "one_token_identical": {None: {A: SURE}, A: {END: SURE}},
}
STRATEGIES = sorted(p.stem for p in (Path(conf_dir()) / "strategy").glob("*.yaml"))
LOG_Z = sorted(p.stem for p in (Path(conf_dir()) / "log_z").glob("*.yaml"))
# a multiple of the base's length of one token may be no length that responses can have
ASKS_FOR = {"powerflow_length": ("length_control=target", "length_control.tokens=3")}
LENGTHS = {"empty": {1}, "one_token": {2}, "one_token_identical": {2}, "identical": {4}}


def config_of(*overrides: str) -> TrainConfig:
    fixed = ("debug=fast", "rollout=hf", "run_dir=unused", f"rollout.max_new_tokens={LIMIT}")
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg: DictConfig = compose("train", [*fixed, *overrides])
    return train_config(cfg)


@dataclass(frozen=True)
class Rollouts:
    """What a bent model's own engine sampled, and the model."""

    model: Any
    config: TrainConfig
    trajectories: list[Trajectory]


def sampled(script: str, folder: Path, plain: TrainConfig) -> Rollouts:
    """Two prompts, four responses each, scored by the model itself."""
    make_scripted_model(folder, SCRIPTS[script])
    config = replace(plain, model=replace(plain.model, path=str(folder)))
    model, tokenizer = build_model(config.model)
    engine = build_engine(
        config.rollout.engine, config.model, model, tokenizer, max_model_len=200, seed=0
    )
    engine.sync(policy_weights(model), 0)
    prompts = instantiate(config.task.build).train_prompts()[:2]
    ids = encode_prompts(tokenizer, prompts, "plain")
    assert all(ids[p.id][-1] == NEWLINE for p in prompts)
    groups = engine.generate([ids[p.id] for p in prompts], Sampling(4, LIMIT, seed=1))
    rows = [(ids[p.id], c.token_ids) for p, g in zip(prompts, groups, strict=True) for c in g]
    with torch.no_grad():
        scores = response_scores(
            model, TokenBatch.collate(rows, 0), tokens_per_microbatch=4096, logit_chunk_mb=1
        )
    completions = [(n, p, c) for n, p in enumerate(prompts) for c in groups[n]]
    return Rollouts(
        model,
        config,
        [
            Trajectory(
                prompt=prompt, group=number, prompt_ids=ids[prompt.id],
                response_ids=completion.token_ids, response=decode(tokenizer, completion.token_ids),
                truncated=completion.truncated, formatted=False, correct=None, policy_version=0,
                log_p_old=torch.tensor(completion.log_probs),
                log_p_base=log_prob[: len(completion.token_ids)],
            )
            for (number, prompt, completion), log_prob in zip(
                completions, scores.log_prob, strict=True
            )
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rollouts]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bent")
    plain = config_of()
    yield {script: sampled(script, folder / script, plain) for script in SCRIPTS}
    torch.set_num_threads(threads)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bent_model_does_what_its_script_says(rollouts: dict[str, Rollouts], script: str) -> None:
    """The premise of all that follows."""
    found = rollouts[script].trajectories
    lengths = {t.length for t in found}
    assert lengths == LENGTHS.get(script, {LIMIT})
    assert all(t.truncated == ("truncated" in script) for t in found)
    distinct = len({t.response_ids for t in found})
    assert (distinct == 1) == (script == "empty" or "identical" in script)


@pytest.fixture(scope="module")
def choices() -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of every strategy and of every log Z."""
    return (
        {name: config_of(f"strategy={name}", *ASKS_FOR.get(name, ())) for name in STRATEGIES},
        {name: config_of(f"log_z={name}").log_z for name in LOG_Z},
    )


def quiet_trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def batch_of(config: TrainConfig, given: Rollouts) -> TrajectoryBatch:
    """With the strategy's own rewards; to a supervised one all answers are wrong."""
    rewarder = Rewarder(
        reward_settings(config.strategy), instantiate(config.task.build), config,
        pad_id=0, report=lambda *_: None,
    )  # fmt: skip
    module = build_module(config, given.model, lambda *_: None)  # type: ignore[arg-type]
    module.trainer = quiet_trainer()
    wrong = [replace(t, correct=False) for t in given.trajectories]
    return TrajectoryBatch.collate(rewarder.trained(rewarder(module, wrong)), 0)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_and_gradients_are_finite_whatever_the_strategy_and_log_z(
    rollouts: dict[str, Rollouts],
    choices: tuple[dict[str, TrainConfig], dict[str, Any]],
    strategy: str,
    script: str,
) -> None:
    given = rollouts[script]
    strategies, log_zs = choices
    batch = batch_of(strategies[strategy], given)
    objective = instantiate(strategies[strategy].strategy.objective)
    for log_z in LOG_Z if objective.uses_log_z else LOG_Z[:1]:
        config = replace(strategies[strategy], log_z=log_zs[log_z])
        module = build_module(config, given.model, objective)
        module.trainer = quiet_trainer()  # which prints warnings
        assert isinstance(module.log_z, LogZ)
        module.calibrate(batch)
        for step in range(2):  # at the base, and away from it
            loss = module.training_step(batch, step)
            assert loss is not None, log_z
            assert bool(loss.isfinite()), log_z
            loss.backward()
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            assert gradients, log_z
            assert all(bool(g.isfinite().all()) for g in gradients), log_z
            assert all(bool(x.isfinite()) for x in module.step_metrics.values()), log_z
            module.zero_grad()
            with torch.no_grad():
                given.model.lm_head.weight.mul_(0.9 if step == 0 else 1 / 0.9)
        assert module.skipped_steps == 0


EXPECTED = {
    "empty": ["empty"],
    "truncated": ["truncated"],
    "identical": ["identical"],
    "one_token": ["one_token"],
    "truncated_identical": ["truncated", "identical"],
    "one_token_identical": ["one_token", "identical"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_all_responses_have_in_common_is_found(
    rollouts: dict[str, Rollouts], script: str
) -> None:
    given = rollouts[script].trajectories
    found = findings(given, max_new_tokens=LIMIT)
    assert [f.name for f in found] == EXPECTED[script]
    for finding in found:
        assert finding.text.startswith("all 8 responses are ")
        assert "\n" not in finding.text
        assert "rollout." in finding.text or "optimizer.lr" in finding.text, "what to try"


def test_a_single_response_that_is_otherwise_is_enough_for_no_finding(
    rollouts: dict[str, Rollouts],
) -> None:
    other = {
        "empty": replace(rollouts["one_token"].trajectories[0], group=0),
        "truncated": replace(rollouts["identical"].trajectories[0], group=0),
        "identical": replace(rollouts["one_token"].trajectories[0], group=0),
        "one_token": replace(rollouts["identical"].trajectories[0], group=0),
    }
    for script, trajectory in other.items():
        given = rollouts[script].trajectories
        assert findings([*given, trajectory], max_new_tokens=LIMIT) == [], script


def test_equal_responses_mean_nothing_where_each_prompt_has_one(
    rollouts: dict[str, Rollouts],
) -> None:
    first, *_, last = rollouts["identical"].trajectories
    assert findings([first, last], max_new_tokens=LIMIT) == []
    assert first.group != last.group


def test_the_same_for_each_prompt_is_told_from_the_same_for_all(
    rollouts: dict[str, Rollouts],
) -> None:
    given = rollouts["identical"].trajectories
    (whole,) = findings(given, max_new_tokens=LIMIT)
    assert "all 8 responses are the same:" in whole.text
    moved = [replace(t, response_ids=(A, C, END)) if t.group else t for t in given]
    (each,) = findings(moved, max_new_tokens=LIMIT)
    assert "the same for each of the 2 prompts" in each.text

"""Ranks that hold one engine together: prompts of all, responses dealt back, one end for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from powerflow_lit.config.checks import ConfigError
from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.folders import divides_heads
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.preflight import check_here, light_parts
from powerflow_lit.rollout.engine import EngineError, EngineSpec, NonFiniteWeightsError
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.rollout.shared_engine import SharedEngine, engine_group
from powerflow_lit.rollout.vllm_engine import SEED_STRIDE, _launcher, _place
from powerflow_lit.types import Completion, Sampling
from tests.two_ranks import on_ranks
from tests.unit.test_config import checked

PROMPTS = [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33], [40, 41], [50, 51, 52]]
SHARES = (slice(0, 2), slice(2, 5))
SAMPLING = Sampling(3, 12, seed=5)


class Stop(SystemExit):
    """As a signal's."""


def engine() -> HfEngine:
    """Whole on each rank, so that its answers to equal questions are equal there."""
    policy = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    spec = EngineSpec(policy, str(folder_of("tiny")), pad_id=0, eos_ids=(2,), max_model_len=64,
                      seed=0, trust_remote_code=False)  # fmt: skip
    built = HfEngine(spec, sequences_per_batch=64, tokens_per_microbatch=4096, logit_chunk_mb=1.0)
    built.sync(policy_weights(policy), 3)
    return built


def sampling_of(rank: int, **changes: Any) -> Sampling:
    before = SHARES[rank].start
    return Sampling(3, 12, **{"seed": 5 + SEED_STRIDE * before, **changes})


def raised(work: Any) -> str:
    try:
        work()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def a_rank() -> dict[str, Any]:
    rank = dist.get_rank()
    inner = engine()
    shared = SharedEngine(inner, engine_group(2))
    own = PROMPTS[SHARES[rank]]
    found: dict[str, Any] = {
        "held": (shared.name, shared.dtype, shared.policy_version),
        "groups": shared.generate(own, sampling_of(rank)),
        "limited": shared.generate(own, sampling_of(rank), max_new_tokens=[1 + rank] * len(own)),
        "scores": shared.score([(prompt, [7, 8, 9]) for prompt in own]),
        "arguments": [_launcher(1), _launcher(2)],
        "place": _place(),
    }
    few = shared.generate(own, sampling_of(rank, log_probs=1 - rank))
    found["with log-probs"] = [bool(c.log_probs) for group in few for c in group]
    told: list[tuple[int, int]] = []
    shared.generate(own, sampling_of(rank), lambda done, tokens: told.append((done, tokens)))
    found["told"] = told[-1][0]

    def stops(done: int, tokens: int) -> None:
        if rank == 1:
            raise Stop(143)

    found["stopped"] = raised(lambda: shared.generate(own, sampling_of(rank), stops))
    weights = dict(policy_weights(inner._model))
    if rank == 0:
        weights.pop(next(iter(weights)))
    found["refused"] = raised(lambda: shared.sync(weights, 4))
    found["unlike"] = raised(lambda: shared.generate(own, SAMPLING))
    found["after"] = shared.generate(own, sampling_of(rank))
    found["three"] = raised(lambda: engine_group(3))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(a_rank)


def responses(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in group] for group in groups]


def test_the_union_of_the_ranks_responses_is_that_of_one_process(
    ranks: list[dict[str, Any]],
) -> None:
    alone = engine()
    assert [rank["held"] for rank in ranks] == [("hf", "float32", 3)] * 2
    for name in ("groups", "after"):
        union = [group for rank in ranks for group in rank[name]]
        assert responses(union) == responses(alone.generate(PROMPTS, SAMPLING))
    limited = [group for rank in ranks for group in rank["limited"]]
    expected = alone.generate(PROMPTS, SAMPLING, max_new_tokens=[1, 1, 2, 2, 2])
    assert responses(limited) == responses(expected)
    scores = [row for rank in ranks for row in rank["scores"]]
    for row, own in zip(scores, alone.score([(p, [7, 8, 9]) for p in PROMPTS]), strict=True):
        assert row == pytest.approx(own, abs=1e-6)


def test_log_probs_and_progress_are_each_ranks_own(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["with log-probs"] == [True] * 3 + [False] * 3
    assert ranks[1]["with log-probs"] == [False] * 9
    assert [rank["told"] for rank in ranks] == [15 // 2] * 2


def test_what_one_rank_raises_ends_the_work_of_all_and_leaves_the_engine_usable(
    ranks: list[dict[str, Any]],
) -> None:
    assert [rank["stopped"] for rank in ranks] == ["Stop: 143"] * 2
    for rank in ranks:
        assert rank["refused"].startswith("EngineError: sync refused: 1 weights missing")
        assert "ask for different responses" in rank["unlike"]
        assert rank["three"].startswith("EngineError: rollout.engine.tensor_parallel=3: 2 ranks")


def test_vllm_is_told_to_run_within_the_trainers_processes(ranks: list[dict[str, Any]]) -> None:
    within = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
    for number, rank in enumerate(ranks):
        assert rank["arguments"] == [{}, within]
        assert rank["place"] == {"RANK": str(number), "LOCAL_RANK": str(number)}
    assert _launcher(1) == {}
    assert _place() == {}
    with pytest.raises(EngineError, match="1 rank of the trainer cannot be divided"):
        _launcher(2)


def test_ranks_that_cannot_share_an_engine_are_refused_before_anything_is_built(
    tmp_path: Path,
) -> None:
    two = "rollout.engine.tensor_parallel=2"
    with pytest.raises(ConfigError, match=r"tensor_parallel=2 with trainer\.devices=3"):
        checked(two, "trainer.devices=3")
    with pytest.raises(ConfigError, match=r"tensor_parallel=0: must be a whole number"):
        checked("rollout.engine.tensor_parallel=0")
    with pytest.raises(ConfigError, match=r"tensor_parallel=2 with rollout\.overlap=true"):
        checked(two, "trainer.devices=2", "rollout.overlap=true")
    config = checked(two, "trainer.devices=2", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(ConfigError, match="attention heads of embedded:tiny cannot be divided"):
        check_here(config)  # it has three
    few = ("callbacks.evaluation.max_prompts=3", "trainer.devices=4")
    with pytest.raises(ConfigError, match="3 evaluation prompts for 4 ranks"):
        light_parts(checked(two, *few))


@pytest.mark.parametrize(
    ("heads", "key_heads", "parts", "yes"),
    [(28, 4, 2, True), (28, 4, 8, False), (12, 2, 4, True), (64, 8, 16, True), (12, None, 5, False),
     (24, 6, 4, False)],
)  # fmt: skip
def test_heads_are_divided_as_vllm_does(
    tmp_path: Path, heads: int, key_heads: int | None, parts: int, yes: bool
) -> None:
    known = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    (tmp_path / "config.json").write_text(json.dumps(known))
    assert divides_heads(tmp_path, parts) is yes
    (tmp_path / "config.json").write_text("{}")
    assert divides_heads(tmp_path, parts)


def test_weights_that_are_not_numbers_are_refused_by_a_shared_engine_too() -> None:
    found = on_ranks(_poisoned)
    assert all(said.startswith(NonFiniteWeightsError.__name__) for said in found)


def _poisoned() -> str:
    inner = engine()
    shared = SharedEngine(inner, engine_group(2))
    weights = {name: t.clone() for name, t in policy_weights(inner._model).items()}
    if dist.get_rank() == 1:
        next(iter(weights.values()))[0] = float("nan")
    return raised(lambda: shared.sync(weights, 4))

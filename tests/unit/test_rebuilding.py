"""An engine that answers with what is not a number, with too little, or from old weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from powerflow_lit.diverged import DivergedError
from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.loading import load_model
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout import EngineError, RolloutEngine
from powerflow_lit.rollout.engine import EngineSpec, NonFiniteRolloutError, NonFiniteWeightsError
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.rollout.rebuilding import RebuildingEngine
from powerflow_lit.types import Completion, Sampling

PROMPTS = [[10, 11, 12, 13, 14], [20, 21, 22]]
SAMPLING = Sampling(samples_per_prompt=3, max_new_tokens=6, seed=3)
ROWS = [([10, 11, 12], [13, 14]), ([20, 21], [22])]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from more, and two processes lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def policy() -> PreTrainedModel:
    return load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )


class Workshop:
    """Builds engines for a policy, and notes each one and why it was wanted."""

    def __init__(self, policy: PreTrainedModel, kind: type[HfEngine] = HfEngine) -> None:
        self.policy, self.kind, self.version = policy, kind, 0
        self.built: list[HfEngine] = []
        self.reasons: list[str] = []
        self.closed = 0
        self.engine = RebuildingEngine(
            self.build,
            policy=lambda: (policy_weights(policy), self.version),
            on_rebuild=self.reasons.append,
        )

    def build(self) -> RolloutEngine:
        spec = EngineSpec(
            self.policy, str(folder_of("tiny")), pad_id=0, eos_ids=(2,), max_model_len=64, seed=0,
            trust_remote_code=False,
        )  # fmt: skip
        self.built.append(
            self.kind(spec, sequences_per_batch=64, tokens_per_microbatch=512, logit_chunk_mb=1.0)
        )
        return self.built[-1]

    def sync(self, version: int) -> None:
        self.version = version
        self.engine.sync(policy_weights(self.policy), version)


def break_weights(model: Any, value: float) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(value)


ASK: dict[str, Callable[[RolloutEngine], Any]] = {
    "generate": lambda engine: engine.generate(PROMPTS, SAMPLING),
    "greedy": lambda engine: engine.generate(PROMPTS, Sampling(1, 6, temperature=0.0)),
    "score": lambda engine: engine.score(ROWS),
}


@pytest.mark.parametrize("ask", ASK)
def test_a_poisoned_engine_is_built_anew_and_answers_as_a_fresh_one(
    policy: PreTrainedModel, ask: str
) -> None:
    workshop = Workshop(policy)
    workshop.sync(7)
    expected = ASK[ask](workshop.engine)
    break_weights(workshop.built[0]._model, float("nan"))
    assert ASK[ask](workshop.engine) == expected
    assert len(workshop.built) == 2
    assert workshop.engine.policy_version == 7
    (why,) = workshop.reasons
    assert "the engine hf is built anew after update 7: " in why
    assert ASK[ask](workshop.engine) == expected
    assert len(workshop.built) == 2, "the new one is kept"


@pytest.mark.parametrize("ask", ASK)
def test_a_policy_that_overflows_has_diverged(policy: PreTrainedModel, ask: str) -> None:
    """Finite weights that no check refuses, of which a new engine makes NaN once more."""
    workshop = Workshop(policy)
    workshop.sync(0)
    break_weights(policy, 1e38)
    workshop.sync(1)
    with pytest.raises(
        NonFiniteRolloutError, match=r"after update 1 .* weights are finite"
    ) as info:
        ASK[ask](workshop.engine)
    assert isinstance(info.value, DivergedError)
    assert len(workshop.built) == 2, "built anew once, not again and again"
    assert "\n" not in str(info.value)


def test_weights_that_are_not_numbers_end_the_run_with_the_tensors_name(
    policy: PreTrainedModel,
) -> None:
    workshop = Workshop(policy)
    workshop.sync(0)
    before = workshop.engine.generate(PROMPTS, SAMPLING)
    break_weights(policy, float("nan"))
    words = r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity at 24576 of 24576"
    with pytest.raises(NonFiniteWeightsError, match=words) as info:
        workshop.sync(1)
    assert isinstance(info.value, DivergedError)
    assert workshop.engine.policy_version == 0
    assert workshop.engine.generate(PROMPTS, SAMPLING) == before
    # the same if they are found only when the engine must be built anew
    break_weights(workshop.built[0]._model, float("nan"))
    with pytest.raises(NonFiniteWeightsError, match=words):
        workshop.engine.generate(PROMPTS, SAMPLING)


class Stale(HfEngine):
    """Takes no weights but the first, and says nothing of it."""

    def sync(self, weights: Mapping[str, Tensor], policy_version: int) -> None:
        if self.policy_version < 0:
            super().sync(weights, policy_version)


def test_an_engine_that_keeps_old_weights_is_found_at_once(policy: PreTrainedModel) -> None:
    workshop = Workshop(policy, Stale)
    workshop.sync(0)
    words = "stale weights: the engine hf was given those of update 2 .* holds those of 0"
    with pytest.raises(EngineError, match=words):
        workshop.sync(2)


class Silent(HfEngine):
    """One of its responses has no token at all."""

    def generate(self, *args: Any, **kwargs: Any) -> list[list[Completion]]:
        groups = super().generate(*args, **kwargs)
        groups[1][0] = Completion((), (), truncated=False)
        return groups


def test_a_response_without_a_token_is_refused(policy: PreTrainedModel) -> None:
    workshop = Workshop(policy, Silent)
    workshop.sync(0)
    with pytest.raises(EngineError, match="response of 0 tokens with 0 log-probs for prompt 1"):
        workshop.engine.generate(PROMPTS, SAMPLING)


def test_an_engine_that_ends_at_once_returns_the_end_token(policy: PreTrainedModel) -> None:
    """No engine of ours returns nothing: a limit of one token gives one."""
    workshop = Workshop(policy)
    workshop.sync(0)
    groups: Sequence[Any] = workshop.engine.generate(PROMPTS, Sampling(4, 1, seed=1))
    assert {len(c.token_ids) for group in groups for c in group} == {1}

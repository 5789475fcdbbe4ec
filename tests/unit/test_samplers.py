"""Samplers draw from what they say they draw from, and count what they could not read."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.benchmarking import build_samplers
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import typed
from powerflow_lit.config.schema import EvaluateConfig
from powerflow_lit.models.loading import load_tokenizer
from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.rollout.engine import EngineSpec
from powerflow_lit.rollout.hf_engine import HfEngine
from powerflow_lit.samplers import (
    Decoding,
    Draws,
    EvaluationSettings,
    Policy,
    PowerSampling,
    VerbalizedSampling,
)
from powerflow_lit.samplers.power import Chain, Suffix, log_acceptance
from powerflow_lit.samplers.verbalized import verbalized
from powerflow_lit.types import Prompt, Sampling, TokenBatch

VOCABULARY, EOS, CAP = 3, 2, 3
PROMPT = (0, 1)
CHAINS = 1500
ASK = "Give {k} answers as JSON."


def language_model() -> LlamaForCausalLM:
    """Random, and of a kind where low temperature misses p^alpha by far (chosen among seeds)."""
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=16,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("embedded:tiny", trust_remote_code=False)


@pytest.fixture(scope="module")
def policy(tokenizer: Tokenizer) -> Policy:
    torch.set_num_threads(1)  # so small a model gains nothing from more
    model = language_model()
    spec = EngineSpec(
        model, "random", pad_id=0, eos_ids=(EOS,), max_model_len=64, seed=0, trust_remote_code=False
    )
    engine = HfEngine(
        spec, sequences_per_batch=CHAINS, tokens_per_microbatch=10**6, logit_chunk_mb=64
    )
    engine.sync(policy_weights(model), 0)
    return Policy(engine, model, tokenizer, "plain", tokens_per_microbatch=10**6, logit_chunk_mb=64)


def outcomes() -> list[tuple[int, ...]]:
    """Every response: ended by EOS within the cap, or cut there."""
    return [
        y
        for length in range(1, CAP + 1)
        for y in itertools.product(range(VOCABULARY), repeat=length)
        if EOS not in y[:-1] and (y[-1] == EOS or length == CAP)
    ]


def log_probs(
    model: LlamaForCausalLM, response: tuple[int, ...], temperature: float = 1.0
) -> list[float]:
    """Of one response's tokens, from a pass of its own in float64."""
    ids = torch.tensor([[*PROMPT, *response]])
    with torch.no_grad():
        table = (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
    places = range(len(PROMPT) - 1, ids.shape[1] - 1)
    return [float(table[p, t]) for p, t in zip(places, response, strict=True)]


def log_p(model: LlamaForCausalLM, response: tuple[int, ...], temperature: float = 1.0) -> float:
    return sum(log_probs(model, response, temperature))


def normalised(logs: Sequence[float]) -> list[float]:
    weights = [math.exp(x - max(logs)) for x in logs]
    return [w / sum(weights) for w in weights]


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Total variation."""
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2


def frequencies(draws: Draws) -> list[float]:
    counts = Counter(r.token_ids for r in draws.samples[0].responses)
    assert set(counts) <= set(outcomes())
    return [counts[y] / draws.samples_per_prompt for y in outcomes()]


def drawn(policy: Policy, sampler: PowerSampling | Decoding, seed: int = 0) -> Draws:
    settings = EvaluationSettings(CHAINS, CAP, seed)
    return sampler.sample(policy, [Prompt(0, "x")], [PROMPT], settings, None)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 4.0])
def test_a_metropolis_hastings_step_keeps_the_power_of_the_model_exactly(
    policy: Policy, alpha: float
) -> None:
    """The step's transition matrix over all responses, enumerated, leaves p^alpha as it is."""
    model = policy.model
    assert isinstance(model, LlamaForCausalLM)
    states = outcomes()
    tables = [
        (np.array(log_probs(model, y)), np.array(log_probs(model, y, 1 / alpha))) for y in states
    ]
    moves = np.zeros((len(states), len(states)))
    for i, x in enumerate(states):
        chain = Chain(PROMPT, x, *tables[i])
        for cut in range(len(x)):
            for j, y in enumerate(states):
                if len(y) <= cut or y[:cut] != x[:cut]:
                    continue
                p, q = (table[cut:] for table in tables[j])
                suffix = Suffix(cut, y[cut:], p, q, y[-1] == EOS)
                accepted = math.exp(min(0.0, log_acceptance(chain, suffix, alpha)))
                moves[i, j] += math.exp(q.sum()) / len(x) * accepted
        moves[i, i] += 1 - moves[i].sum()
    target = np.array(normalised([alpha * p.sum() for p, _ in tables]))
    np.testing.assert_allclose(target @ moves, target, atol=1e-12, rtol=0)
    flow = target[:, None] * moves
    np.testing.assert_allclose(flow, flow.T, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("alpha", "blocks", "steps"), [(2.0, 1, 20), (2.0, 3, 10)])
def test_power_sampling_reaches_the_enumerated_power_of_the_model(
    policy: Policy, alpha: float, blocks: int, steps: int
) -> None:
    model = policy.model
    assert isinstance(model, LlamaForCausalLM)
    logs = [log_p(model, y) for y in outcomes()]
    target = normalised([alpha * x for x in logs])
    tempered = normalised([log_p(model, y, 1 / alpha) for y in outcomes()])
    by_length = normalised(
        [alpha * x + math.log(len(y)) for x, y in zip(logs, outcomes(), strict=True)]
    )
    # what as many independent draws from the target itself would be away, on average
    noise = sum(math.sqrt(2 * p * (1 - p) / (math.pi * CHAINS)) for p in target) / 2
    draws = drawn(policy, PowerSampling(alpha, blocks, steps, stop_at_eos=False))
    found = frequencies(draws)
    assert distance(found, target) < 2 * noise
    assert distance(found, tempered) > 4 * noise, "not low temperature by another name"
    # without the chance of the cut in the proposal the chain would end in |y| p^alpha
    assert distance(found, by_length) > 2 * noise
    assert 0 < draws.figures[0]["mh_acceptance"] < 1


def test_without_steps_power_sampling_is_low_temperature(policy: Policy) -> None:
    model = policy.model
    assert isinstance(model, LlamaForCausalLM)
    draws = drawn(policy, PowerSampling(2.0, 3, 0, stop_at_eos=True))
    tempered = normalised([log_p(model, y, 0.5) for y in outcomes()])
    noise = sum(math.sqrt(2 * p * (1 - p) / (math.pi * CHAINS)) for p in tempered) / 2
    assert distance(frequencies(draws), tempered) < 2 * noise
    cut = [r for r in draws.samples[0].responses if r.truncated]
    assert cut
    assert all(len(r.token_ids) == CAP and r.token_ids[-1] != EOS for r in cut)


def test_power_sampling_is_reproducible_by_its_seed(policy: Policy) -> None:
    sampler = PowerSampling(4.0, 2, 2, stop_at_eos=True)
    settings = [EvaluationSettings(20, CAP, seed) for seed in (5, 5, 6)]
    runs = [
        sampler.sample(policy, [Prompt(0, "x"), Prompt(1, "y")], [PROMPT, (1,)], s, None)
        for s in settings
    ]
    assert runs[0].samples == runs[1].samples
    assert runs[0].samples != runs[2].samples
    assert [len(s.responses) for s in runs[0].samples] == [20, 20]


def test_log_probs_at_a_temperature_are_those_of_the_tempered_softmax(policy: Policy) -> None:
    model = policy.model
    assert isinstance(model, LlamaForCausalLM)
    batch = TokenBatch.collate([(PROMPT, y) for y in outcomes()], pad_id=0)
    with torch.no_grad():
        scores = response_scores(
            model, batch, tokens_per_microbatch=50, logit_chunk_mb=1, temperature=0.25
        )
    expected = [log_p(model, y, 0.25) for y in outcomes()]
    torch.testing.assert_close(
        scores.log_prob.sum(1).double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-4
    )


def test_each_prompt_may_have_a_limit_of_its_own(policy: Policy) -> None:
    sampling = Sampling(samples_per_prompt=50, max_new_tokens=99, seed=1)
    groups = policy.engine.generate([PROMPT, PROMPT], sampling, max_new_tokens=[1, 3])
    assert {len(c.token_ids) for c in groups[0]} == {1}
    assert max(len(c.token_ids) for c in groups[1]) == 3
    for completion in (c for group in groups for c in group):
        assert completion.truncated == (completion.token_ids[-1] != EOS)
        assert len(completion.log_probs) == len(completion.token_ids)


@pytest.mark.parametrize(
    ("decoding", "name"),
    [
        (Decoding(0.0), "greedy"),
        (Decoding(0.25), "T=0.25"),
        (Decoding(1.0, top_p=0.95), "T=1,top_p=0.95"),
        (Decoding(2.0, min_p=0.05, top_p=0.9), "T=2,top_p=0.9,min_p=0.05"),
    ],
)
def test_a_decoding_is_named_after_what_differs(decoding: Decoding, name: str) -> None:
    assert decoding.name == name


TWO = [{"text": "One.", "probability": 0.1}, {"text": 'Two "2".', "probability": 0.02}]


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps(TWO),
        f"Here you are:\n```json\n{json.dumps(TWO, indent=2)}\n```\nEnjoy [these]!",
        json.dumps({"responses": TWO}),
        json.dumps(TWO)[:-1] + ', {"text": "cut off he',
        "\n".join(json.dumps(one) for one in TWO),
        "[a] {b} " + json.dumps(TWO),
    ],
    ids=["plain", "fenced", "wrapped", "cut off", "lines", "brackets before"],
)
def test_verbalized_texts_are_found_in_what_models_write(answer: str) -> None:
    assert verbalized(answer) == ["One.", 'Two "2".']


@pytest.mark.parametrize(
    "answer",
    ["", "One. Two.", "[{'text': 'One.', 'probability': 0.1}]", '["One.", "Two."]', "[1, 2",
     '[{"text": "  "}, {"text": 3}]', '{"text": "cut', "[" * 100_000],
    ids=["empty", "prose", "single quotes", "strings", "cut", "no text", "cut object", "brackets"],
)  # fmt: skip
def test_what_is_no_json_with_texts_yields_none(answer: str) -> None:
    assert verbalized(answer) == []


def test_a_line_break_within_a_json_string_is_borne() -> None:
    assert verbalized('[{"text": "a\nb", "probability": 1}]') == ["a\nb"]


class Scripted:
    """A tokenizer of characters, so that an engine's answers can be written out."""

    pad_token_id, unk_token_id, chat_template = 0, None, None

    def __call__(self, text: str | list[str], add_special_tokens: bool) -> dict[str, list]:
        if isinstance(text, list):
            return {"input_ids": [[ord(c) for c in each] for each in text]}
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


class Answering:
    """An engine that gives the answers of a script, and keeps what it was asked."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers, self.asked = list(answers), []

    def generate(self, prompts, sampling, on_progress=None, *, max_new_tokens=None):
        from powerflow_lit.types import Completion

        self.asked.append((["".join(map(chr, p)) for p in prompts], sampling))
        n = sampling.samples_per_prompt
        return [
            [Completion(tuple(map(ord, self.answers.pop(0))), (), False) for _ in range(n)]
            for _ in prompts
        ]


def test_verbalized_sampling_takes_its_samples_from_few_calls_and_counts_what_is_missing() -> None:
    three = json.dumps([{"text": t, "probability": 0.3} for t in "abc"])
    one = json.dumps([{"text": "d", "probability": 0.3}])
    engine = Answering([three, one, three, "no JSON", "neither", "nor this"])
    policy = Policy(engine, None, Scripted(), "plain", 1, 1.0)  # type: ignore[arg-type]
    sampler = VerbalizedSampling(2, ASK, 1.0, 1.0, tokens_per_call=70)
    prompts = [Prompt(7, "Say a letter."), Prompt(8, "Again.")]
    draws = sampler.sample(policy, prompts, [(1,), (2,)], EvaluationSettings(5, 30, 3), None)
    ((asked, sampling),) = engine.asked
    assert asked[0] == "Give 2 answers as JSON.\n\nSay a letter.\n"
    assert (sampling.samples_per_prompt, sampling.max_new_tokens) == (3, 70)
    texts = [[r.text for r in s.responses] for s in draws.samples]
    assert texts == [["a", "b", "d", "a", "b"], []], "no more than k of a call, five in all"
    assert draws.samples[0].responses[2].token_ids == (ord("d"),)
    assert [f["vs_parse_failures"] for f in draws.figures] == [0.0, 1.0]
    assert "3 of 6 calls" in draws.notes[0]
    assert "5 of 10 responses are missing" in draws.notes[0]
    assert sampler.tokens_needed(policy.tokenizer, "plain", prompts, [], None) == 39 + 70  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"k": 0}, {"tokens_per_call": 0}, {"instruction": "Say five."}])
def test_a_verbalized_request_that_cannot_work_is_refused(wrong: dict[str, object]) -> None:
    settings = {"k": 5, "instruction": ASK, "temperature": 1.0, "top_p": 1.0, "tokens_per_call": 9}
    with pytest.raises(ValueError, match=r"k=|must name \{k\}"):
        VerbalizedSampling(**(settings | wrong))  # type: ignore[arg-type]


def built(*overrides: str) -> dict[str, object]:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return dict(build_samplers(typed(compose("evaluate", list(overrides)), EvaluateConfig)))


def test_the_papers_inference_time_rows_are_there_by_name() -> None:
    names = sorted(path.stem for path in (Path(conf_dir()) / "sampler").glob("*.yaml"))
    found = built(f"sampler=[{','.join(names)}]", "samples_per_prompt=30")
    assert names == ["high_temperature", "low_temperature", "power_sampling", "vs_standard"]
    assert list(found) == ["T=1", "greedy", *names], "T=1/alpha is low_temperature, made once"
    assert found["power_sampling"] == PowerSampling(4.0, 16, 10, stop_at_eos=True)
    assert found["low_temperature"] == Decoding(0.25)
    assert found["high_temperature"] == Decoding(1.2)
    verbalized_sampling = found["vs_standard"]
    assert isinstance(verbalized_sampling, VerbalizedSampling)
    assert (verbalized_sampling.k, verbalized_sampling.tokens_per_call) == (5, 5 * 96)
    assert built("alpha=2", "sampler=[power_sampling]")["power_sampling"] == PowerSampling(
        2.0, 16, 10, stop_at_eos=True
    )


def test_at_alpha_one_its_inverse_is_no_second_decoding() -> None:
    assert list(built("alpha=1")) == ["T=1", "greedy"]

"""The min-p guard: what it allows, log-probs over it, and where the sets travel."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from powerflow_lit.models.guard import allowed_tokens, log_prob_over, removed_mass
from powerflow_lit.models.logprobs import guarded_responses, response_scores
from powerflow_lit.objectives import LossInputs, la_tb_mismatch, powerflow
from powerflow_lit.rollout import ReplayBuffer
from powerflow_lit.rollout.buffer import pack, unpack
from powerflow_lit.types import AllowedTokens, Prompt, TokenBatch, Trajectory, TrajectoryBatch

VOCABULARY = 23
MIN_P = 0.15
PAD = 0
ROWS = [
    ((3, 4, 5), (6, 7, 8, 2)),
    ((9,), (10, 2)),
    ((4, 4), (11,)),
    ((5, 6, 7, 8), (12, 3, 3, 9, 2)),
]


def model(seed: int = 0, scale: float = 8.0) -> LlamaForCausalLM:
    """A random model whose distributions are neither flat nor sure."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=16,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(scale)
    return made


def distribution(lm: LlamaForCausalLM, prefix: tuple[int, ...]) -> list[float]:
    """p(. | prefix) from one unpadded pass, by hand."""
    with torch.no_grad():
        logits = [float(x) for x in lm(input_ids=torch.tensor([prefix])).logits[0, -1].double()]
    top = max(logits)
    mass = [math.exp(x - top) for x in logits]
    return [m / sum(mass) for m in mass]


def by_hand(
    old: LlamaForCausalLM, lm: LlamaForCausalLM, prompt: tuple[int, ...], response: tuple[int, ...]
) -> tuple[list[set[int]], list[float]]:
    """What `old` allows at each token, and the log-probs of `lm` over that."""
    sets, log_probs = [], []
    for t, token in enumerate(response):
        p_old = distribution(old, prompt + response[:t])
        allowed = {v for v in range(VOCABULARY) if p_old[v] >= MIN_P * max(p_old)} | {token}
        p = distribution(lm, prompt + response[:t])
        sets.append(allowed)
        log_probs.append(math.log(p[token] / sum(p[v] for v in allowed)))
    return sets, log_probs


def sets_of(allowed: AllowedTokens) -> list[set[int]]:
    return [set(ids) - {-1} for ids in allowed.padded().tolist()]


def guarded(lm: LlamaForCausalLM, min_p: float = MIN_P, tokens: int = 10_000) -> TokenBatch:
    batch = TokenBatch.collate(ROWS, PAD)
    found = guarded_responses(
        lm, batch, min_p=min_p, tokens_per_microbatch=tokens, logit_chunk_mb=1.0
    )
    return replace(batch, allowed=tuple(g.allowed for g in found))


@pytest.mark.parametrize("tokens", [10_000, 12, 1])
def test_sets_and_log_probs_are_those_of_plain_loops_over_the_vocabulary(tokens: int) -> None:
    old, now = model(0), model(1)
    batch = guarded(old, tokens=tokens)
    assert batch.allowed is not None
    with torch.no_grad():
        scores = response_scores(
            now, batch, tokens_per_microbatch=tokens, logit_chunk_mb=1.0
        ).log_prob
    own = guarded_responses(
        old,
        TokenBatch.collate(ROWS, PAD),
        min_p=MIN_P,
        tokens_per_microbatch=tokens,
        logit_chunk_mb=1.0,
    )
    sizes = set()
    for n, (prompt, response) in enumerate(ROWS):
        sets, log_probs = by_hand(old, now, prompt, response)
        assert sets_of(batch.allowed[n]) == sets
        assert scores[n, : len(response)].tolist() == pytest.approx(log_probs, abs=1e-5)
        assert bool((scores[n, len(response) :] == 0).all())
        assert own[n].log_prob.tolist() == pytest.approx(by_hand(old, old, prompt, response)[1],
                                                         abs=1e-5)  # fmt: skip
        outside = [
            1 - sum(p[v] for v in allowed)
            for t, allowed in enumerate(sets)
            for p in [distribution(old, prompt + response[:t])]
        ]
        mass = removed_mass(own[n].log_prob_full, own[n].log_prob)
        assert mass.tolist() == pytest.approx(outside, abs=1e-5)
        sizes |= {len(s) for s in sets}
    assert 1 < max(sizes) < VOCABULARY, "the sets are neither everything nor the token alone"
    assert len(sizes) > 2, "and ragged"


def test_a_sampled_token_beyond_the_border_is_allowed_all_the_same() -> None:
    logits = torch.tensor([[0.0, -10.0, -20.0]])
    allowed = allowed_tokens(logits, torch.tensor([2]), 0.5)
    assert sets_of(allowed) == [{0, 2}]
    assert float(log_prob_over(logits, torch.tensor([2]), allowed)) == pytest.approx(-20.0)


def test_a_guard_that_allows_everything_changes_no_log_prob_and_no_gradient() -> None:
    found = []
    for batch in (TokenBatch.collate(ROWS, PAD), guarded(model(), min_p=1e-30)):
        lm = model(1)
        scores = response_scores(
            lm, batch, tokens_per_microbatch=10_000, logit_chunk_mb=1.0
        ).log_prob
        scores.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])
        found.append((scores.detach(), gradient))
    (plain, plain_gradient), (free, free_gradient) = found
    torch.testing.assert_close(free, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(free_gradient, plain_gradient, rtol=1e-4, atol=1e-5)
    assert plain_gradient.abs().max() > 0.1


def test_only_allowed_logits_count_and_get_a_gradient() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([1, 4, 6])
    allowed = AllowedTokens(
        torch.tensor([1, 2, 4, 0, 3, 5, 6], dtype=torch.int32), torch.tensor([2, 1, 4])
    )
    log_prob = log_prob_over(logits, targets, allowed)
    log_prob.sum().backward()
    assert logits.grad is not None
    inside = torch.zeros(3, 7, dtype=torch.bool)
    for row, ids in enumerate(([1, 2], [4], [0, 3, 5, 6])):
        inside[row, ids] = True
    assert bool((logits.grad[~inside] == 0).all())
    assert bool((logits.grad[[0, 0, 2, 2, 2, 2], [1, 2, 0, 3, 5, 6]] != 0).all())
    assert float(log_prob[1]) == 0.0, "a token that stands alone is certain"
    with torch.no_grad():
        poisoned = torch.where(inside, logits, torch.nan)
        assert torch.equal(log_prob_over(poisoned, targets, allowed), log_prob)


def test_splitting_a_guarded_batch_changes_no_gradient() -> None:
    batch = guarded(model(0))

    def gradient(tokens: int) -> Tensor:
        lm = model(1)
        total = response_scores(
            lm, batch, tokens_per_microbatch=tokens, logit_chunk_mb=1.0
        ).log_prob.sum(1)
        ((total - total.mean()) ** 2).mean().backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])

    whole, split = gradient(10_000), gradient(8)
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


# --- where the sets travel ----------------------------------------------------------------------


def trajectories(lm: LlamaForCausalLM, refill: int, guard: bool = True) -> list[Trajectory]:
    batch = TokenBatch.collate(ROWS, PAD)
    found = guarded_responses(
        lm, batch, min_p=MIN_P, tokens_per_microbatch=10_000, logit_chunk_mb=1.0
    )
    return [
        Trajectory(
            prompt=Prompt(n, "p"), group=refill * len(ROWS) + n, prompt_ids=prompt,
            response_ids=response, response="r", truncated=False, formatted=True, correct=None,
            policy_version=refill, log_p_old=g.log_prob, log_p_base=g.log_prob,
            allowed=g.allowed if guard else None,
        )
        for n, ((prompt, response), g) in enumerate(zip(ROWS, found, strict=True))
    ]  # fmt: skip


def buffer() -> ReplayBuffer:
    return ReplayBuffer(max_staleness=1, updates_per_refill=1, prompts_per_update=8, seed=0)


def test_stale_and_new_trajectories_keep_their_own_sets_through_a_checkpoint() -> None:
    held, made = buffer(), [trajectories(model(seed), seed) for seed in range(2)]
    for refill, group in enumerate(made):
        held.add(group, refill)
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    file.seek(0)
    restored = buffer()
    restored.load_state_dict(torch.load(file, weights_only=True))
    (batch,) = restored.updates(PAD)
    batch = batch.to(torch.device("cpu"))
    assert batch.tokens.allowed is not None
    assert sorted(batch.policy_version.tolist()) == [0] * 4 + [1] * 4
    differ = 0
    for group, version, allowed in zip(
        batch.prompt_index.tolist(), batch.policy_version, batch.tokens.allowed, strict=True
    ):
        number = group % len(ROWS)
        expected = made[int(version)][number].allowed
        assert expected is not None
        assert allowed.ids.dtype == torch.int32
        assert sets_of(allowed) == sets_of(expected)
        other = made[1 - int(version)][number].allowed
        assert other is not None
        differ += sets_of(allowed) != sets_of(other)
    assert differ > 0
    part = batch.tokens.rows(torch.tensor([5, 2]))
    assert part.allowed is not None
    assert [sets_of(a) for a in part.allowed] == [sets_of(batch.tokens.allowed[i]) for i in (5, 2)]


def test_a_trajectory_without_a_guard_packs_as_before() -> None:
    (plain, *_) = trajectories(model(), 0, guard=False)
    assert unpack(pack(plain)).allowed is None
    state = pack(plain)
    del state["allowed"]  # a checkpoint from before there were guards
    assert unpack(state).allowed is None
    batch = TrajectoryBatch.collate([plain], PAD)
    assert batch.to(torch.device("cpu")).tokens.rows(torch.tensor([0])).allowed is None


def test_guarded_and_unguarded_trajectories_never_share_an_update() -> None:
    mixed = trajectories(model(), 0) + trajectories(model(), 1, guard=False)
    with pytest.raises(ValueError, match=r"4 of 8 .*guard\.min_p cannot be switched"):
        TrajectoryBatch.collate(mixed, PAD)


# --- the target ---------------------------------------------------------------------------------


class Bigram(nn.Module):
    """Next-token logits that depend on the last token alone, in the shape of a causal model."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(*table.shape, bias=False)
        self.head.weight.data = table.T.clone()
        self.config = PretrainedConfig()

    def base_model(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        one_hot = nn.functional.one_hot(input_ids, self.head.in_features)
        return SimpleNamespace(last_hidden_state=one_hot.float())

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_the_fixed_point_is_the_power_of_the_base_on_the_allowed_tokens_whatever_lies_outside() -> (
    None
):
    """One-token answers: alpha x the base's logits inside, garbage outside, is a fixed point."""
    alpha, size = 0.5, 6
    base = torch.tensor([2.0, 1.0, 0.5, -6.0, -7.0, -5.0]).expand(size, size)
    policy = alpha * base
    policy = torch.where(base < -4, torch.tensor([0, 0, 0, -4.0, -6.0, -4.5]), policy)
    answers = [((1,), (v,)) for v in range(3)]
    plain = TokenBatch.collate(answers, PAD)
    found = guarded_responses(
        Bigram(policy), plain, min_p=0.05, tokens_per_microbatch=100, logit_chunk_mb=1.0
    )
    assert [sets_of(g.allowed) for g in found] == [[{0, 1, 2}]] * 3
    batch = replace(plain, allowed=tuple(g.allowed for g in found))

    def gradient(tokens: TokenBatch) -> Tensor:
        lm = Bigram(policy)
        log_pf = response_scores(lm, tokens, tokens_per_microbatch=100, logit_chunk_mb=1.0).log_prob
        with torch.no_grad():
            log_p_base = response_scores(
                Bigram(base), tokens, tokens_per_microbatch=100, logit_chunk_mb=1.0
            ).log_prob
        zeros = torch.zeros(3)
        inputs = LossInputs(log_pf=log_pf, log_p_base=log_p_base, log_p_old=log_pf.detach(),
                            mask=tokens.mask, log_z=zeros, format_penalty=zeros,
                            prompt_index=zeros.long())  # fmt: skip
        mismatch = la_tb_mismatch(inputs, alpha=alpha).detach()
        inputs = replace(inputs, log_z=-mismatch.mean().expand(3))
        powerflow(inputs, alpha=alpha, epsilon=0.2).loss.backward()
        assert lm.head.weight.grad is not None
        return lm.head.weight.grad

    assert gradient(batch).abs().max() < 1e-6
    # without the guard the policy's own garbage would pull the allowed tokens away from it
    everything = TokenBatch.collate([((1,), (v,)) for v in (0, 1, 3)], PAD)
    assert gradient(everything).abs().max() > 1e-2

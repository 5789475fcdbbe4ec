"""Chunked log-probs: equal to the plain log-softmax in value and gradient, in far less memory."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.log_prob import Cell, Measured, main, measure
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from powerflow_lit.models.linear_log_prob import linear_log_prob, linear_statistics
from powerflow_lit.models.loading import ModelError, load_model
from powerflow_lit.models.logprobs import OutputLayer, response_scores
from powerflow_lit.models.probes import check_output_layer
from powerflow_lit.types import AllowedTokens, TokenBatch
from tests.tiny_models import KINDS, Kind, make_tiny_model

ROWS, VOCABULARY, HIDDEN = 37, 101, 24
PLAIN: dict[str, Any] = {"bias": None, "scale": 1.0, "soft_cap": None, "temperature": 1.0}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets, and the gradient of the log-probs."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=g, dtype=torch.float64)
    weight = 0.5 * torch.randn(VOCABULARY, HIDDEN, generator=g, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=g, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=g)
    grad = torch.randn(ROWS, generator=g, dtype=torch.float64)
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    return leaves[0], leaves[1], leaves[2], targets, grad


def by_hand(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    temperature: float,
    outside: Tensor | None = None,
) -> Tensor:
    """The whole matrix of logits and its log-softmax."""
    logits = hidden @ weight.T
    logits = scale * (logits if bias is None else logits + bias)
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    logits = logits / temperature
    logits = logits if outside is None else logits.masked_fill(outside, -torch.inf)
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def some_sets(targets: Tensor) -> tuple[AllowedTokens, Tensor]:
    """Sets of 1 to V tokens with the target in each, and (M, V) what is outside of them."""
    g = torch.Generator().manual_seed(1)
    share = torch.rand(len(targets), 1, generator=g)
    inside = torch.rand(len(targets), VOCABULARY, generator=g) < share
    inside[0], inside[1] = False, True
    inside.scatter_(1, targets[:, None], True)
    return AllowedTokens(inside.nonzero()[:, 1].int(), inside.sum(1).int()), ~inside


SHAPES = {
    "plain": PLAIN,
    "bias": {**PLAIN, "bias": True},
    "soft cap": {**PLAIN, "soft_cap": 1.5},
    "temperature": {**PLAIN, "temperature": 0.3},
    "all": {"bias": True, "scale": 0.25, "soft_cap": 2.0, "temperature": 1.7},
}


@pytest.mark.parametrize("rows_per_chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("guard", [False, True], ids=["", "guarded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_whole_log_softmax(
    shape: str, guard: bool, rows_per_chunk: int
) -> None:
    """float64 against float64 to the last digits, and float32 against float64 to 1e-5."""
    hidden, weight, bias, targets, grad = inputs(torch.float64)
    allowed, outside = some_sets(targets) if guard else (None, None)
    options = SHAPES[shape] | {"bias": bias if SHAPES[shape]["bias"] else None}
    leaves = [hidden, weight] + ([bias] if SHAPES[shape]["bias"] else [])
    expected = by_hand(hidden, weight, targets, **options, outside=outside)
    wanted = torch.autograd.grad(expected, leaves, grad)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        h, w, b, *_ = inputs(dtype)
        leaves = [h, w] + ([b] if SHAPES[shape]["bias"] else [])
        options = SHAPES[shape] | {"bias": b if SHAPES[shape]["bias"] else None}
        found = linear_log_prob(
            h, w, targets, **options, rows_per_chunk=rows_per_chunk, allowed=allowed
        )
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
        for ours, theirs in zip(
            torch.autograd.grad(found, leaves, grad.to(dtype)), wanted, strict=True
        ):
            assert theirs.abs().max() > 0.1
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows_per_chunk", [8, 1000])
@pytest.mark.parametrize("guard", [False, True], ids=["", "guarded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_entropies_and_certainties_are_those_of_the_whole_logits(
    shape: str, guard: bool, rows_per_chunk: int
) -> None:
    """Values and gradients in float64, alone and beside the log-probs of the same pass."""
    hidden, weight, bias, targets, grad = inputs(torch.float64)
    allowed, _ = some_sets(targets) if guard else (None, None)
    options = SHAPES[shape] | {"bias": bias if SHAPES[shape]["bias"] else None}
    leaves = [hidden, weight] + ([bias] if SHAPES[shape]["bias"] else [])
    logits = whole_logits(hidden, weight, **(options | {"temperature": 1.0}))
    log_p = (logits / 0.5).log_softmax(-1)
    tempered = logits / options["temperature"]
    wanted = {
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "certainty": tempered.logsumexp(-1) - tempered.mean(-1),
    }
    found = linear_statistics(
        hidden, weight, targets, **options, rows_per_chunk=rows_per_chunk, allowed=allowed,
        entropy_temperature=0.5, certainty=True,
    )  # fmt: skip
    plain = linear_log_prob(
        hidden, weight, targets, **options, rows_per_chunk=rows_per_chunk, allowed=allowed
    )
    assert torch.equal(found.log_prob, plain)
    for name, expected in wanted.items():
        ours = getattr(found, name)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        assert_same_gradients(ours, expected, leaves, grad)
    assert found.entropy is not None
    assert found.certainty is not None
    together = found.entropy + 0.3 * found.certainty - 2.0 * found.log_prob
    expected = wanted["entropy"] + 0.3 * wanted["certainty"] - 2.0 * plain
    assert_same_gradients(together, expected, leaves, grad)


def whole_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None, scale: float, soft_cap: float | None,
    temperature: float,
) -> Tensor:  # fmt: skip
    logits = hidden @ weight.T
    logits = scale * (logits if bias is None else logits + bias)
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    return logits / temperature


def assert_same_gradients(ours: Tensor, wanted: Tensor, leaves: list[Tensor], grad: Tensor) -> None:
    pairs = [torch.autograd.grad(x, leaves, grad, retain_graph=True) for x in (ours, wanted)]
    for found, expected in zip(*pairs, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_a_certain_token_has_no_entropy_and_a_finite_gradient() -> None:
    """Logits so far apart that float32 knows of one token only: 0 log 0 is 0."""
    hidden = (1e4 * torch.eye(3, HIDDEN)).requires_grad_()
    weight = torch.eye(VOCABULARY, HIDDEN)
    found = linear_statistics(
        hidden, weight, torch.arange(3), **PLAIN, rows_per_chunk=2, entropy_temperature=0.5
    )
    assert found.certainty is None
    assert found.entropy is not None
    assert found.entropy.tolist() == [0.0] * 3
    (gradient,) = torch.autograd.grad(found.entropy.sum(), hidden)
    assert (gradient == 0).all()


def test_the_memory_of_entropies_and_certainties_is_that_of_a_few_chunks() -> None:
    """However many rows there are, forward and backward."""
    held = []
    for times in (1, 8):
        hidden, weight, _, targets, _ = inputs()
        hidden = hidden.detach().repeat(times, 1).requires_grad_()
        with Held() as one:
            found = linear_statistics(
                hidden, weight, targets.repeat(times), **PLAIN, rows_per_chunk=5,
                entropy_temperature=0.5, certainty=True,
            )  # fmt: skip
            assert found.entropy is not None
            assert found.certainty is not None
            (found.entropy + found.certainty + found.log_prob).sum().backward()
        held.append(one.most)
    assert held[0] == held[1]
    assert 5 * VOCABULARY <= held[0] <= 6 * 5 * VOCABULARY


class Held(torch.utils._python_dispatch.TorchDispatchMode):
    """The most numbers that tensors with the vocabulary in their shape have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and VOCABULARY in result.shape and HIDDEN not in result.shape:
            storage = result.untyped_storage()
            place = storage.data_ptr()
            if place not in self._alive:
                self._alive[place] = result.numel()
                weakref.finalize(result, self._alive.pop, place, None)
            self.most = max(self.most, sum(self._alive.values()))
        return result


def test_a_frozen_output_layer_costs_no_gradient_and_a_frozen_trunk_none_either() -> None:
    hidden, weight, _, targets, grad = inputs()
    both = linear_log_prob(hidden, weight, targets, **PLAIN, rows_per_chunk=8)
    d_hidden, d_weight = torch.autograd.grad(both, [hidden, weight], grad.float())
    for frozen in (hidden, weight):
        hidden.grad = weight.grad = None
        frozen.requires_grad_(False)
        shapes: list[torch.Size] = []
        with Shapes(shapes):
            found = linear_log_prob(hidden, weight, targets, **PLAIN, rows_per_chunk=8)
            found.backward(grad.float())
        frozen.requires_grad_(True)
        if frozen is weight:
            assert weight.grad is None
            assert torch.equal(hidden.grad, d_hidden)
            assert shapes.count(weight.shape) == 0, "nothing of the weight's size was made"
        else:
            assert hidden.grad is None
            assert torch.equal(weight.grad, d_weight)
            assert shapes.count(weight.shape) > 0


class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the shape of every new tensor."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and all(result is not a for a in args):
            self.shapes.append(result.shape)
        return result


def test_no_chunk_is_larger_than_asked_for() -> None:
    hidden, weight, _, targets, grad = inputs()
    shapes: list[torch.Size] = []
    with Shapes(shapes):
        linear_log_prob(hidden, weight, targets, **PLAIN, rows_per_chunk=5).backward(grad.float())
    sizes = {s.numel() for s in shapes if VOCABULARY in s and HIDDEN not in s}
    assert max(sizes) == 5 * VOCABULARY


def test_hidden_states_may_be_used_twice_and_the_whole_recomputed() -> None:
    """As the Z' head uses them too, within a microbatch whose forward pass is run again."""
    hidden, weight, _, targets, grad = inputs()
    found = []
    for again in (False, True):

        def both(h: Tensor, w: Tensor) -> Tensor:
            h = torch.tanh(h)
            log_prob = linear_log_prob(h, w, targets, **PLAIN, rows_per_chunk=8)
            return log_prob + h.square().mean(1)

        out = (
            checkpoint(both, hidden, weight, use_reentrant=False) if again else both(hidden, weight)
        )
        found.append(torch.autograd.grad(out, [hidden, weight], grad.float()))
    h = torch.tanh(hidden.detach().double()).requires_grad_()
    w = weight.detach().double().requires_grad_()
    out = by_hand(h, w, targets, **PLAIN) + h.square().mean(1)
    d_h, d_w = torch.autograd.grad(out, [h, w], grad)
    wanted = (d_h * (1 - h.detach() ** 2), d_w)
    for pair in found:
        for ours, theirs in zip(pair, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16 weights"])
def test_in_bfloat16_no_sum_over_chunks_is_lost(autocast: bool) -> None:
    """The products round, the sums do not: however many chunks, the error is of one rounding."""
    generator = torch.Generator().manual_seed(3)
    rows = 600
    hidden = torch.randn(rows, HIDDEN, generator=generator).abs() + 1  # of one sign: sums grow
    weight = 0.1 * torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = by_hand(h, w, targets, **PLAIN)
    d_h, d_w = torch.autograd.grad(expected.sum(), [h, w])
    h = hidden.detach().requires_grad_()
    w = (weight.float() if autocast else weight).detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = linear_log_prob(h, w, targets, **PLAIN, rows_per_chunk=4)
    found.sum().backward()
    assert found.dtype == torch.float32
    assert h.grad is not None
    assert w.grad is not None
    assert (h.grad.dtype, w.grad.dtype) == (h.dtype, w.dtype)
    assert (found.double() - expected).abs().max() < 0.05
    for ours, theirs in ((h.grad, d_h), (w.grad, d_w)):
        assert (ours.double() - theirs).abs().max() < 0.01 * theirs.abs().max()


# --- the output layers of real architectures -----------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_scored_as_its_own_logits_say(kind: Kind, tmp_path: Path) -> None:
    attention = "eager" if kind == "gemma2" else "sdpa"
    model = load_model(
        str(make_tiny_model(tmp_path, kind)), dtype="float32", attn_implementation=attention,
        trust_remote_code=False,
    )  # fmt: skip
    check_output_layer(model)
    rows = [(list(b"a question"), list(b"an answer")), (list(b"why"), list(b"x"))]
    for temperature in (1.0, 0.5):
        batch = TokenBatch.collate(rows, pad_id=0)
        scores = response_scores(
            model, batch, tokens_per_microbatch=1, logit_chunk_mb=0.003, temperature=temperature
        ).log_prob
        (gradient,) = torch.autograd.grad(scores.sum(), model.get_output_embeddings().weight)
        total = torch.zeros(())
        for n, (prompt, response) in enumerate(rows):
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
            log_probs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = log_probs[torch.arange(len(response)), torch.tensor(response)]
            torch.testing.assert_close(scores[n, : len(response)], expected, rtol=1e-5, atol=1e-5)
            total = total + expected.sum()
        (wanted,) = torch.autograd.grad(total, model.get_output_embeddings().weight)
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "entry"), [("cohere", {"logit_scale": 0.2}), ("granite", {"logits_scaling": 8.0})]
)
def test_a_factor_on_the_logits_is_taken_into_account(kind: str, entry: dict[str, float]) -> None:
    model = odd_model(kind, **entry)
    assert OutputLayer.of(model).scale != 1
    check_output_layer(model)


def test_logits_made_in_an_unknown_way_are_refused() -> None:
    with pytest.raises(ModelError, match=r"HyperCLOVAXForCausalLM.*nats off its own"):
        check_output_layer(odd_model("hyperclovax", logits_scaling=0.3))
    model = odd_model("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="is a Sequential: only a plain linear layer"):
        OutputLayer.of(model)


def odd_model(kind: str, **entries: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, initializer_range=0.5,
        **entries,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_attention_that_would_leave_out_a_soft_cap_is_refused(tmp_path: Path) -> None:
    folder = str(make_tiny_model(tmp_path, "gemma2"))
    with pytest.raises(ModelError, match=r"set model\.attn_implementation=eager"):
        load_model(folder, dtype="float32", attn_implementation="sdpa", trust_remote_code=False)


# --- memory --------------------------------------------------------------------------------------


def claims(cells: list[Cell]) -> list[Measured]:
    """The first cell is the naive one."""
    found = [measure(cell) for cell in cells]
    whole, *ours = found
    for one in ours:
        assert one.peak_mb <= whole.peak_mb / 5, (one, whole)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_is_a_fifth_of_the_naive_and_does_not_grow_with_the_rows() -> None:
    size = {"vocabulary": 30_000, "hidden": 64, "chunk": 64}
    _, few, many = claims(
        [Cell("naive", 1024, **size), *(Cell("recompute", n, **size) for n in (512, 4096))]
    )
    assert many.peak_mb < 1.2 * few.peak_mb


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_at_the_vocabulary_of_qwen() -> None:
    _, *ours = claims(
        [Cell("naive", 1024), *(Cell("recompute", n) for n in (512, 1024, 4096, 8192))]
    )
    few, thousand, many, most = (one.peak_mb for one in ours)
    assert many < 1.2 * few
    assert most < 1.2 * thousand
    assert ours[1].value_error is not None
    assert ours[1].gradient_error is not None
    assert ours[1].value_error < 1e-5
    assert ours[1].gradient_error < 1e-5


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_benchmark_prints_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "found.json"
    arguments = f"--rows 64 --vocabulary 500 --hidden 16 --methods recompute --output {output}"
    monkeypatch.setattr(sys, "argv", ["log_prob", *arguments.split()])
    main()
    printed = capsys.readouterr().out
    (cell,) = json.loads(output.read_text())["cells"]
    assert f"{cell['peak_mb']:.0f}" in printed
    assert f"{cell['value_error']:.1e}" in printed
    assert cell["value_error"] < 1e-5

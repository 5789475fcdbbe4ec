"""Operations, traffic and memory of a refill, against what torch counts and a simulated ring."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen2Config

from powerflow_lit.devices import spread_of
from powerflow_lit.memory_check import check_memory
from powerflow_lit.models import planning
from powerflow_lit.models.architecture import Architecture, architecture
from powerflow_lit.models.checkpointing import checkpoint_layers
from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.lora import LoraSettings, add_lora
from powerflow_lit.models.memory import estimate
from powerflow_lit.models.planning import Speeds, forward_flops, plan, update_flops
from powerflow_lit.models.probes import allow_packing
from powerflow_lit.models.workload import EngineNeeds, Spread, Workload
from powerflow_lit.types import TokenBatch
from tests.unit.test_config import checked
from tests.unit.test_memory import QWEN_7B

SHAPE = Qwen2Config(
    vocab_size=512, hidden_size=128, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=352, num_hidden_layers=3, max_position_embeddings=512,
    tie_word_embeddings=False,
)  # fmt: skip
ADAPTER = LoraSettings(rank=8, lora_alpha=8.0, target_modules="all-linear")
NO_ENGINE = EngineNeeds("server", "bfloat16", sequences=256, kv_cache_bytes=None, share_bytes=None,
                        sleeps=False, tensor_parallel=1, engines=1)  # fmt: skip
SMALL = Workload(
    dtype="float32", base_dtype=None, lora=None, autocast=False, gradient_checkpointing=False,
    packing=True, tokens_per_microbatch=4096, longest_prompt=32, longest_response=24,
    groups_per_refill=4, groups_per_update=2, samples_per_prompt=6, updates_per_refill=2,
    scorings=1, logit_chunk_mb=1.0, head_width=None, engine=NO_ENGINE,
)  # fmt: skip
PEAKS = Speeds(
    flops_16=1e15, flops_32=1e14, memory=1e12, link=1e11, network=1e10, compute_share=0.5,
    memory_share=0.5, link_share=0.5, decode_step_s=0.0,
)  # fmt: skip


def built(work: Workload) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(SHAPE, dtype=getattr(torch, work.dtype)).eval()
    if work.packing:
        allow_packing(model)
    if work.lora is not None:
        add_lora(model, work.lora)
    if work.gradient_checkpointing:
        checkpoint_layers(model)
    return model


def sizes(work: Workload) -> Architecture:
    return architecture(SHAPE, work.lora, trust_remote_code=False)


def batch(work: Workload) -> TokenBatch:
    """An update of rows of the greatest length."""
    p, length = work.longest_prompt, work.longest_response
    prompts = [[5 + i] * p for i in range(work.groups_per_update)]
    return TokenBatch.collate(
        [(x, [7] * length) for x in prompts for _ in range(work.samples_per_prompt)], 0
    )


def scored(model: PreTrainedModel, work: Workload) -> torch.Tensor:
    return response_scores(
        model, batch(work), tokens_per_microbatch=work.tokens_per_microbatch,
        logit_chunk_mb=work.logit_chunk_mb,
    ).log_prob  # fmt: skip


@pytest.mark.parametrize("packing", [True, False])
def test_operations_of_a_forward_pass_are_those_that_torch_counts(packing: bool) -> None:
    work = replace(SMALL, packing=packing)
    model = built(work)
    # the counter knows no fused attention on the CPU; the plain one is products that it counts
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counted,
    ):
        scored(model, work)
    expected = sum(forward_flops(sizes(work), work.largest_pass))
    assert expected == pytest.approx(counted.get_total_flops(), rel=1e-3)


UPDATES = {
    "all weights": SMALL,
    "an adapter": replace(SMALL, lora=ADAPTER),
    "checkpointed": replace(SMALL, gradient_checkpointing=True),
    "two passes": replace(SMALL, tokens_per_microbatch=192),
    "padded": replace(SMALL, packing=False),
}


@pytest.mark.parametrize("kind", UPDATES)
def test_operations_of_an_update_are_those_that_torch_counts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = UPDATES[kind]
    # torch's plain attention keeps its scores; a fused kernel computes them again
    monkeypatch.setattr(planning, "ATTENTION_BACKWARD", 2.0)
    model = built(work)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        scored(model, work).mean().backward()
    found = sizes(work)
    every, last = work.rows_per_update, min(work.rows_per_pass, work.rows_per_update)
    expected = update_flops(found, work, work.passed(last), again=False)
    if every > last:
        expected += update_flops(found, work, work.passed(every - last), again=True)
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.02)


class PeakBytes(TorchDispatchMode):
    """The largest sum of the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, made)
        return made

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = weakref.finalize(storage, self._gone, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("kind", UPDATES)
def test_the_peak_of_an_update_is_that_which_torch_tracks(kind: str) -> None:
    work = replace(UPDATES[kind], longest_prompt=48, longest_response=48)
    if work.tokens_per_microbatch < 4096:  # two passes as before
        work = replace(work, tokens_per_microbatch=400)
    tracked = PeakBytes()
    with tracked:
        model = built(work)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=False)
        for _ in range(2):
            loss = scored(model, work).mean()
            optimizer.zero_grad(set_to_none=True)  # Lightning's order: after the forward pass
            loss.backward()
            optimizer.step()
            del loss
    predicted = estimate(sizes(work), work)
    ratio = max(predicted.at("log-probs"), predicted.at("backward")) / tracked.peak
    assert 0.9 < ratio < 1.25, (ratio, tracked.peak)


def test_products_are_counted_from_the_shapes() -> None:
    found = architecture(SHAPE, None, trust_remote_code=False)
    h, k, f = 128, 64, 352
    assert found.multiplied == 3 * (2 * h * h + 2 * h * k + 3 * h * f)
    assert found.ends == 2 * 512 * h
    # biases and norms are all that is left
    assert found.parameters - found.multiplied - found.ends == 3 * (h + 2 * k + 2 * h) + h


def test_of_a_mixture_a_token_goes_through_some_experts() -> None:
    shape = MixtralConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    found = architecture(shape, None, trust_remote_code=False)
    h, k, f = 64, 32, 96
    assert found.multiplied == 3 * (2 * h * h + 2 * h * k + 8 * h + 2 * 3 * h * f)
    assert found.parameters > 3 * 8 * 3 * h * f


def ring(devices: int, numbers: int) -> tuple[list[int], list[list[float]]]:
    """A ring's all-reduce as it is done: numbers sent by each, and what each then holds."""
    held = [[float(d + i) for i in range(numbers)] for d in range(devices)]
    size, sent = numbers // devices, [0] * devices
    for phase in ("reduce", "gather"):
        for step in range(devices - 1):
            messages = []
            for d in range(devices):
                chunk = (d - step + (phase == "gather")) % devices
                span = range(chunk * size, (chunk + 1) * size)
                messages.append(((d + 1) % devices, span, [held[d][i] for i in span]))
                sent[d] += size
            for to, span, values in messages:
                for i, value in zip(span, values, strict=True):
                    held[to][i] = held[to][i] + value if phase == "reduce" else value
    return sent, held


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_what_an_all_reduce_sends_is_what_a_ring_sends(devices: int) -> None:
    numbers = 24 * devices
    sent, held = ring(devices, numbers)
    assert held == [[sum(d + i for d in range(devices)) for i in range(numbers)]] * devices
    assert set(sent) == {round(planning._ring(devices) * numbers)}


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_ddp_keeps_a_second_copy_of_the_gradients_in_buckets() -> None:
    model = built(SMALL)
    ddp = DistributedDataParallel(model)
    buckets = ddp._get_ddp_logging_data()["bucket_sizes"]
    assert sum(int(size) for size in buckets.split(",")) == 4 * model.num_parameters()
    asked = replace(SMALL, spread=Spread(2, 2, shards=1, bucketed=True))
    items = {i.name: i.size for i in estimate(sizes(asked), asked).items}
    assert items["gradients' buckets"] == 4 * model.num_parameters()


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"devices": 1}, Spread(1, 1, 1, False)),
        ({"devices": 8, "num_nodes": 2, "strategy": "ddp"}, Spread(16, 8, 1, True)),
        ({"devices": [0, 3], "strategy": "ddp"}, Spread(2, 2, 1, True)),
        ({"devices": "4", "num_nodes": 4, "strategy": "fsdp"}, Spread(16, 4, 16, False)),
        (
            {"devices": 2, "strategy": {
                "_target_": "lightning.pytorch.strategies.DDPStrategy",
                "gradient_as_bucket_view": True}},
            Spread(2, 2, 1, False),
        ),
        (
            {"devices": 4, "strategy": {
                "_target_": "lightning.pytorch.strategies.ModelParallelStrategy"}},
            Spread(4, 4, 4, False),
        ),
    ],
)  # fmt: skip
def test_how_a_trainer_spreads_is_read_from_its_strategy(
    trainer: dict[str, object], expected: Spread
) -> None:
    assert spread_of({"accelerator": "cpu", **trainer}) == expected


def qwen(**changes: object) -> tuple[Architecture, Workload]:
    engine = EngineNeeds("vllm", "bfloat16", sequences=256, kv_cache_bytes=None,
                         share_bytes=40 * 2**30, sleeps=True, tensor_parallel=1)  # fmt: skip
    work = replace(
        SMALL, dtype="float32", base_dtype="bfloat16", autocast=True, longest_prompt=1000,
        longest_response=2000, groups_per_refill=32, groups_per_update=8, samples_per_prompt=8,
        updates_per_refill=4, tokens_per_microbatch=16384, engine=engine,
    )  # fmt: skip
    shape = Qwen2Config(**{k: v for k, v in QWEN_7B.items() if k != "architectures"})
    return architecture(shape, None, trust_remote_code=False), replace(work, **changes)  # type: ignore[arg-type]


def seconds(work: Workload, name: str, speeds: Speeds = PEAKS) -> float:
    model, _ = qwen()
    return sum(c.seconds for c in plan(model, work, speeds).costs if c.name.startswith(name))


def test_decoding_alone_takes_the_time_of_reading_the_weights() -> None:
    _, work = qwen(groups_per_refill=1, samples_per_prompt=1)
    found = seconds(work, "rollout: decoding")
    # 2,000 steps; 14.14 GB of weights (the input's embedding is not read) and 1 to 3 thousand
    # tokens of cache of 57,344 bytes each, at 0.5 TB/s
    expected = 2000 * ((15.231233024e9 - 2 * 152064 * 3584) + 2000 * 57344) / 0.5e12
    assert found == pytest.approx(expected, rel=1e-6)
    # many at a time read them once: far less than many times the time
    many = seconds(replace(work, samples_per_prompt=32), "rollout: decoding")
    assert expected < many < 1.5 * expected
    least = replace(PEAKS, decode_step_s=1.0)
    assert seconds(work, "rollout: decoding", least) == pytest.approx(2000)
    _, alone = qwen()
    shared = replace(alone, engine=replace(alone.engine, tensor_parallel=2, sequences=512))
    between = seconds(replace(shared, spread=Spread(2, 2, 2, False)), "rollout: between")
    # two all-reduces a layer of bfloat16 states, of every token of both ranks' 64 prompts and
    # their 8 responses, at half of 1e11 bytes a second
    tokens = 64 * 1000 + 64 * 8 * 2000
    assert between == pytest.approx(2 * 28 * tokens * 3584 * 2 / 0.5e11, rel=1e-6)


def test_devices_share_the_work_and_pay_for_what_they_send() -> None:
    _, alone = qwen()
    spread = Spread(8, 8, shards=1, bucketed=True)
    model, each = qwen(groups_per_refill=4, groups_per_update=1, spread=spread)
    assert seconds(each, "score") == pytest.approx(seconds(alone, "score") / 8)
    assert plan(model, each, PEAKS).response_tokens == plan(model, alone, PEAKS).response_tokens
    sent = 4 * 2 * 7 / 8 * 4 * model.parameters  # 4 updates of float32 gradients
    assert seconds(each, "update: between") == pytest.approx(sent / 0.5e11)
    elsewhere = replace(each, spread=replace(spread, per_machine=4))
    assert seconds(elsewhere, "update: between") == pytest.approx(sent / 0.5e10)
    sharded = replace(each, spread=Spread(8, 8, shards=8, bucketed=False))
    passes = sharded.passes_per_update
    gathered = 4 * (3 * passes - 1) * 7 / 8 * 4 * model.parameters
    assert seconds(sharded, "update: weights") == pytest.approx(gathered / 0.5e11)


def test_the_command_plans_from_a_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    settings = (
        "experiment=paper/qwen2.5_math_7b_reasoning", f"model.path={tmp_path}",
        "model.estimate_only=true", "trainer=fsdp", "trainer.devices=8", "trainer.num_nodes=2",
    )  # fmt: skip
    check_memory(checked(*settings, "device=h100", "rollout.engine.sleep=true"))
    said = capsys.readouterr().out
    assert "each of 16 devices" in said
    assert "7.62B float32, 1/16 here" in said
    assert "H100 80 GB (79.6 GiB)" in said
    assert "time of a refill" in said
    assert "does not fit" not in said
    check_memory(checked(*settings[:3], "device=l40s"))
    assert "It does not fit: this run needs about" in capsys.readouterr().out
    check_memory(checked("model.estimate_only=true"))
    assert "name one, as in device=h100" in capsys.readouterr().out

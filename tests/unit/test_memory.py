"""The memory estimate: counted from a config alone, compared with the device, refused early."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from powerflow_lit import devices, memory_check
from powerflow_lit.devices import GIB, Device
from powerflow_lit.memory_check import check_memory, workload
from powerflow_lit.models.architecture import architecture
from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.loading import load_config
from powerflow_lit.models.lora import LoraSettings, add_lora
from powerflow_lit.models.memory import MOMENTS, Estimate, estimate, remedies
from powerflow_lit.models.packed_attention import hidden_states, teach_packing
from powerflow_lit.models.packing import pack, packed_microbatches
from powerflow_lit.models.workload import EngineNeeds, Spread, Workload
from powerflow_lit.types import TokenBatch
from tests.tiny_models import DENSE, Kind, make_tiny_model
from tests.unit.test_config import checked

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
    "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}  # fmt: skip
ADAPTER = LoraSettings(rank=32, lora_alpha=32.0, target_modules="all-linear")
HF = EngineNeeds("hf", "float32", sequences=8, kv_cache_bytes=None, share_bytes=None,
                 sleeps=False, tensor_parallel=1)  # fmt: skip
GPU_80 = Device("a GPU (80 GiB)", free=79 * GIB, total=80 * GIB, is_gpu=True)


@pytest.fixture
def qwen_7b(tmp_path: Path) -> Path:
    """A folder with a config and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return tmp_path


def work(**changes: object) -> Workload:
    plain = Workload(
        dtype="float32", base_dtype="float32", lora=None, autocast=False,
        gradient_checkpointing=False, packing=False, tokens_per_microbatch=4096,
        longest_prompt=1024, longest_response=1024, groups_per_refill=16, groups_per_update=8,
        samples_per_prompt=8, updates_per_refill=2, scorings=1, logit_chunk_mb=128,
        head_width=None, engine=HF,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_a_7b_model_is_counted_from_its_config_alone(qwen_7b: Path) -> None:
    found = architecture(
        load_config(str(qwen_7b), trust_remote_code=False), None, trust_remote_code=False
    )
    # the model card: 7.61 B parameters, 6.53 B without the embeddings
    assert found.parameters == 7_615_616_512
    embeddings = 2 * found.vocabulary * found.hidden
    assert found.parameters - embeddings == pytest.approx(6.53e9, rel=1e-3)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(Qwen2Config(**QWEN_7B))
    assert found.parameters == meta.num_parameters()


@pytest.mark.parametrize("kind", DENSE)
def test_sizes_are_those_of_the_loaded_model(tmp_path: Path, kind: Kind) -> None:
    folder = make_tiny_model(tmp_path / kind, kind)
    config = load_config(str(folder), trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = architecture(config, None, trust_remote_code=False)
    assert plain.parameters == plain.trainable == sum(p.numel() for p in model.parameters())
    add_lora(model, ADAPTER)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert architecture(config, ADAPTER, trust_remote_code=False).trainable == trained


def test_weights_gradients_moments_and_base_are_counted_in_their_types(qwen_7b: Path) -> None:
    config = load_config(str(qwen_7b), trust_remote_code=False)
    model = architecture(config, None, trust_remote_code=False)
    sizes = {i.name: i.size / model.parameters for i in estimate(model, work()).items}
    assert sizes["policy weights"] == sizes["gradients"] == sizes["frozen base"] == 4
    assert sizes["AdamW moments"] == 8
    rounded = estimate(model, work(dtype="bfloat16", base_dtype="bfloat16"))
    assert {i.name: i.size / model.parameters for i in rounded.items}["AdamW moments"] == 4
    adapted = architecture(config, ADAPTER, trust_remote_code=False)
    lora = estimate(adapted, work(lora=ADAPTER, base_dtype=None))
    sizes = {i.name: i.size for i in lora.items}
    assert sizes["frozen base"] == 0
    assert sizes["AdamW moments"] == 8 * adapted.trainable < 0.1 * sizes["policy weights"]
    assert lora.total < 0.5 * estimate(model, work()).total


def test_logits_in_chunks_do_not_grow_with_the_microbatch(qwen_7b: Path) -> None:
    config = load_config(str(qwen_7b), trust_remote_code=False)
    model = architecture(config, None, trust_remote_code=False)

    def log_probs(**changes: object) -> int:
        items = estimate(model, work(**changes)).items
        return next(i.size for i in items if i.name == "log-probs")

    assert log_probs() < log_probs(logit_chunk_mb=256.0)
    chunked = log_probs(logit_chunk_mb=256.0)
    assert chunked == log_probs(logit_chunk_mb=256.0, tokens_per_microbatch=32768)
    # logits, as much again, and the float32 gradient of the output layer
    assert chunked == pytest.approx(2 * 256e6 + 4 * 152064 * 3584, rel=0.01)


def saved_bytes(model: torch.nn.Module, forward: Callable[[], object]) -> int:
    """What autograd really keeps of a forward pass, weights excluded."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: alive.append(t) or note(t), lambda t: t
    ):
        forward()
    return sum(kept.values())


SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 704, "num_hidden_layers": 6}  # fmt: skip


def kept(found: Estimate) -> int:
    """Bytes of the lines that stand for what autograd keeps of a forward pass."""
    names = ("activations", "copies of keys and values")
    return sum(i.size for i in found.items if i.name in names and i.phase == "update")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_formula_for_activations_is_what_autograd_keeps(
    tmp_path: Path, kind: Kind, dtype: str, packing: bool
) -> None:
    folder = make_tiny_model(tmp_path / kind, kind, **SHAPE)
    sizes = architecture(
        load_config(str(folder), trust_remote_code=False), None, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    prompts, samples, prompt, response = 3, 8, 48, 16
    rows = [([5 + i] * prompt, [7] * response) for i in range(prompts) for _ in range(samples)]
    batch = TokenBatch.collate(rows, 0)

    def forward() -> object:
        if not packing:
            return model.base_model(input_ids=batch.input_ids, use_cache=False)
        teach_packing(model)
        return hidden_states(model, pack(batch, range(len(rows))))

    measured = saved_bytes(model, forward)
    asked = work(
        dtype=dtype, packing=packing, longest_prompt=prompt, longest_response=response,
        groups_per_update=prompts, samples_per_prompt=samples,
    )  # fmt: skip
    assert kept(estimate(sizes, asked)) == pytest.approx(measured, rel=0.1)
    if packing:  # without the copies it would be far off
        copies = next(i.size for i in estimate(sizes, asked).items if i.name.startswith("copies"))
        assert copies > 0.1 * measured


def test_a_pass_holds_what_the_budget_of_packed_rows_lets_it() -> None:
    rows = [([5 + i] * 96, [7] * 40) for i in range(6) for _ in range(8)]
    batch = TokenBatch.collate(rows, 0)
    for budget in (150, 400, 1000, 2500, 10**5):
        asked = work(
            packing=True, longest_prompt=96, longest_response=40, groups_per_update=6,
            tokens_per_microbatch=budget,
        )  # fmt: skip
        parts = packed_microbatches(batch, budget)
        largest = max(parts, key=len)
        assert asked.largest_pass.predictors == 40 * len(largest)
        assert asked.largest_pass.copies == 96 * len(largest)
        packed = pack(batch, largest)
        # a part that begins amid a prompt's responses may hold one prompt more
        assert packed.input_ids.numel() - asked.largest_pass.tokens in (0, 96)
        assert len(parts) - asked.passes_per_update in (0, 1)


def test_a_run_that_cannot_fit_is_refused_with_what_would_help(
    qwen_7b: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_check, "device", lambda accelerator: GPU_80)
    settings = ("model=qwen2.5_math_7b", f"model.path={qwen_7b}", "tokens_per_microbatch=4096")
    with pytest.raises(ModelError) as refused:
        check_memory(checked(*settings))
    said = str(refused.value)
    assert "a GPU (80 GiB) has 79.0 GiB free" in said
    assert all(x in said for x in ("finetune=lora (", "model.dtype=bfloat16 (", "all of these ("))
    assert said.index("finetune=lora") < said.index("model.gradient_checkpointing=true")
    assert "\n" not in said
    table = capsys.readouterr().out
    assert "7.62B float32" in table
    assert "frozen base" in table
    check_memory(checked(*settings, "model.memory_check=false"))
    check_memory(checked(*settings, "model.estimate_only=true"))
    fits = ("finetune=lora", "model.dtype=bfloat16", "model.gradient_checkpointing=true")
    check_memory(checked(*settings, *fits))


def test_what_helps_is_listed_by_how_much_it_helps(qwen_7b: Path) -> None:
    config = load_config(str(qwen_7b), trust_remote_code=False)
    found = remedies(config, work(), ADAPTER, trust_remote_code=False)
    *single, (last, least) = found
    assert last == "all of these"
    assert [size for _, size in single] == sorted(size for _, size in single)
    assert least < min(size for _, size in single)


def test_an_engine_takes_its_share_of_a_gpu_or_its_cache_of_the_memory(qwen_7b: Path) -> None:
    settings = ("model=hf", f"model.path={qwen_7b}")
    on_gpu = workload(checked(*settings), GPU_80)
    assert on_gpu.engine.share_bytes == int(0.4 * 80 * GIB)
    here = replace(GPU_80, is_gpu=False)
    on_cpu = workload(checked(*settings), here)
    assert on_cpu.engine.kv_cache_bytes == GIB
    assert on_cpu.engine.share_bytes is None
    assert on_cpu.base_dtype == "float32"
    assert workload(checked(*settings, "finetune=lora"), here).base_dtype is None
    rounded = workload(checked(*settings, "trainer.precision=bf16-true"), here)
    assert (rounded.dtype, rounded.base_dtype) == ("bfloat16", "bfloat16")


def test_what_this_machine_has_is_asked_of_it() -> None:
    here = devices.device("cpu")
    assert 0 < here.free <= here.total


def test_an_engine_that_sleeps_leaves_its_share_to_the_updates(qwen_7b: Path) -> None:
    settings = ("model=hf", f"model.path={qwen_7b}")
    config = load_config(str(qwen_7b), trust_remote_code=False)
    model = architecture(config, None, trust_remote_code=False)
    awake = estimate(model, workload(checked(*settings), GPU_80))
    asleep = estimate(model, workload(checked(*settings, "rollout.engine.sleep=true"), GPU_80))
    gone = {m: awake.at(m) - asleep.at(m) for m in MOMENTS}
    share = int(0.4 * 80 * GIB)
    assert gone == {"rollout": 0, "score": 0, "log-probs": share, "backward": share}


def test_an_engine_whose_share_is_too_small_is_refused_before_it_is_built(
    qwen_7b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "device", lambda accelerator: GPU_80)
    settings = ("model=hf", f"model.path={qwen_7b}", "finetune=lora", "model.dtype=bfloat16",
                "model.gradient_checkpointing=true")  # fmt: skip
    check_memory(checked(*settings))
    with pytest.raises(ModelError, match=r"gpu_memory_utilization=0\.15.* raise one of them"):
        check_memory(checked(*settings, "rollout.engine.gpu_memory_utilization=0.15"))


def test_shards_divide_what_is_kept_and_buckets_double_the_gradients(qwen_7b: Path) -> None:
    config = load_config(str(qwen_7b), trust_remote_code=False)
    model = architecture(config, None, trust_remote_code=False)

    def sizes(**changes: object) -> dict[str, int]:
        return {i.name: i.size for i in estimate(model, work(**changes)).items}

    alone = sizes()
    ddp = sizes(spread=Spread(8, 8, shards=1, bucketed=True))
    fsdp = sizes(spread=Spread(8, 8, shards=8, bucketed=False))
    assert ddp == {**alone, "gradients' buckets": alone["gradients"]}
    for name in ("policy weights", "gradients", "AdamW moments", "frozen base"):
        assert fsdp[name] == pytest.approx(alone[name] / 8, abs=8)
    # of a layer of Qwen2.5-7B 233 M weights, counted by hand: 2 h (a + k) + a + 2 k + 3 h f + 2 h
    layer = 2 * 3584 * (3584 + 512) + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584
    assert fsdp["gathered weights"] == 4 * (2 * layer + 2 * 152064 * 3584)
    assert fsdp["whole gradients"] == 4 * layer

"""The memory estimate: counted from a config alone, compared with the device, refused early."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from powerflow_lit import memory_check
from powerflow_lit.memory_check import GIB, Device, check_memory, workload
from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.loading import load_config
from powerflow_lit.models.lora import LoraSettings, add_lora
from powerflow_lit.models.memory import (
    EngineMemory,
    Workload,
    activation_bytes,
    architecture,
    estimate,
    remedies,
)
from tests.tiny_models import DENSE, Kind, make_tiny_model
from tests.unit.test_config import checked

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
    "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}  # fmt: skip
ADAPTER = LoraSettings(rank=32, lora_alpha=32.0, target_modules="all-linear")
HF = EngineMemory("hf", "float32", sequences=8, kv_cache_bytes=None, device_share=None)
GPU_80 = Device("a GPU (80 GiB)", free=79 * GIB, total=80 * GIB, is_gpu=True)


@pytest.fixture
def qwen_7b(tmp_path: Path) -> Path:
    """A folder with a config and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return tmp_path


def work(**changes: object) -> Workload:
    plain = Workload(
        dtype="float32", base_dtype="float32", lora=None, autocast=False,
        gradient_checkpointing=False, tokens_per_microbatch=4096, longest_row=2048,
        longest_response=1024, rows_per_update=64, logit_chunk_mb=128, head_width=None,
        engine=HF,
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


def saved_bytes(model: torch.nn.Module, tokens: int) -> int:
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
        model.base_model(input_ids=torch.ones(2, tokens // 2, dtype=torch.long), use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_formula_for_activations_is_what_autograd_keeps(
    tmp_path: Path, kind: Kind, dtype: str
) -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 704, "num_hidden_layers": 6}  # fmt: skip
    folder = make_tiny_model(tmp_path / kind, kind, **shape)
    sizes = architecture(
        load_config(str(folder), trust_remote_code=False), None, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    measured = saved_bytes(model, 256)
    assert activation_bytes(sizes, work(dtype=dtype), 256) == pytest.approx(measured, rel=0.1)


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
    found = remedies(config, work(), ADAPTER, 80 * GIB, trust_remote_code=False)
    *single, (last, least) = found
    assert last == "all of these"
    assert [size for _, size in single] == sorted(size for _, size in single)
    assert least < min(size for _, size in single)


def test_an_engine_takes_its_share_of_a_gpu_or_its_cache_of_the_memory(qwen_7b: Path) -> None:
    settings = ("model=hf", f"model.path={qwen_7b}")
    on_gpu = workload(checked(*settings), GPU_80)
    assert on_gpu.engine.device_share == 0.4
    here = replace(GPU_80, is_gpu=False)
    on_cpu = workload(checked(*settings), here)
    assert on_cpu.engine.kv_cache_bytes == GIB
    assert on_cpu.engine.device_share is None
    assert on_cpu.base_dtype == "float32"
    assert workload(checked(*settings, "finetune=lora"), here).base_dtype is None
    rounded = workload(checked(*settings, "trainer.precision=bf16-true"), here)
    assert (rounded.dtype, rounded.base_dtype) == ("bfloat16", "bfloat16")


def test_what_this_machine_has_is_asked_of_it() -> None:
    here = memory_check.device("cpu")
    assert 0 < here.free <= here.total

"""LoRA end to end on a random chat model with tied embeddings: training, sync, resume, export."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from powerflow_lit.assembly import build_datamodule, build_module, build_policy
from powerflow_lit.clock import PhaseClock
from powerflow_lit.config import conf_dir
from powerflow_lit.config.checks import train_config
from powerflow_lit.export import export
from powerflow_lit.models.embedded import folder_of
from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.probes import allow_packing
from powerflow_lit.resume import load_policy
from powerflow_lit.types import TokenBatch
from tests.faults.runs import assert_same_run, killed_at, last_checkpoint
from tests.integration.test_commands import train
from tests.tiny_models import make_tiny_model

ROWS = [([5, 9, 40, 77], [3, 200, 61, 7, 90, 12]), ([8, 8, 1], [44, 120])]
REFILLS = 10


def score(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        batch = TokenBatch.collate(ROWS, pad_id=0)
        scores = response_scores(model, batch, tokens_per_microbatch=10_000, logit_chunk_mb=1)
        return scores.log_prob


class Watch(Callback):
    """What is promised at every refill, noted while it trains."""

    def __init__(self) -> None:
        self.base: list[Tensor] = []
        self.policy: list[Tensor] = []
        self.gap: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        with pl_module.frozen.model() as base:
            self.base.append(score(base))
        self.policy.append(score(pl_module.policy))
        self.gap.append(trainer.datamodule.refill_metrics["selfcheck/engine_logp_gap"])  # type: ignore[attr-defined]


@dataclass
class Trained:
    start: Path
    export: Path
    watch: Watch


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Ten refills with rollouts from vLLM, then the export."""
    folder = tmp_path_factory.mktemp("lora")
    start = make_tiny_model(folder / "model", "qwen2")
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose(
            "train",
            [
                "debug=fast", "finetune=lora", "finetune.rank=8", "model=hf", "model.threads=1",
                f"model.path={start}", "model.engine_dtype=float32", "optimizer.lr=5e-3",
                "rollout.max_new_tokens=12", "rollout.max_prompt_tokens=200", f"refills={REFILLS}",
                f"run_dir={folder}",
            ],
        )  # fmt: skip
    config = train_config(cfg)
    L.seed_everything(0, verbose=False)
    policy, tokenizer = build_policy(config)
    module = build_module(config, policy, instantiate(config.strategy.objective))
    task = instantiate(config.task.build)
    data = build_datamodule(config, task, tokenizer, PhaseClock())
    watch = Watch()
    trainer: L.Trainer = instantiate(
        config.trainer, max_epochs=REFILLS, callbacks=[watch], logger=False,
        reload_dataloaders_every_n_epochs=1, default_root_dir=str(folder), num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=data)
    finally:
        data.close()
    return Trained(start, export(policy, tokenizer, folder), watch)


def test_the_base_scores_the_same_to_the_bit_while_the_policy_moves(trained: Trained) -> None:
    untouched = AutoModelForCausalLM.from_pretrained(trained.start, dtype=torch.float32).eval()
    allow_packing(untouched)  # as the run's own
    expected = score(untouched)
    assert len(trained.watch.base) == REFILLS
    assert all(torch.equal(found, expected) for found in trained.watch.base)
    moves = [float((p - expected).abs().max()) for p in trained.watch.policy]
    assert moves[-1] > 0.05
    assert all(a != b for a, b in pairwise(moves))


def test_the_engine_has_the_merged_weights_after_every_sync(trained: Trained) -> None:
    assert len(trained.watch.gap) == REFILLS
    assert max(trained.watch.gap) < 1e-4


def test_the_merged_folder_is_an_ordinary_model_with_the_policys_log_probs(
    trained: Trained,
) -> None:
    merged = AutoModelForCausalLM.from_pretrained(trained.export, dtype=torch.float32).eval()
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(score(merged), trained.watch.policy[-1], rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(trained.export).chat_template
    assert (trained.export / "generation_config.json").exists()


def test_the_adapter_on_the_base_has_the_policys_log_probs(trained: Trained) -> None:
    base = AutoModelForCausalLM.from_pretrained(trained.start, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, trained.export / "adapter").eval()
    policy = adapted.get_base_model()
    allow_packing(policy)
    assert torch.equal(score(policy), trained.watch.policy[-1])


@pytest.mark.faults
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    quick = ("debug=fast", "logger=none", "refills=4", "rollout=hf", "finetune=lora")
    settings = (*quick, "callbacks.evaluation.every_n_refills=4")
    train(tmp_path, *settings, "run_dir=whole")
    killed_at(tmp_path, "refill   2/4", *settings, "run_dir=halves")
    train(tmp_path, "resume=halves")
    trained = last_checkpoint(tmp_path / "halves")["state_dict"]
    assert all("lora_" in name for name in trained if name.startswith("policy."))
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    # before there is an export, the policy is read from the checkpoint: the same merged weights
    run = tmp_path / "whole"
    exported = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(folder_of("tiny"), dtype=torch.float32)
    merged = load_policy(start, run).state_dict()
    assert all(torch.equal(v, merged[name]) for name, v in exported.state_dict().items())

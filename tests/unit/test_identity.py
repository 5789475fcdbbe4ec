"""What makes two jobs of a sweep the same."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from powerflow_lit.config import conf_dir
from powerflow_lit.config.identity import job_hash


def key(*overrides: str) -> str:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return job_hash(_root_=compose("train", overrides=["seed=0", *overrides]))


@pytest.mark.parametrize(
    "same",
    ["run_dir=elsewhere", "study=other", "logger=none", "alpha=4", "model.threads=2",
     "callbacks.export=false", "callbacks.push_to_hub=a/b", "model.gradient_checkpointing=true",
     "model.memory_check=false", "tokens_per_microbatch=512", "device=h100"],
)  # fmt: skip
def test_what_changes_no_result_leaves_the_job_the_same(same: str) -> None:
    assert key(same) == key("alpha=4.0")


@pytest.mark.parametrize(
    "other",
    ["alpha=2", "seed=1", "strategy=la_tb", "refills=3", "guard=min_p", "rollout=hf",
     "finetune=lora",
     "callbacks.evaluation.samples_per_prompt=8", "strategy.format_penalty=0.0"],
)  # fmt: skip
def test_what_changes_a_result_makes_another_job(other: str) -> None:
    assert key(other) != key("alpha=4.0")

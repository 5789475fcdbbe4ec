"""The embedded models can be rebuilt, and come out the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny_instruct", marks=pytest.mark.slow)])
def test_pretraining_is_reproducible_to_the_bit(tmp_path: Path, name: str) -> None:
    for folder in ("one", "two"):
        command = [sys.executable, "-m", "powerflow_lit.pretrain", f"embedded={name}"]
        short = [f"steps.{name}=12", "training.warmup_steps=4", "threads=1", f"output={folder}"]
        subprocess.run([*command, *short], cwd=tmp_path, check=True, capture_output=True)
    one, two = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("one", "two"))
    assert one == two
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.vocab_size == len(tokenizer)


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "powerflow_lit.pretrain", "embedded=small"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "tiny_instruct" in result.stderr

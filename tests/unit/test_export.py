"""The exported folder: an ordinary model, in the type asked for, with a card; and the upload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from powerflow_lit.config.checks import as_dict
from powerflow_lit.export import export, model_card, push
from powerflow_lit.models.lora import LoraSettings, add_lora
from tests.tiny_models import DENSE, KINDS, Kind, make_tiny_model
from tests.unit.test_config import checked
from tests.unit.test_finetune import score, with_adapter

SUMMARY = {
    "refills": 60, "steps": 120, "base": {"val/avg@16": 0.25}, "git_commit": "abc",
    "final": {"val/avg@16": 0.5, "val/length_mean": 20.0}, "versions": {"torch": "2.13.0"},
}  # fmt: skip
NOTES = {"prompts": "2048 to train on", "data": "3 rows left out"}


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("kind", "adapted"), [*((k, False) for k in KINDS), *((k, True) for k in DENSE)]
)
def test_the_exported_folder_is_the_policy(tmp_path: Path, kind: Kind, adapted: bool) -> None:
    start = make_tiny_model(tmp_path / "start", kind)
    policy, tokenizer = loaded(start), AutoTokenizer.from_pretrained(start)
    if adapted:
        with_adapter(policy)
    folder = export(policy, tokenizer, tmp_path)
    assert folder == tmp_path / "export"
    assert not (tmp_path / "export.tmp").exists()
    torch.testing.assert_close(score(loaded(folder)), score(policy), rtol=0, atol=1e-4)
    if not adapted:
        assert torch.equal(score(loaded(folder)), score(policy))
    # the same names are written as in the folder that it began with: nothing twice, nothing new
    written, first = load_file(folder / "model.safetensors"), load_file(start / "model.safetensors")
    assert written.keys() == first.keys()
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == tokenizer.eos_token_id
    assert (folder / "adapter").is_dir() == adapted


def test_an_export_takes_the_type_that_is_asked_for(tmp_path: Path) -> None:
    start = make_tiny_model(tmp_path / "start", "qwen2")
    policy = loaded(start)
    add_lora(policy, LoraSettings(rank=2, lora_alpha=2.0, target_modules="all-linear"))
    folder = export(policy, AutoTokenizer.from_pretrained(start), tmp_path, dtype="bfloat16")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert policy.dtype == torch.float32


def test_a_base_whose_decoding_contradicts_itself_is_exported_all_the_same(tmp_path: Path) -> None:
    start = make_tiny_model(tmp_path / "start", "qwen2")
    policy = loaded(start)
    policy.generation_config.do_sample = False
    policy.generation_config.temperature = 0.7  # as some published bases have it
    folder = export(policy, AutoTokenizer.from_pretrained(start), tmp_path)
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.7


def test_the_card_says_what_was_done_and_the_hub_can_read_it(tmp_path: Path) -> None:
    config = checked("model=qwen2.5_math_1.5b", "finetune=lora", "model.revision=v1", "seed=3")
    text = model_card(as_dict(config), SUMMARY, NOTES)
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-Math-1.5B"
    assert front["library_name"] == "transformers"
    assert front["license"] == "unknown"
    assert "powerflow" in front["tags"]
    for said in (
        "| base | `Qwen/Qwen2.5-Math-1.5B` at `v1` |", "| alpha (power of the base) | 4 |",
        "powerflow, epsilon 0.2, psi -0.5", "LoRA, rank 32", "| avg@16 | 0.25 | 0.5 |",
        "| length_mean |  | 20 |", "2603.18363", "3 rows left out", "| torch | 2.13.0 |",
        "| learning rate | 1e-05 (head 0.0001) |",
    ):  # fmt: skip
        assert said in text, said
    (tmp_path / "README.md").write_text(text)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == front["base_model"]
    local = model_card(as_dict(checked("model=hf", f"model.path={tmp_path}")), SUMMARY, NOTES)
    assert "base_model" not in yaml.safe_load(local.split("---")[1]), "a folder is no hub id"


class Hub:
    """Stands for the hub's client where its answers matter, not its transport."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

        def create_repo(_: HfApi, repo: str, **arguments: Any) -> None:
            self.calls.append((repo, arguments))
            if error is not None:
                raise error

        def upload_folder(_: HfApi, **arguments: Any) -> None:
            self.calls.append((arguments["repo_id"], arguments))

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)


def test_a_push_creates_a_private_repository_and_uploads_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = Hub(monkeypatch, None)
    assert push(tmp_path, "me/mine", private=True) is None
    (created, how), (uploaded, what) = hub.calls
    assert created == uploaded == "me/mine"
    assert how["private"] is True
    assert what["folder_path"] == tmp_path


def test_why_a_push_failed_is_one_line_without_a_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Hub(monkeypatch, RuntimeError("401 for hf_abcDEF123 on me/mine\nRequest ID: 1"))
    assert push(tmp_path, "me/mine", private=True) == "401 for hf_*** on me/mine"

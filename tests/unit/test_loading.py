"""What cannot be loaded is named in one line that says what to do; the paper's models compose."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from powerflow_lit.models import hub
from powerflow_lit.models.errors import ModelError
from powerflow_lit.models.loading import end_ids, load_config, load_model, load_tokenizer
from powerflow_lit.models.prompting import encode_prompts, render, route_line
from powerflow_lit.types import Prompt
from tests.tiny_models import make_tiny_model
from tests.unit.test_config import CONF, checked, choices

PAPER = {
    "qwen2.5_1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5_3b": "Qwen/Qwen2.5-3B",
    "qwen2.5_7b": "Qwen/Qwen2.5-7B",
    "qwen2.5_1.5b_instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5_3b_instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5_7b_instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5_math_1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "qwen2.5_math_7b": "Qwen/Qwen2.5-Math-7B",
    "llama3.2_3b_instruct": "meta-llama/Llama-3.2-3B-Instruct",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", "llama")


def load(path: Path | str) -> None:
    """Tokenizer first, then weights, as a run does."""
    load_tokenizer(str(path), trust_remote_code=False)
    load_model(str(path), dtype="float32", attn_implementation="sdpa", trust_remote_code=False)


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as refused:
        load(path)
    said = str(refused.value)
    assert "\n" not in said
    assert f"model.path={path}" in said
    return said


def test_a_whole_folder_loads(folder: Path) -> None:
    load(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nothing-here")


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    assert "a file; give the folder" in refusal(folder / "config.json")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json there" in refusal(folder)


def test_a_run_folder_in_place_of_its_export(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run" / "export")
    assert f"its model is model.path={tmp_path / 'run'}/export" in refusal(tmp_path / "run")


def test_an_adapter_without_its_model(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "an adapter without its model" in refusal(folder)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no weights there" in refusal(folder)


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    assert "no tokenizer there (tokenizer.json" in refusal(folder)


def test_an_architecture_that_nobody_knows(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "perceptron"}))
    with pytest.raises(ModelError, match=r"cannot be loaded: .*perceptron"):
        load_config(str(folder), trust_remote_code=False)


def test_a_model_with_code_of_its_own_is_run_only_where_that_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config |= {"model_type": "mine", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    options = {"dtype": "float32", "attn_implementation": "sdpa"}
    with pytest.raises(ModelError, match=r"read it, then set model\.trust_remote_code=true"):
        load_model(str(folder), trust_remote_code=False, **options)
    assert "warning" not in capsys.readouterr().out
    model = load_model(str(folder), trust_remote_code=True, **options)
    assert type(model).__name__ == "MineForCausalLM"
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning")]
    assert str(folder) in line


def test_pickled_weights_that_would_run_code_are_refused_and_run_nothing(folder: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(folder / "it_ran"), "w")

    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload()}, folder / "pytorch_model.bin")
    said = refusal(str(folder))
    assert re.search(r"\*\.bin holds more than tensors.*could run code", said), said
    assert not (folder / "it_ran").exists()


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    said = refusal("Qwen/Qwen2.5-0.5B-which-nobody-has")
    assert "cannot be reached" in said
    assert "copy the model here and give its folder" in said


def test_a_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.revision=v1: .* is a folder"):
        load_tokenizer(str(folder), trust_remote_code=False, revision="v1")


def test_the_automatic_route_is_the_template_where_there_is_one(tmp_path: Path) -> None:
    chat = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path / "chat", "qwen2"))
    plain = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path / "plain", "qwen2", chat=False))
    assert render(chat, "Why?", "auto") == render(chat, "Why?", "chat") != "Why?\n"
    assert render(plain, "Why?", "auto") == "Why?\n"
    assert "chat template (model.prompt_route=auto)" in route_line(chat, "auto")
    assert "plain text and a line break, for want of a chat template" in route_line(plain, "auto")
    assert encode_prompts(plain, [Prompt(0, "Why?")], "auto")
    with pytest.raises(ModelError, match=r"no chat template: set model\.prompt_route=plain"):
        encode_prompts(plain, [Prompt(0, "Why?")], "chat")


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # the head of Llama 3.2's template
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}Today: {{ date_string }}. {{ messages[0]['content'] }}"
    )
    assert render(tokenizer, "Why?", "chat") == "Today: 26 Jul 2024. Why?"


@pytest.mark.parametrize("choice", sorted(set(choices("model")) - {"hf"}))
def test_every_model_composes_and_can_be_a_local_folder(choice: str) -> None:
    model = checked(f"model={choice}").model
    assert model.name == choice
    assert not model.trust_remote_code
    assert model.path == PAPER.get(choice, f"embedded:{choice}")
    assert model.kind == ("instruct" if "instruct" in choice else "base")
    assert checked(f"model={choice}", "model.path=/somewhere").model.path == "/somewhere"
    if choice in PAPER:
        assert model.paper_name == model.path.partition("/")[2]
        assert model.prompt_route == "auto"
        assert checked(f"model={choice}").alpha == (2 if model.kind == "instruct" else 4)


def test_no_model_repeats_what_it_inherits() -> None:
    for path in (CONF / "model").glob("*.yaml"):
        if path.stem != "hf":
            assert len(yaml.safe_load(path.read_text())) <= 8, path.name


@pytest.mark.parametrize(
    ("overrides", "lr"),
    [
        ((), 2e-4),
        (("finetune=lora",), 2e-3),
        (("finetune=lora", "finetune.lr_factor=3", "model.lr=1e-5"), 3e-5),
        (("finetune=lora", "optimizer.lr=7e-5"), 7e-5),
    ],
)
def test_an_adapters_learning_rate_is_the_models_times_a_factor(
    overrides: tuple[str, ...], lr: float
) -> None:
    assert checked(*overrides).optimizer.lr == pytest.approx(lr, rel=1e-12)


def test_every_token_that_may_end_a_response_does(tmp_path: Path) -> None:
    folder = str(make_tiny_model(tmp_path, "llama"))
    model = load_model(folder, dtype="float32", attn_implementation="sdpa", trust_remote_code=False)
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    own = tokenizer.eos_token_id
    model.generation_config.eos_token_id = own
    assert end_ids(model, tokenizer, []) == (own,)
    model.generation_config.eos_token_id = [7, own, 9]  # as chat models have it
    assert set(end_ids(model, tokenizer, [])) == {own, 7, 9}
    model.generation_config.eos_token_id = None
    letter = tokenizer.convert_ids_to_tokens(40)
    assert end_ids(model, tokenizer, [letter]) == (own, 40)
    with pytest.raises(ModelError, match=r"model.stop_tokens: '<\|none_such\|>' is no token"):
        end_ids(model, tokenizer, ["<|none_such|>"])

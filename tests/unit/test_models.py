"""Log-probs, prompt routes, the embedded models and their tokenizers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from powerflow_lit.corpora import arithmetic, creative
from powerflow_lit.models.embedded import NAMES, folder_of
from powerflow_lit.models.forward_pass import microbatches, prompt_states
from powerflow_lit.models.loading import ModelError, load_model, load_tokenizer
from powerflow_lit.models.logprobs import response_scores
from powerflow_lit.models.lora import policy_weights
from powerflow_lit.models.prompting import encode_prompts, render
from powerflow_lit.rollout.vllm_engine import as_in_files, tied_names
from powerflow_lit.types import Prompt, TokenBatch
from tests.tiny_models import KINDS, Kind, make_tiny_model


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )


def ragged_batch(vocabulary: int, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, response in ((3, 7), (9, 1), (5, 12), (4, 4), (2, 9)):
        ids = torch.randint(3, vocabulary, (prompt + response,), generator=generator).tolist()
        rows.append((ids[:prompt], ids[prompt:]))
    return TokenBatch.collate(rows, pad_id=0)


def row_by_row(model: PreTrainedModel, batch: TokenBatch) -> list[Tensor]:
    """Log-probs from one unpadded pass a row and a plain log-softmax."""
    found = []
    for ids, p, r in zip(
        batch.input_ids, batch.prompt_lengths, batch.response_lengths, strict=True
    ):
        logits = model(input_ids=ids[None, : p + r]).logits[0].double()
        log_probs = logits.log_softmax(-1)[p - 1 : p + r - 1]
        found.append(log_probs.gather(1, ids[p : p + r, None])[:, 0])
    return found


@pytest.mark.parametrize("tokens_per_microbatch", [10_000, 40, 1])
def test_log_probs_are_those_of_single_unpadded_passes(
    tiny: PreTrainedModel, tokens_per_microbatch: int
) -> None:
    batch = ragged_batch(tiny.config.vocab_size)
    with torch.no_grad():
        expected = row_by_row(tiny, batch)
        scores = response_scores(
            tiny, batch, tokens_per_microbatch=tokens_per_microbatch, logit_chunk_mb=1.0
        )
    assert scores.log_prob.shape == batch.mask.shape
    for row, want in zip(scores.log_prob, expected, strict=True):
        torch.testing.assert_close(row[: len(want)].double(), want, rtol=1e-5, atol=2e-5)
        assert bool((row[len(want) :] == 0).all())


def test_the_content_of_padding_is_irrelevant(tiny: PreTrainedModel) -> None:
    batch = ragged_batch(tiny.config.vocab_size)
    position = torch.arange(batch.input_ids.shape[1])
    other = batch.input_ids.clone()
    other[position >= batch.lengths[:, None]] = 7
    changed = TokenBatch(other, batch.prompt_lengths, batch.response_lengths)
    with torch.no_grad():
        one = response_scores(
            tiny, batch, tokens_per_microbatch=10_000, logit_chunk_mb=1.0
        ).log_prob
        two = response_scores(
            tiny, changed, tokens_per_microbatch=10_000, logit_chunk_mb=1.0
        ).log_prob
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_splitting_into_microbatches_changes_no_gradient(tiny: PreTrainedModel) -> None:
    """Also for a loss that couples trajectories, as the closed forms of log Z do."""
    batch = ragged_batch(tiny.config.vocab_size)

    def gradient(tokens: int) -> Tensor:
        tiny.zero_grad()
        tiny.requires_grad_(True)
        scores = response_scores(tiny, batch, tokens_per_microbatch=tokens, logit_chunk_mb=1.0)
        total = scores.log_prob.sum(1)
        ((total - total.mean()) ** 2).mean().backward()
        found = torch.cat([p.grad.flatten() for p in tiny.parameters() if p.grad is not None])
        tiny.zero_grad()
        return found

    whole, split = gradient(10_000), gradient(20)
    assert whole.abs().max() > 1
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_microbatches_respect_the_token_budget_and_lose_no_row() -> None:
    lengths = torch.tensor([5, 50, 7, 30, 31, 8, 100])
    parts = microbatches(lengths, tokens_per_microbatch=64)
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    for part in parts:
        assert len(part) == 1 or len(part) * int(lengths[part].max()) <= 64


def test_prompt_states_of_a_full_pass_are_those_of_the_prompt_alone(tiny: PreTrainedModel) -> None:
    batch = ragged_batch(tiny.config.vocab_size)
    with torch.no_grad():
        for pool in ("mean", "last"):
            full = response_scores(
                tiny, batch, tokens_per_microbatch=10_000, logit_chunk_mb=1.0, pool=pool
            )
            alone = prompt_states(tiny, batch, pool)
            assert full.prompt_state is not None
            torch.testing.assert_close(full.prompt_state, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_embedded_model_is_an_ordinary_folder_of_the_hub_format(name: str) -> None:
    folder = folder_of(name)
    assert (folder / "README.md").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.head_dim == 32  # a size that vLLM's CPU attention takes
    size = sum(f.stat().st_size for n in NAMES for f in folder_of(n).glob("*.safetensors"))
    assert size < 8_000_000


def test_every_text_of_the_corpora_survives_the_tokenizer() -> None:
    corpora = {"tiny": arithmetic.documents(123), "tiny_instruct": creative.documents(123)}
    for name, documents in corpora.items():
        tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
        for prompt, response in islice(documents, 500):
            ids = tokenizer(prompt + "\n" + response)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == prompt + "\n" + response


def test_numbers_and_boxed_are_single_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of("tiny"))
    assert len(tokenizer("Answer: \\boxed{37}")["input_ids"]) == 4


def test_the_chat_template_marks_the_turn_and_plain_text_gets_a_line_break() -> None:
    instruct = load_tokenizer("embedded:tiny_instruct", trust_remote_code=False)
    base = load_tokenizer("embedded:tiny", trust_remote_code=False)
    assert render(instruct, "Write", "chat") == "<|user|>Write\n"
    assert render(base, "Compute", "plain") == "Compute\n"
    assert render(base, "Compute", "chat") == "Compute\n"


def test_a_tokenizer_without_chat_template_is_refused_for_chat() -> None:
    tokenizer = load_tokenizer("embedded:tiny", trust_remote_code=False)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"model\.prompt_route=plain"):
        render(tokenizer, "Compute", "chat")


def test_unknown_words_are_refused_with_the_model_that_knows_them() -> None:
    tokenizer = load_tokenizer("embedded:tiny", trust_remote_code=False)
    with pytest.raises(ModelError, match="tiny_instruct"):
        encode_prompts(tokenizer, [Prompt(0, "Write a short poem about a cat.")], "plain")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing-here"):
        load_tokenizer(str(tmp_path / "nothing-here"), trust_remote_code=False)
    with pytest.raises(ModelError, match="tiny_instruct"):
        load_tokenizer("embedded:small", trust_remote_code=False)


def test_a_tied_output_layer_is_among_the_weights_of_an_engine() -> None:
    config = Qwen2Config(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    weights = policy_weights(model)
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_is_sent_what_stands_in_the_files(kind: Kind, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(folder)
    sent = as_in_files(model, policy_weights(model))
    in_file = load_file(folder / "model.safetensors")
    again = tied_names(model)
    assert again == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert sent.keys() == in_file.keys() | again
    for name, tensor in in_file.items():
        assert torch.equal(sent[name], tensor), name


def test_the_tokenizer_of_the_tiny_models_reads_any_text(tmp_path: Path) -> None:
    for kind in ("qwen2", "llama", "gpt_neox", "gemma"):
        tokenizer = load_tokenizer(
            str(make_tiny_model(tmp_path / kind, kind)), trust_remote_code=False
        )
        for text in ("\\boxed{7}\n  two  spaces", "naïve 漢字 🙂", "<|user|>"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert len(tokenizer) < 400
        chat = render(tokenizer, "Why?", "chat")
        assert chat == "<|user|>Why?<|end|><|assistant|>"
        assert len(tokenizer(chat, add_special_tokens=False)["input_ids"]) == 4 + 3

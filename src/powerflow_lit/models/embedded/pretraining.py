"""Supervised pretraining of the embedded models on their generated corpora."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Encoded = tuple[list[int], list[int]]  # prompt ids, response ids with end-of-sequence


@dataclass(frozen=True)
class Pretraining:
    """How an embedded model is shaped and trained; values stand in `conf/pretrain.yaml`."""

    hidden_size: int
    layers: int
    heads: int
    feed_forward: int
    max_tokens: int  # prompt and response; longer documents are cut, without end-of-sequence
    steps: int
    batch_documents: int
    lr: float
    warmup_steps: int
    weight_decay: float
    seed: int


def new_model(settings: Pretraining, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Randomly initialised Llama-shaped model over the tokenizer's vocabulary."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        intermediate_size=settings.feed_forward,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(
    tokenizer: PreTrainedTokenizerFast, documents: Iterator[tuple[str, str]], max_tokens: int
) -> Iterator[Encoded]:
    """Token ids of (prompt, response) pairs; the prompt goes through the chat template."""
    for prompt, response in documents:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
        response_ids = [*response_ids, tokenizer.eos_token_id]
        yield prompt_ids, response_ids[: max_tokens - len(prompt_ids)]


def batches(documents: Iterator[Encoded], batch_size: int) -> Iterator[list[Encoded]]:
    """Batches of documents of like length, so that little is padded.

    Sixteen batches are read, sorted and handed out from the middle of the list outwards in a
    fixed stride; the loss is normalised by a constant, so bucketing weights no document more.
    """
    while True:
        pool = sorted(islice(documents, batch_size * 16), key=lambda d: len(d[0]) + len(d[1]))
        for i in range(16):
            start = (i * 7 % 16) * batch_size
            yield pool[start : start + batch_size]


def collate(batch: list[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids (N, T) and the mask (N, T) of response tokens."""
    width = max(len(p) + len(r) for p, r in batch)
    ids = torch.full((len(batch), width), pad_id)
    mask = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(batch):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        mask[row, len(prompt) : end] = True
    return ids, mask


def train(
    model: LlamaForCausalLM,
    documents: Iterator[Encoded],
    settings: Pretraining,
    on_step: Callable[[], None],
) -> float:
    """Train `model` in place on response tokens; returns nats a document over the last batches."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warmup_cosine(step, settings.warmup_steps, settings.steps)
    )
    pad_id = int(model.config.pad_token_id or 0)
    recent: deque[float] = deque(maxlen=160)  # ten rounds of sixteen batches of unlike length
    for batch in islice(batches(documents, settings.batch_documents), settings.steps):
        ids, mask = collate(batch, pad_id)
        logits = model(input_ids=ids[:, :-1]).logits
        targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        nats = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        # A constant denominator: a per-batch token mean would over-weight short documents.
        loss = nats / (settings.batch_documents * 30)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(nats.item() / len(batch))
        on_step()
    return sum(recent) / len(recent)


@torch.no_grad()
def sharpen(model: LlamaForCausalLM, logit_scale: float) -> None:
    """Multiply all logits by a constant: the finished model at temperature 1/logit_scale."""
    model.lm_head.weight.mul_(logit_scale)


def _warmup_cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

"""How much memory a run will need, from the architecture alone: no weight is loaded.

What a tensor costs is counted, not measured: parameters on the meta device, where they take none;
activations by the formula of `activation_bytes`. What is alive at once is added up: weights,
gradients, moments, base and engine always; then the larger of an update's activations and
log-probs and of a rollout's own needs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from powerflow_lit.models.lora import LoraSettings, add_lora
from powerflow_lit.models.z_head import ZHead

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Architecture:
    """The sizes of a causal language model that its memory depends on."""

    parameters: int  # tied weights once
    trainable: int  # all, or the adapter's
    vocabulary: int
    hidden: int
    layers: int
    feed_forward: int
    attention: int  # width of all query heads
    key_value: int  # width of all key heads
    tied: bool


@dataclass(frozen=True)
class EngineMemory:
    """A rollout engine's own needs."""

    name: str  # vllm | hf
    dtype: str
    sequences: int  # decoded at once
    kv_cache_bytes: int | None  # set aside at the start; None: it grows with the responses
    device_share: float | None  # of a GPU, everything included


@dataclass(frozen=True)
class Workload:
    """What of a run's configuration its memory depends on."""

    dtype: str
    base_dtype: str | None  # of the second copy; None: there is none
    lora: LoraSettings | None
    autocast: bool  # bf16-mixed: weights and products in bfloat16 beside the float32 ones
    gradient_checkpointing: bool
    tokens_per_microbatch: int
    longest_row: int  # prompt and response, tokens
    longest_response: int
    rows_per_update: int  # trajectories
    logit_chunk_mb: float  # MB of float32 logits at a time
    head_width: int | None  # of the Z' head
    engine: EngineMemory

    @property
    def microbatch_tokens(self) -> int:
        """Padded tokens of the largest forward pass."""
        most = min(self.tokens_per_microbatch, self.rows_per_update * self.longest_row)
        return max(most, self.longest_row)


@dataclass(frozen=True)
class Item:
    """One line of the estimate."""

    name: str
    size: int  # bytes
    how: str
    phase: str  # always | update | rollout


@dataclass(frozen=True)
class Estimate:
    """All lines; what is of different phases is not there at once."""

    items: tuple[Item, ...]

    @property
    def total(self) -> int:
        """The largest sum alive at once, bytes."""
        of_phase = {
            phase: sum(i.size for i in self.items if i.phase == phase)
            for phase in ("always", "update", "rollout")
        }
        return of_phase["always"] + max(of_phase["update"], of_phase["rollout"])


def architecture(
    config: PretrainedConfig, lora: LoraSettings | None, *, trust_remote_code: bool
) -> Architecture:
    """Sizes from a model built on the meta device, which takes no memory for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )
    parameters = _count(model.parameters())
    if lora is not None:
        add_lora(model, lora)
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    return Architecture(
        parameters=parameters,
        trainable=_count(p for p in model.parameters() if p.requires_grad),
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        feed_forward=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        attention=heads * head,
        key_value=key_value_heads * head,
        tied=bool(text.tie_word_embeddings),
    )


def estimate(model: Architecture, work: Workload) -> Estimate:
    """What a run needs at its peak, on the one device that holds all of it."""
    size = BYTES[work.dtype]
    trained = 4 if work.lora else size  # an adapter is float32
    tokens = work.microbatch_tokens
    what = "adapter" if work.lora else "all weights"
    items = [
        Item("policy weights", model.parameters * size, f"{_n(model.parameters)} {work.dtype}",
             "always"),
        Item("gradients", model.trainable * trained, f"{_n(model.trainable)} ({what})", "always"),
        Item("AdamW moments", ADAM_MOMENTS * model.trainable * trained, "two a trained weight",
             "always"),
    ]  # fmt: skip
    if work.lora:
        items.append(Item("adapter", model.trainable * trained, "float32", "always"))
    if work.base_dtype is None:
        items.append(Item("frozen base", 0, "none: the policy, its adapter off", "always"))
    else:
        held = model.parameters * BYTES[work.base_dtype]
        items.append(Item("frozen base", held, f"a copy in {work.base_dtype}", "always"))
    if work.head_width is not None:
        with torch.device("meta"):
            weights = _count(ZHead(model.hidden, work.head_width).parameters())
        items.append(Item("Z' head", weights * 16, "with gradients and moments", "always"))
    items += _update(model, work, tokens)
    items += _engine(model, work)
    return Estimate(tuple(items))


def _update(model: Architecture, work: Workload, tokens: int) -> list[Item]:
    """What one microbatch's forward and backward pass holds."""
    how = f"{_n(tokens)} tokens"
    if work.gradient_checkpointing:
        how += ", checkpointed"
    # gate, up and their product have a gradient each while a layer's backward pass is under way
    size = 2 if work.autocast else BYTES[work.dtype]
    flying = 3 * model.feed_forward * size * tokens
    items = [
        Item("activations", activation_bytes(model, work, tokens), how, "update"),
        Item("their gradients", flying, "of one layer", "update"),
    ]
    share = work.longest_response / work.longest_row
    responses = max(int(tokens * share), 1)
    # logits and one array of their size; the output layer's gradient is summed in float32
    rows = min(max(int(work.logit_chunk_mb * 1e6 / 4 / model.vocabulary), 1), responses)
    logits = 2 * rows * model.vocabulary * 4
    logits += 0 if work.lora else model.vocabulary * model.hidden * 4
    items.append(Item("log-probs", logits, f"{_n(rows)} rows of {_n(model.vocabulary)}", "update"))
    if work.autocast:
        items.append(Item("autocast weights", model.parameters * 2, "in bfloat16", "update"))
    return items


def activation_bytes(model: Architecture, work: Workload, tokens: int) -> int:
    """Bytes that autograd keeps of one forward pass over `tokens` padded tokens.

    A token keeps in each layer, in numbers: two norms of 3 h (input, in float32 always, normalised
    input and output), queries, the attention's output twice, keys and values (3 a + 2 k), and
    four of the feed-forward's width f (gate, its activation, up, and their product):
    layers * (6 h + 3 a + 2 k + 4 f). Attention is fused and keeps no matrix of scores. With
    checkpointing h a layer is kept, and all of one layer while that is computed again.
    """
    size = 2 if work.autocast else BYTES[work.dtype]
    norms = model.hidden * (20 if work.autocast else 8 + 4 * size)
    others = 3 * model.attention + 2 * model.key_value + 4 * model.feed_forward
    layer = norms + others * size
    stream = model.hidden * (4 if work.autocast else size)
    ends = 3 * stream  # embedding, last norm and its output
    if work.gradient_checkpointing:
        return tokens * (model.layers * stream + layer + ends)
    return tokens * (model.layers * layer + ends)


def _engine(model: Architecture, work: Workload) -> list[Item]:
    engine = work.engine
    merged = [
        Item("merged weights", model.parameters * BYTES[work.dtype], "at a sync", "rollout")
    ] if work.lora else []  # fmt: skip
    if engine.device_share is not None:
        return merged  # beside a share of the whole device, see `needed`
    size = BYTES[engine.dtype]
    untied = model.parameters
    if engine.name == "vllm" and model.tied:
        untied += model.vocabulary * model.hidden
    items = [
        Item(f"{engine.name} engine's weights", untied * size, f"a copy in {engine.dtype}",
             "always")
    ]  # fmt: skip
    per_token = 2 * model.layers * model.key_value * size
    if engine.kv_cache_bytes is not None:
        items.append(Item("its key-value cache", engine.kv_cache_bytes, "set aside", "always"))
    else:
        held = engine.sequences * work.longest_row * per_token
        # the last layer's is copied as it grows; logits are sorted and normalised in float32
        held += held // max(model.layers, 1) + 4 * engine.sequences * model.vocabulary * 4
        how = f"{_n(engine.sequences)} sequences of {_n(work.longest_row)}"
        items.append(Item("its key-value cache", held, how, "rollout"))
    return items + merged


def needed(found: Estimate, work: Workload, device_bytes: int) -> int:
    """Bytes of the device that the run takes, an engine's share of a GPU included."""
    return found.total + int((work.engine.device_share or 0.0) * device_bytes)


def remedies(
    config: PretrainedConfig,
    work: Workload,
    adapter: LoraSettings,
    device_bytes: int,
    *,
    trust_remote_code: bool,
) -> list[tuple[str, int]]:
    """(override, bytes needed with it), the most effective first; `all of these` comes last."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if work.lora is None:
        changes.append(("finetune=lora", {"lora": adapter, "base_dtype": None}))
        if work.base_dtype == "float32":
            changes.append(("model.base_dtype=bfloat16", {"base_dtype": "bfloat16"}))
    if not work.gradient_checkpointing:
        changes.append(("model.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if work.microbatch_tokens > work.longest_row:
        fewer = {"tokens_per_microbatch": work.longest_row}
        changes.append((f"tokens_per_microbatch={work.longest_row}", fewer))
    if work.dtype == "float32":
        half = {"dtype": "bfloat16", "base_dtype": work.base_dtype and "bfloat16"}
        changes.append(("model.dtype=bfloat16", half))

    models = {
        lora: architecture(config, lora, trust_remote_code=trust_remote_code)
        for lora in {work.lora, work.lora or adapter}
    }

    def cost(change: dict[str, Any]) -> int:
        changed = replace(work, **change)
        engine = changed.engine
        if engine.name == "hf":
            changed = replace(changed, engine=replace(engine, dtype=changed.dtype))
        return needed(estimate(models[changed.lora], changed), changed, device_bytes)

    found = sorted(((name, cost(change)) for name, change in changes), key=lambda x: x[1])
    if len(changes) > 1:
        everything: dict[str, Any] = {}
        for _, change in reversed(changes):  # finetune=lora has the last word on the base
            everything |= change
        found.append(("all of these", cost(everything)))
    return found


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _n(count: float) -> str:
    """1234567 as 1.23M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"

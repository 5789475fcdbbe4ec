"""The sizes of a causal language model that its memory and its time depend on."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from powerflow_lit.models.lora import LoraSettings, add_lora

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Architecture:
    """Counts are of numbers, not bytes."""

    parameters: int  # P; tied weights once
    trainable: int  # all, or the adapter's
    multiplied: int  # m, weights of the layers' products that a token goes through
    layer: int  # weights of the largest layer
    vocabulary: int  # V
    hidden: int  # h
    layers: int  # l
    feed_forward: int  # f
    heads: int
    key_value_heads: int
    head: int  # width of one
    tied: bool

    @property
    def attention(self) -> int:
        """a, the width of all query heads."""
        return self.heads * self.head

    @property
    def key_value(self) -> int:
        """k, the width of all key heads."""
        return self.key_value_heads * self.head

    @property
    def ends(self) -> int:
        """Weights of embedding and output layer."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


def architecture(
    config: PretrainedConfig, lora: LoraSettings | None, *, trust_remote_code: bool
) -> Architecture:
    """Sizes from a model built on the meta device, which takes no memory for its weights."""
    key = config.to_json_string(), lora, trust_remote_code
    if key not in _known:  # a second or two for a large one
        _known[key] = _architecture(config, lora, trust_remote_code)
    return _known[key]


_known: dict[tuple[str, LoraSettings | None, bool], Architecture] = {}


def _architecture(
    config: PretrainedConfig, lora: LoraSettings | None, trust_remote_code: bool
) -> Architecture:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )
    parameters = count(model.parameters())
    text = model.config.get_text_config()
    multiplied, layer = _products(model, text), _largest_layer(model)
    if lora is not None:
        add_lora(model, lora)
    heads = text.num_attention_heads
    return Architecture(
        parameters=parameters,
        trainable=count(p for p in model.parameters() if p.requires_grad),
        multiplied=multiplied,
        layer=layer,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        feed_forward=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head=getattr(text, "head_dim", None) or text.hidden_size // heads,
        tied=bool(text.tie_word_embeddings),
    )


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def short(number: float) -> str:
    """1234567 as 1.23M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def amount(number: float, unit: str) -> str:
    """1.5e12 of unit B as 1.5 TB."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number / 1e3:.3g} k{unit}"


def _products(model: Any, text: Any) -> int:
    """Weights of the trunk that a token is multiplied with: its matrices but the embeddings', and
    of a mixture's experts (arrays of three dimensions) those that one token is sent to."""
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    output = model.get_output_embeddings()
    ends = embeddings | {id(p) for p in (output.parameters() if output is not None else ())}
    sent = getattr(text, "num_experts_per_tok", None) or 1
    total = 0
    for parameter in model.parameters():
        if id(parameter) in ends or parameter.ndim < 2:
            continue
        share = min(sent / len(parameter), 1.0) if parameter.ndim == 3 else 1.0
        total += int(parameter.numel() * share)
    return total


def _largest_layer(model: Any) -> int:
    """Weights of the largest of the repeated blocks."""
    blocks = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    layers = [count(layer.parameters()) for block in blocks for layer in block]
    return max(layers, default=0)

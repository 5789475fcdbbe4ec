"""The models that are timed: random weights in the usual shape, written as Hugging Face folders.

The architecture is Llama's, which is Qwen2's without three biases a layer: for a folder that says
Qwen2 `transformers` takes the tokenizer's class from a table, and ours would not be read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.workloads import FIRST_WORD

SPECIAL = ("<pad>", "<unk>", "<eos>")
EOS = SPECIAL.index("<eos>")


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family: gated MLP, grouped-query attention, tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def linear_parameters(self) -> int:
        """Entries of the layers' weight matrices: each is one multiply-add a token."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def parameters(self) -> int:
        """All, embeddings once (they are tied), norms included."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.linear_parameters + self.vocabulary * self.hidden + norms

    def forward_flops(self, tokens: int, logit_rows: int, attended: int) -> int:
        """Floating-point operations (multiply and add count two) of a forward pass.

        Args:
            tokens: that go through the layers.
            logit_rows: tokens whose logits are computed.
            attended: pairs of a query and a key that it sees, over all sequences.
        """
        linear = 2 * self.linear_parameters * tokens
        logits = 2 * self.hidden * self.vocabulary * logit_rows
        # scores and weighted values, each head_size multiply-adds a head
        attention = 2 * 2 * self.layers * self.heads * self.head_size * attended
        return linear + logits + attention


SHAPES = {
    "0.8M": Shape(hidden=128, layers=4, heads=4, kv_heads=2, mlp=352, vocabulary=512),
    "25M": Shape(hidden=512, layers=8, heads=8, kv_heads=4, mlp=1408, vocabulary=2048),
    "151k-vocab": Shape(hidden=128, layers=2, heads=4, kv_heads=2, mlp=352, vocabulary=151_936),
    # of Qwen2.5, for a GPU
    "0.5B": Shape(hidden=896, layers=24, heads=14, kv_heads=2, mlp=4864, vocabulary=151_936),
    "1.5B": Shape(hidden=1536, layers=28, heads=12, kv_heads=2, mlp=8960, vocabulary=151_936),
    # as small as an engine takes, for tests
    "tiny": Shape(hidden=64, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=64),
}


def shape_of(name: str) -> Shape:
    """A shape by name; `0.8M@32768` is the 0.8M with another vocabulary."""
    base, _, vocabulary = name.partition("@")
    shape = SHAPES[base]
    return replace(shape, vocabulary=int(vocabulary)) if vocabulary else shape


def write_model(shape: Shape, folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """A model folder with tokenizer; an existing one is kept."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = 0
    write_tokenizer(shape.vocabulary).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(vocabulary: int) -> Any:
    """One word a token, `w3` being token 3: a text of known length, whatever the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {special: i for i, special in enumerate(SPECIAL)}
    words |= {word(i): i for i in range(FIRST_WORD, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )


def word(token: int) -> str:
    return f"w{token}"


def text_of(ids: tuple[int, ...]) -> str:
    """The text that the tokenizer turns into these tokens."""
    return " ".join(map(word, ids))

"""Small random models of several architectures, as folders in the hub's format.

`make_tiny_model(tmp_path / "m", "qwen2")` yields a folder that `transformers` and vLLM load by path
as they would a downloaded model: `model=hf model.path=<folder>`. Its tokenizer has one token a
byte, so that it encodes any text, and the special tokens of a chat model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from powerflow_lit.models.loading import load_model, load_tokenizer

Kind = Literal["qwen2", "llama", "gpt_neox", "gemma", "gemma2", "gemma3_text", "phi", "qwen3_moe"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DENSE = tuple(kind for kind in KINDS if kind != "qwen3_moe")  # linear layers all

# the padding is named as Qwen names it: its tokenizer class adds a token of that name where none is
PAD, END = "<|endoftext|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '" + END + "' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
# what an architecture names otherwise, or has of its own; each model is tied as its family is
FAMILIES: dict[Kind, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "gpt_neox": {"tie_word_embeddings": False, "rotary_pct": 0.5, "hidden_act": "gelu"},
    "gemma": {"tie_word_embeddings": True, "head_dim": 32},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 32, "query_pre_attn_scalar": 32,
               "final_logit_softcapping": 3.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": {"tie_word_embeddings": True, "head_dim": 32, "query_pre_attn_scalar": 32,
                    "final_logit_softcapping": None},
    "qwen3_moe": {"tie_word_embeddings": False, "head_dim": 32, "moe_intermediate_size": 64,
                  "num_experts": 4, "num_experts_per_tok": 2},
    "phi": {"tie_word_embeddings": False, "partial_rotary_factor": 0.5},  # its head has a bias
}  # fmt: skip


def byte_tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """One token a byte, then the special tokens: 261 in all. `<|end|>` ends a response."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (PAD, END, SYSTEM, USER, ASSISTANT)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE if chat else None
    return fast


def make_tiny_model(
    folder: Path, kind: Kind, chat: bool = True, *, seed: int = 0, **config: Any
) -> Path:
    """Write a random model of the architecture and its tokenizer to `folder`, and return that.

    Two layers of hidden size 64 with heads of 32, a size that vLLM's CPU attention takes. All
    weights are random, norms and biases included, so that none can be lost unnoticed, and large
    enough that the next token is neither certain nor a matter of chance.

    Args:
        chat: with a chat template (system, user and assistant turns); else without one.
        seed: of the weights; equal seeds give equal files.
        config: entries of the model's config in place of the above, e.g. `tie_word_embeddings`.
    """
    tokenizer = byte_tokenizer(chat=chat)
    entries = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **FAMILIES[kind],
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **entries))
        # a tied model repeats its last token where the embeddings are larger than that
        head = 1.0 if model.config.tie_word_embeddings else 2.0
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:
                    weight.add_(0.1 * torch.randn_like(weight))
                else:
                    scale = head if "embed" in name or "lm_head" in name else 1.5
                    torch.nn.init.normal_(weight, std=scale / weight.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_scripted_model(folder: Path, logits: Mapping[int | None, Mapping[int, float]]) -> Path:
    """Bend the embedded model so that its next token depends on the last one alone, as given.

    Its layers add nothing, each token that is named has an embedding of its own direction, all
    others share one, and the output layer turns these directions into the logits.

    Args:
        logits: of the next token after a token id, or after any that is not named (None); 0 where
            nothing is said, so that an empty mapping is the uniform distribution.
    """
    tokenizer = load_tokenizer("embedded:tiny", trust_remote_code=False)
    model: Any = load_model(
        "embedded:tiny", dtype="float32", attn_implementation="sdpa", trust_remote_code=False
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings.zero_()
        head.zero_()
        root = embeddings.shape[1] ** 0.5  # what the norm makes of a single 1
        for direction, (last, row) in enumerate(logits.items(), 1):
            if last is not None:
                embeddings[last, direction] = 1
            for token, logit in row.items():
                head[token, direction if last is not None else 0] = logit / root
        embeddings[embeddings.sum(1) == 0, 0] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Short names of weights and vocabularies, by which a checkpoint knows what it belongs to."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

VALUES = 64  # of each tensor; a fine-tuned model differs from its base in all of them


@torch.no_grad()
def weights_fingerprint(model: PreTrainedModel) -> str:
    """Equal for models of the same shapes and, as far as a few of each show, the same values.

    An adapter's weights do not count.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            continue
        # inside an adapter's wrapper the same tensor has a longer name
        digest.update(f"{name.replace('.base_layer.', '.')}{tuple(parameter.shape)}".encode())
        digest.update(parameter.flatten()[:VALUES].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give the same tokens the same ids."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number}\t{token}\n".encode())
    return digest.hexdigest()[:16]

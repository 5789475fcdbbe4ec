"""Causal language models and tokenizers, from the hub, a local folder or the embedded ones."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as hf_logging

from powerflow_lit.models.embedded import NAMES, folder_of


class ModelError(RuntimeError):
    """A model or tokenizer cannot be loaded or used; the message says what to change."""


def resolve_path(path: str) -> str:
    """The folder of an embedded model (`embedded:tiny`), or the folder or hub id as given."""
    if path.startswith("embedded:"):
        try:
            return str(folder_of(path.removeprefix("embedded:")))
        except ValueError as error:
            raise ModelError(f"model.path={path}: {error}") from error
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().exists():
        raise ModelError(f"model.path={path}: no such folder (embedded: {', '.join(NAMES)})")
    return str(Path(path).expanduser()) if Path(path).expanduser().exists() else path


def load_tokenizer(path: str, *, trust_remote_code: bool) -> Tokenizer:
    """Tokenizer with a padding token.

    Raises:
        ModelError: no tokenizer there, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_path(path), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer at model.path={path}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {path} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str, *, dtype: str, attn_implementation: str, trust_remote_code: bool
) -> PreTrainedModel:
    """Causal language model in `dtype`, in evaluation mode (no dropout, in training either).

    Raises:
        ModelError: nothing loadable at `path`, or `attn_implementation` would change its results.
    """
    hf_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve_path(path),
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path={path} cannot be loaded: {_first_line(error)} "
            "(give a hub id with network access, or a local folder in the hub's format)"
        ) from error
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped and attn_implementation == "sdpa":
        raise ModelError(
            f"{path} bounds its attention scores (attn_logit_softcapping={capped:g}), which sdpa "
            "leaves out: set model.attn_implementation=eager"
        )
    return model.eval()


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The base: a copy of the policy that nothing trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def policy_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights an engine must be given; a tied output layer appears under its own name too."""
    return dict(model.state_dict())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

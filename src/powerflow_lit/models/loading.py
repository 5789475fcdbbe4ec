"""Causal language models and tokenizers, from the hub, a local folder or the embedded ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PretrainedConfig as PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as hf_logging

from powerflow_lit.models.errors import ModelError as ModelError
from powerflow_lit.models.folders import resolve_path as resolve_path
from powerflow_lit.models.hub import hub_folder

WEIGHTS = ("*.safetensors", "*.bin")
CODE_REFUSED = ("custom code", "trust_remote_code")


def local_folder(path: str, *, revision: str | None = None, weights: bool = True) -> str:
    """The folder that holds the model; a hub id is downloaded first, `weights` included or not.

    Raises:
        ModelError: see `resolve_path`; the hub cannot be reached or refuses.
    """
    resolved = resolve_path(path)
    if Path(resolved).exists():
        if revision is not None:
            raise ModelError(
                f"model.revision={revision}: {path} is a folder, only a hub id has revisions; "
                "set model.revision=null"
            )
        return resolved
    return hub_folder(path, revision=revision, weights=weights)


def load_config(
    path: str, *, trust_remote_code: bool, revision: str | None = None
) -> PretrainedConfig:
    """The architecture alone, without weights.

    Raises:
        ModelError: nothing loadable at `path`, or it needs code of its own.
    """
    folder = local_folder(path, revision=revision, weights=False)
    try:
        return AutoConfig.from_pretrained(  # type: ignore[return-value]
            folder, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise _refusal(path, error) from error


def load_tokenizer(path: str, *, trust_remote_code: bool, revision: str | None = None) -> Tokenizer:
    """Tokenizer with a padding token.

    Raises:
        ModelError: no tokenizer there, or it has no end-of-sequence token.
    """
    alone = Path(path).expanduser()
    if revision is None and (alone / "tokenizer_config.json").is_file():
        folder = str(alone)  # a tokenizer without a model will do
    else:
        folder = local_folder(path, revision=revision, weights=False)
    if not any(Path(folder).glob("*token*")) and not any(Path(folder).glob("vocab*")):
        raise ModelError(
            f"model.path={path}: no tokenizer there (tokenizer.json, tokenizer_config.json): "
            "copy the files of the model it was made from into the folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer at model.path={path}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {path} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str,
    *,
    dtype: str,
    attn_implementation: str,
    trust_remote_code: bool,
    revision: str | None = None,
) -> PreTrainedModel:
    """Causal language model in `dtype`, in evaluation mode (no dropout, in training either).

    Raises:
        ModelError: nothing loadable at `path`, it needs code of its own, its weights are pickled
            with more than tensors, or `attn_implementation` would change its results.
    """
    hf_logging.disable_progress_bar()
    folder = local_folder(path, revision=revision)
    if not any(file for pattern in WEIGHTS for file in Path(folder).glob(pattern)):
        raise ModelError(f"model.path={path}: no weights there (*.safetensors or *.bin)")
    if trust_remote_code:
        print(f"warning: model.trust_remote_code=true runs the Python code that comes with {path}")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    except (
        OSError, ValueError, ImportError, RuntimeError, SafetensorError, UnpicklingError,
    ) as error:  # fmt: skip
        raise _refusal(path, error) from error
    model.name_or_path = resolve_path(path)  # not the place of a downloaded copy
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped and attn_implementation == "sdpa":
        raise ModelError(
            f"{path} bounds its attention scores (attn_logit_softcapping={capped:g}), which sdpa "
            "leaves out: set model.attn_implementation=eager"
        )
    return model.eval()


def end_ids(
    model: PreTrainedModel, tokenizer: Tokenizer, further: Sequence[str]
) -> tuple[int, ...]:
    """Ids of the tokens that end a response: the tokenizer's, the model's own, and `further` ones.

    Chat models name several in their generation_config.json; an engine that knew but one would let
    the others' responses run on.

    Raises:
        ModelError: one of `further` is no single token of the tokenizer.
    """
    ids = [int(tokenizer.eos_token_id)]
    own = getattr(model.generation_config, "eos_token_id", None)
    ids += own if isinstance(own, list) else [] if own is None else [own]
    vocabulary = tokenizer.get_vocab()
    for text in further:
        if text not in vocabulary:
            raise ModelError(f"model.stop_tokens: {text!r} is no token of this tokenizer")
        ids.append(vocabulary[text])
    return tuple(dict.fromkeys(i for i in ids if i < len(tokenizer)))


def _refusal(path: str, error: Exception) -> ModelError:
    if any(words in str(error) for words in CODE_REFUSED):
        return ModelError(
            f"model.path={path} brings Python code of its own: read it, then set "
            "model.trust_remote_code=true"
        )
    if isinstance(error, UnpicklingError):  # torch reads tensors alone (weights_only=True)
        return ModelError(
            f"model.path={path}: its *.bin holds more than tensors, or is cut off; unpickling the "
            "rest could run code, so nothing of it was: take a copy with *.safetensors"
        )
    if isinstance(error, SafetensorError):
        return ModelError(
            f"model.path={path}: its weights cannot be read ({_first_line(error)}): a file is cut "
            "off, or a git-lfs pointer in place of the weights (git lfs pull)"
        )
    return ModelError(
        f"model.path={path} cannot be loaded: {_first_line(error)} "
        "(give a hub id with network access, or a local folder in the hub's format)"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

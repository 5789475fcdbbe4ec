"""Where a model lies and what its config.json says; imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from powerflow_lit.models.embedded import NAMES, folder_of
from powerflow_lit.models.errors import ModelError

# ways of stretching positions whose max_position_embeddings counts the stretched ones already
STRETCHED = ("default", "llama3", "longrope")


def resolve_path(path: str) -> str:
    """The folder of an embedded model (`embedded:tiny`), or the folder or hub id as given.

    Raises:
        ModelError: no such folder, or one that is not in the hub's format.
    """
    if path.startswith("embedded:"):
        try:
            return str(folder_of(path.removeprefix("embedded:")))
        except ValueError as error:
            raise ModelError(f"model.path={path}: {error}") from error
    folder = Path(path).expanduser()
    if folder.exists():
        _check_folder(path, folder)
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"model.path={path}: no such folder (embedded: {', '.join(NAMES)})")
    return path


def context_of(folder: Path) -> int | None:
    """The longest sequence that a model folder's config.json is made for, in tokens.

    None where it does not say, or has no such bound.

    Raises:
        ModelError: the file is no JSON object.
    """
    text = _text_config(folder)
    longest = text.get("max_position_embeddings")
    if not isinstance(longest, int):
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind in STRETCHED or not isinstance(factor, int | float):
        return longest
    return max(longest, int((scaling.get("original_max_position_embeddings") or longest) * factor))


def divides_heads(folder: Path, parts: int) -> bool:
    """Whether attention can be cut into so many parts, as vLLM cuts it; yes where it is not said.

    Query heads are divided; key heads too, or copied where there are more parts than heads.

    Raises:
        ModelError: the folder's config.json is no JSON object.
    """
    text = _text_config(folder)
    heads = text.get("num_attention_heads")
    key_heads = text.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(key_heads, int):
        return True
    return heads % parts == 0 and (key_heads % parts == 0 or parts % key_heads == 0)


def _text_config(folder: Path) -> Mapping[str, Any]:
    """What config.json says of the language model."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'}: cannot be read as JSON ({error})") from error
    if not isinstance(config, Mapping):
        raise ModelError(f"{folder / 'config.json'}: holds no JSON object")
    return config.get("text_config") or config


def has_chat_template(folder: Path) -> bool:
    """Whether a tokenizer's folder brings a chat template; yes where there is no telling."""
    if any(folder.glob("*chat_template*")):
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return True
    return not isinstance(config, Mapping) or bool(config.get("chat_template"))


def _check_folder(path: str, folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"model.path={path}: a file; give the folder that holds it")
    if (folder / "config.json").exists():
        return
    if (folder / "export" / "config.json").exists():
        raise ModelError(f"model.path={path}: a run folder; its model is model.path={path}/export")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"model.path={path}: an adapter without its model; give the merged folder (export/)"
        )
    raise ModelError(
        f"model.path={path}: no config.json there, so it is no model folder of the hub's format"
    )

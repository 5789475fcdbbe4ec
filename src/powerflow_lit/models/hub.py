"""Models by hub id: fetched into the local cache once, and read from there by everyone."""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from powerflow_lit.models.errors import ModelError

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
REACH_SECONDS = 5.0


def hub_folder(repo: str, *, revision: str | None, weights: bool) -> str:
    """The cached snapshot of a hub repository; downloads what is missing, if the hub answers.

    Engine, tokenizer and model all read this one folder, so that a pinned revision holds for all.

    Raises:
        ModelError: unknown, gated or unreachable, each with what to do.
    """
    named = f"model.path={repo}"
    reachable = hub_reachable()

    def fetched(*patterns: str) -> str:
        return snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],  # other formats of the same weights
            local_files_only=not reachable,
        )

    try:
        folder = fetched(*SMALL_FILES, *(("*.safetensors",) if weights else ()))
        if weights and not any(Path(folder).glob("*.safetensors")):
            folder = fetched(*SMALL_FILES, "*.bin")
        return folder
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{named}: neither a folder here nor in the hub's cache, and the hub "
            f"({urlsplit(constants.ENDPOINT).hostname}) cannot be reached: connect this machine, "
            "or copy the model here and give its folder"
        ) from error
    except GatedRepoError as error:
        raise ModelError(
            f"{named}: gated; accept its licence on the hub, then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{named}: the hub has no model.revision={revision} of it") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{named}: no such folder here and no such model on the hub (or a private one: "
            "`hf auth login`)"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{named}: the hub refuses it: {reason}") from error


def hub_reachable() -> bool:
    """Whether the hub answers, asked with a short limit; its client would try for a minute."""
    if constants.is_offline_mode():
        return False
    if set(urllib.request.getproxies()) - {"no"}:
        return True  # what a proxy reaches only the request itself can tell
    host = urlsplit(constants.ENDPOINT)
    port = host.port or (443 if host.scheme == "https" else 80)
    try:
        socket.create_connection((host.hostname or "", port), timeout=REACH_SECONDS).close()
    except OSError:
        return False
    return True

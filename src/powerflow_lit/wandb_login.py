"""Whether this machine can reach a W&B account; imports nothing heavy."""

from __future__ import annotations

import netrc
import os
from urllib.parse import urlparse


def wandb_mode(mode: str) -> str:
    """`auto` is online with a key or a login, offline otherwise; WANDB_MODE has the first word."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online" if has_wandb_login() else "offline")
    # Lightning leaves the old name behind when a run was offline
    return "offline" if mode == "dryrun" else mode


def missing_login(mode: str) -> str | None:
    """What to do where an online run is asked for and there is no login; None if all is well."""
    if wandb_mode(mode) != "online" or has_wandb_login():
        return None
    asked = "logger.mode=online" if mode == "online" else "WANDB_MODE=online"
    return (
        f"{asked}, but W&B has no key or login here: export WANDB_API_KEY, run `wandb login`, or "
        "take logger.mode=offline and upload later with `wandb sync`"
    )


def has_wandb_login() -> bool:
    """A key in WANDB_API_KEY, or a login for W&B's host in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

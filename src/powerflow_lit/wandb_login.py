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


def has_wandb_login() -> bool:
    """A key in WANDB_API_KEY, or a login for W&B's host in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

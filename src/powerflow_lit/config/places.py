"""Whether a folder that will be written to can be."""

from __future__ import annotations

import os
from pathlib import Path

from powerflow_lit.config.rules import ConfigError


def check_writable(name: str, folder: str) -> None:
    """Make the folder, write a file in it, and take both away again.

    Args:
        name: the setting that names the folder.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    path = Path(folder).expanduser()
    made = [p for p in (path, *path.parents) if not os.path.lexists(p)]
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{name}={folder}: cannot be written to ({reason}): choose another {name}"
        ) from error
    finally:
        for new in made:  # the deepest first
            try:
                new.rmdir()
            except OSError:
                break  # never made, or in use by now

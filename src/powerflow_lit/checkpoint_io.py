"""How a checkpoint reaches the disk: straight, and with the system's own word when it is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO


class StraightCheckpointIO(TorchCheckpointIO):
    """Writes to the named file as it goes.

    Lightning's own holds a second copy of the whole checkpoint in memory, and writes it to the
    folder of temporary files first: one more disk that can be full, and where the rest then stays.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to the local file `path`.

        Raises:
            OSError: the disk did not take it; torch only says that its position is unexpected.
        """
        if storage_options is not None:
            raise TypeError("checkpoints are local files: storage_options does nothing")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

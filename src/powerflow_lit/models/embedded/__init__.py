"""The tiny language models that ship with the project, and how they are made."""

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ("tiny", "tiny_instruct")


def folder_of(name: str) -> Path:
    """Folder of an embedded model, in the hub's own format.

    Raises:
        ValueError: no such embedded model.
    """
    if name not in NAMES:
        raise ValueError(f"no embedded model '{name}': choose one of {', '.join(NAMES)}")
    return FOLDER / name

"""What the checks are made of: the error, and conditions with their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from powerflow_lit.mendable import MendableError

SHOWN = 12  # names of a list that a line holds


class ConfigError(MendableError, ValueError):
    """A configuration value that cannot work; the message names value, range and remedy."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value: object, options: Sequence[str]) -> None:
    """Raises ConfigError, with the nearest option, unless the value is one of them."""
    close = nearest(str(value), options)
    hint = f"did you mean {close}? " if close else ""
    require(value in options, f"{name}={value}: {hint}choose one of {', '.join(options)}")


def positive(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        require(value > 0, f"{name}={value}: must be positive")


def at_least(lowest: int, values: Mapping[str, float | None]) -> None:
    """`None` stands for a choice left to others, and passes."""
    for name, value in values.items():
        require(value is None or value >= lowest, f"{name}={value}: must be {lowest} or more")


def is_ours(node: Mapping[str, Any]) -> bool:
    """Whether a parameter's name means here what it means in this package."""
    return str(node.get("_target_")).startswith("powerflow_lit.")


def check_numbers(group: str, numbers: Mapping[str, Any], whole: Sequence[str] = ()) -> None:
    """Raises ConfigError for what is no number in a group of untyped values."""
    for name, value in numbers.items():
        kinds: tuple[type, ...] = (int,) if name in whole else (int, float)
        require(
            isinstance(value, kinds) and not isinstance(value, bool),
            f"{group}.{name}={value}: must be a {'whole ' if name in whole else ''}number",
        )


def listed(names: Sequence[str]) -> str:
    """Names for a line, the first of them where they are many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def nearest(word: str, known: Iterable[object]) -> str | None:
    """The known name that a mistyped one is likely to mean."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return close[0] if close else None

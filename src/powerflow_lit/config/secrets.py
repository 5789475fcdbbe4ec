"""Keys and tokens of the environment never reach a file, a log or W&B; imports nothing heavy.

What would hold such a value holds `${oc.env:NAME}` instead, which a resumed run reads back from
its own environment.
"""

from __future__ import annotations

import netrc
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

# HF_TOKEN, OPENAI_API_KEY, MYAPIKEY, AWS_ACCESS_KEY_ID, DB_PASSWORDS; not KEYBOARD, MONKEY or
# TOKENIZERS_PARALLELISM
NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|((^|_|API|ACCESS|PRIVATE)KEY))S?(?![A-Z])"
)
# a variable that says where a secret lies holds none
PLACE = re.compile(r"_(PATH|FILE|DIR|SOCK|ENV)$")
SHORTEST = 8  # characters; anything shorter is in a hundred other places
UNNAMED = "***"  # in place of a stored login, which no variable holds


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """What stands in place of each secret value of an environment, longest value first.

    A value counts from 8 characters on. One that several variables hold goes by the first name.
    """
    found: dict[str, str] = {}
    for name in sorted(environment):
        value = environment[name].strip()
        if NAME.search(name.upper()) and not PLACE.search(name.upper()) and len(value) >= SHORTEST:
            found.setdefault(value, f"${{oc.env:{name}}}")
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))


def hidden(value: Any) -> Any:
    """The same text, list or mapping without the secrets of this process.

    Args:
        value: plain containers; lists and tuples come back as lists. What is no text stays.
    """
    return _hide(value, _secrets())


def _hide(value: Any, secrets: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for secret, name in secrets.items():
            value = value.replace(secret, name)
        return value
    if isinstance(value, Mapping):
        return {_hide(k, secrets): _hide(v, secrets) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(v, secrets) for v in value]
    return value


def _secrets() -> dict[str, str]:
    stored = {value: UNNAMED for value in _stored() if len(value) >= SHORTEST}
    return stored | secrets_of(os.environ)


def _stored() -> list[str]:
    """Logins that W&B and the hub keep in files of the home folder."""
    found = []
    # the file by name, since Python's own search refuses one that others may read
    place = Path(os.environ.get("NETRC") or "~/.netrc")
    with suppress(OSError, RuntimeError, UnicodeDecodeError, netrc.NetrcParseError):
        logins = netrc.netrc(place.expanduser()).hosts.values()
        found += [password or "" for _, _, password in logins]
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    place = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token")
    with suppress(OSError, RuntimeError, UnicodeDecodeError):
        found.append(place.expanduser().read_text().strip())
    return found


class HidingStream:
    """A text stream that writes no secret, whoever writes to it.

    W&B copies the console by putting its own function in place of `write`. That function then
    gets what is already hidden, since setting `write` only changes what is called afterwards.
    """

    def __init__(self, stream: TextIO) -> None:
        self.__dict__["stream"] = stream
        self.__dict__["_secrets"] = _secrets()
        self.__dict__["_inner"] = stream.write

    @property
    def write(self) -> Callable[[str], int]:
        inner, secrets = self._inner, self._secrets

        def write(text: str) -> int:
            return inner(_hide(text, secrets))

        return write

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "write":
            self.__dict__["_inner"] = value
        else:
            setattr(self.stream, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stream"], name)


def hide_in_output() -> None:
    """From now on stdout and stderr show no secret, tracebacks included; safe to call again."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, HidingStream) and _secrets():
            setattr(sys, name, HidingStream(stream))

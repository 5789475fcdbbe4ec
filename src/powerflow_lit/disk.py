"""Writing files so that a full disk costs nothing that was there; imports nothing heavy."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from powerflow_lit.mendable import MendableError

# what a user can mend: full, over quota, over a limit of size, read-only, failing
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class DiskError(MendableError, RuntimeError):
    """The disk does not take a file; one line: which, why, what stands and how to go on."""


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Names the file in an error of the disk.

    Raises:
        OSError: with `path` where the system named none, and in place of errors of libraries
            (safetensors, tokenizers) that say in words alone what the system said.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        for number in ERRNOS:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


@contextmanager
def dropped(aside: Path) -> Iterator[None]:
    """Gives the space of an unfinished file back where the block breaks off."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write a file that is renamed into its place when the block ends.

    A kill leaves the old file or the new one, an error the old one.

    Raises:
        OSError: see `named`.
    """
    aside = path.with_name(path.name + ".tmp")
    with named(path), dropped(aside):
        yield aside
        os.replace(aside, path)


@contextmanager
def explained(remedy: Callable[[], str]) -> Iterator[None]:
    """Turns an error of the disk into one line; other errors pass.

    Args:
        remedy: what stands and how to go on; asked when an error comes.

    Raises:
        DiskError: the disk did not take a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in ERRNOS:
            raise
        raise DiskError(f"{error.filename}: {error.strerror}. {remedy()}") from error

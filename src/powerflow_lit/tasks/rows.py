"""Rows of a data set: from the hub, a local file or a local folder; each fault is one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub import HfApi, constants

from powerflow_lit.tasks.base import TaskError

READERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}
# words of a file's name or folder that say which split it is
SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
SHARD_NUMBER = re.compile(r"\d{4,}")  # shorter ones may be a name's own: aime24, aime25
SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+$")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?$")
LFS_POINTER = b"version https://git-lfs"
QUIET_BYTES = 64 * 2**20
HUB_SECONDS = 20.0
SAID = 300  # characters of a loader's own words


def load_rows(path: str, *, split: str, subset: str | None, revision: str | None) -> Dataset:
    """The rows at `path`, memory-mapped.

    Args:
        path: a file (parquet, jsonl, json, csv, arrow), a folder (of such files, in the hub's
            layout, or made by `save_to_disk`) or a hub id. What exists locally comes first.
        split: its name, with a slice if wanted (`train[:1000]`). A single file is the split asked
            for, whatever its name.
        subset: a hub configuration, or a subfolder; None where there is but one.
        revision: branch, tag or commit of a hub set; None is its newest.

    Raises:
        TaskError: nothing there, nothing readable, no such split or subset, or no rows.
    """
    if not path or not path.strip("? "):
        raise TaskError("the path of a data set is empty: give a hub id, a file or a folder")
    local = Path(path).expanduser()
    if local.is_file():
        rows = _from_files(path, [local], split)
    elif local.is_dir():
        rows = _from_folder(path, local, split, subset)
    elif _looks_local(path):
        raise TaskError(f"{path}: no such file or folder{_nearest(local)}")
    else:
        rows = _from_hub(path, split, subset, revision)
    if not len(rows):
        raise TaskError(f"{path} holds no rows (split {split})")
    return rows


def _from_files(path: str, files: Sequence[Path], split: str) -> Dataset:
    """All rows of the files, which are the split asked for."""
    suffixes = {file.suffix.lower() for file in files}
    reader = READERS.get(suffixes.pop()) if len(suffixes) == 1 else None
    if reader is None:
        endings = ", ".join(sorted({file.suffix or "none" for file in files}))
        raise TaskError(f"{path}: cannot read {endings} files, only one of {', '.join(READERS)}")
    for file in files:
        if file.stat().st_size == 0:
            raise TaskError(f"{_named(path, file)} is empty (0 bytes)")
        try:
            with file.open("rb") as opened:
                head = opened.read(len(LFS_POINTER))
        except OSError as error:
            raise TaskError(f"{_named(path, file)} cannot be opened: {error.strerror}") from error
        if head == LFS_POINTER:
            raise TaskError(
                f"{_named(path, file)} is a git-lfs pointer, not the data: run git lfs pull"
            )
    name = split.partition("[")[0]
    # small files are read sooner than a bar is
    with quietly(bars=sum(file.stat().st_size for file in files) > QUIET_BYTES):
        try:
            return load_dataset(reader, data_files={name: [str(f) for f in files]}, split=split)
        except Exception as error:  # pyarrow, pandas and datasets each raise their own
            said = str(error)
            if "corresponds to no data" in said:
                raise TaskError(f"{path} holds no rows") from error
            if "instruction" in said.lower():  # datasets' word for a split with its slice
                raise TaskError(f"split={split}: {_first_line(error)}") from error
            cause = _root(error)
            if isinstance(cause, OSError) and cause.errno is not None:  # disk, not content
                raise TaskError(
                    f"{path} cannot be loaded: {_first_line(cause)} (its cache lies in HF_HOME)"
                ) from error
            bad = next((f for f in files if not _readable(reader, f)), files[0])
            raise TaskError(
                f"{_named(path, bad)} cannot be read as {reader}, it may be cut off or damaged: "
                f"{_first_line(_root(error))}"
            ) from error


def _from_folder(path: str, folder: Path, split: str, subset: str | None) -> Dataset:
    name = split.partition("[")[0]
    if subset is not None:
        if not (folder / subset).is_dir():
            there = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "none"
            raise TaskError(f"{path} has no subset '{subset}'; its folders: {there}")
        return _from_folder(f"{path.rstrip('/')}/{subset}", folder / subset, split, None)
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    if saved:
        return _from_disk(path, folder, split)
    by_split: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.suffix.lower() in READERS and not any(p.startswith(".") for p in inside.parts):
            by_split.setdefault(_split_of(inside), []).append(file)
    by_split.pop("", None)
    if not by_split:
        raise TaskError(f"{path} holds no data files ({', '.join(READERS)})")
    wanted = SPLIT_WORDS.get(name, name)
    if wanted not in by_split:
        raise _no_split(path, name, list(by_split))
    files = by_split[wanted]
    if len({SHARD_NUMBER.sub("", str(file)) for file in files}) > 1:
        some = ", ".join(str(file.relative_to(folder)) for file in files[:8])
        raise TaskError(
            f"{path} holds several data sets ({some}): give the path of one of them, or set "
            "subset to a folder in it"
        )
    return _from_files(path, files, split)


def _split_of(file: Path) -> str:
    """The split that a file's name or folder says; `train` where they say none.

    A description of the data (the json files that the hub's tools leave) belongs to none.
    """
    if file.name in ("dataset_info.json", "dataset_infos.json", "state.json"):
        return ""
    words = re.split(r"[^a-z]+", str(file.with_suffix("")).lower())
    named = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)
    shard = SHARD.match(file.stem)
    return named or (shard["split"] if shard else "train")


def _from_disk(path: str, folder: Path, split: str) -> Dataset:
    """What `save_to_disk` wrote: one data set, or one a split."""
    name = split.partition("[")[0]
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets each raise their own
        raise TaskError(
            f"{path} cannot be opened, it may be damaged: {_first_line(_root(error))}"
        ) from error
    if isinstance(loaded, DatasetDict):
        if name not in loaded:
            raise _no_split(path, name, list(loaded))
        loaded = loaded[name]
    if name != split:
        raise TaskError(f"split={split}: a saved folder takes no slice: give split={name}")
    return loaded


def _from_hub(path: str, split: str, subset: str | None, revision: str | None) -> Dataset:
    remedy = "give a local file or folder instead, or see to network access"
    cached = (Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}").exists()
    if not cached:  # a quick question first: the loader would try for half a minute
        try:
            HfApi().dataset_info(path, revision=revision, timeout=HUB_SECONDS)
        except Exception as error:  # of huggingface_hub and of its http client
            near = _nearest(Path(path))
            raise TaskError(
                f"{path}: neither a file or folder here{near} nor a data set that the hub gives "
                f"({type(error).__name__}: {_first_line(error)}): {remedy}"
            ) from error
    try:
        return load_dataset(path, name=subset, split=split, revision=revision)
    except Exception as error:  # of datasets, of huggingface_hub and of its http client
        said = " ".join(str(_root(error)).split())[:SAID]  # what it lists stands on further lines
        if "split" in said.lower() and "[" in said:
            raise TaskError(f"{path}: no split '{split}': {said}") from error
        if "config" in said.lower():
            raise TaskError(f"{path}: subset={subset}: {said}: set subset") from error
        raise TaskError(f"{path} cannot be loaded from the hub: {said}: {remedy}") from error


def _no_split(path: str, split: str, there: Sequence[str]) -> TaskError:
    return TaskError(f"{path} has no split '{split}', it has: {', '.join(sorted(there))}")


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist was meant to be one, and not a hub id."""
    return (
        path.startswith((".", "/", "~"))
        or Path(path).suffix.lower() in {*READERS, ".txt", ".tsv", ".zip", ".gz", ".zst"}
        or HUB_ID.match(path) is None
    )


def _nearest(path: Path) -> str:
    """` (...)`: what lies where `path` should, the most similar names first."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = [p.name for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    missing = path.relative_to(folder).parts[0] if path != folder else path.name
    close = difflib.get_close_matches(missing, names, n=3, cutoff=0.5)
    return f" (in {folder.resolve()}: did you mean {' or '.join(close)}?)" if close else ""


def _named(path: str, file: Path) -> str:
    """The file as the person knows it: the path given, or the file inside of it."""
    return path if Path(path).expanduser() == file else f"{path}: {file.name}"


def _readable(reader: str, file: Path) -> bool:
    try:
        next(iter(load_dataset(reader, data_files=str(file), split="train", streaming=True)), None)
    except Exception:  # whatever its reader raises
        return False
    return True


def _root(error: BaseException) -> BaseException:
    """What went wrong at the bottom."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def quietly(*, bars: bool) -> Iterator[None]:
    """`datasets` without its log lines (its errors are raised as well), and bars where wanted."""
    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def columns_of(features: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of all columns, nested ones with dots."""
    names = []
    for name, feature in features.items():
        nested = feature if isinstance(feature, Mapping) else None
        names.append(prefix + name)
        names.extend(columns_of(nested, f"{prefix}{name}.") if nested else [])
    return names

"""Benchmarks of an evaluation: their files, their prompts within the limit, and notes on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from powerflow_lit.models.prompting import Route, encode_prompts
from powerflow_lit.tasks.base import Task, TaskError
from powerflow_lit.types import Prompt


@dataclass(frozen=True)
class Benchmark:
    """A task's evaluation prompts, ready for an engine."""

    name: str
    task: Task
    prompts: list[Prompt]
    prompt_ids: list[tuple[int, ...]]
    notes: tuple[str, ...]  # the task's, and of prompts that were left out


def located(nodes: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """The benchmarks' configurations with `path` set to the file of the folder that has their name.

    A file belongs to a benchmark if its name begins with the benchmark's (`aime24_0726.parquet`
    with aime24); one that bears exactly that name comes first.

    Raises:
        TaskError: no such folder; a benchmark with no file there, or with several.
    """
    if not folder.expanduser().is_dir():
        raise TaskError(f"benchmark_dir={folder}: no such folder")
    files = sorted(p for p in folder.expanduser().iterdir() if not p.name.startswith("."))
    found = {}
    for name, node in nodes.items():
        own = [p for p in files if p.name.lower().startswith(name.lower())]
        own = [p for p in own if p.stem.lower() == name.lower()] or own
        if len(own) != 1:
            many = "several files there begin with" if own else "no file there begins with"
            shown = ", ".join(p.name for p in own or files) or "nothing"
            raise TaskError(
                f"benchmark_dir={folder}: {many} '{name}' ({shown}): rename one, give "
                f"benchmarks.{name}.path=<file>, or leave that benchmark out"
            )
        # a file has neither a hub's subsets nor its revisions
        hub_only = {key: None for key in ("subset", "revision") if key in node}
        found[name] = {**node, **hub_only, "path": str(own[0])}
    return found


def prepared(
    name: str, task: Task, tokenizer: Tokenizer, *, route: Route, max_prompt_tokens: int
) -> Benchmark:
    """The benchmark with its prompts encoded; those over the limit are dropped and counted.

    Raises:
        TaskError: no prompt is left.
        ModelError: the tokenizer does not know the words of a prompt.
    """
    prompts: Sequence[Prompt] = task.eval_prompts()
    ids = encode_prompts(tokenizer, prompts, route)
    usable = [p for p in prompts if len(ids[p.id]) <= max_prompt_tokens]
    notes = tuple(task.notes)
    if not usable:
        raise TaskError(
            f"{name}: none of {len(prompts)} prompts is within {max_prompt_tokens} tokens: "
            "raise rollout.max_prompt_tokens"
        )
    if len(usable) < len(prompts):
        dropped = len(prompts) - len(usable)
        notes += (
            f"{dropped} of {len(prompts)} prompts are over {max_prompt_tokens} tokens: dropped",
        )
    return Benchmark(name, task, usable, [ids[p.id] for p in usable], notes)

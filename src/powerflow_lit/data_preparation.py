"""One preparation of a training set: filtered, sampled by seed, hashed and written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.progress import track
from rich.table import Table

from powerflow_lit import __version__
from powerflow_lit.config.schema_tools import PrepareDataConfig, SolutionConfig
from powerflow_lit.models.loading import load_tokenizer
from powerflow_lit.prepare_data import check
from powerflow_lit.run_folder import write_whole
from powerflow_lit.tasks import recipe
from powerflow_lit.tasks.base import TaskError
from powerflow_lit.tasks.rows import columns_of, quietly
from powerflow_lit.tasks.sources import Items, Source, column_values, read_items

COUNTED_AT_ONCE = 1000  # solutions


def prepare(config: PrepareDataConfig) -> dict[str, Any]:
    """Write the set in verl's layout and its manifest; returns what the manifest says.

    Raises:
        ConfigError: see `check`.
        TaskError: the source cannot be read, or has too few questions.
        ModelError: the tokenizer cannot be loaded.
    """
    check(config)
    output = Path(config.output).expanduser()
    lengths = _counter(config.solution.tokenizer)
    found = read_items(Source(**vars(config.source)))
    solutions, unit = _solutions(found, config.solution)
    solution = config.solution
    rules = recipe.Rules(
        **vars(config.drop),
        max_solution_length=solution.max_tokens if solution.tokenizer else solution.max_words,
    )
    bare = [recipe.without_instruction(item, config.instruction) for item in found.items]
    kept, dropped = recipe.apply_rules(bare, solutions, rules, lengths)
    chosen = recipe.seeded_sample(kept, config.size, config.seed)
    # a question that came with the instruction is written as it came
    as_they_came = {item.row: item for item in found.items}
    rows = recipe.verl_rows(
        [as_they_came[item.row] for item in chosen], config.instruction, config.data_source
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(output.name + ".tmp")
    with quietly(bars=False):
        Dataset.from_list(rows).to_parquet(aside)
    os.replace(aside, output)
    manifest = {
        "questions": len(chosen),
        "sha256": recipe.content_hash(chosen),
        "rows_in_source": len(found.rows),
        "dropped": {
            "without question": found.counts["without question"],
            "repeated": found.counts["duplicates"],
            **dropped,
            "not drawn": len(kept) - len(chosen),
        },
        "solution_length": unit,
        "columns": {"question": found.question_column, "answer": found.answer_column},
        "settings": asdict(config),
        "versions": {
            "powerflow_lit": __version__,
            **{name: metadata.version(name) for name in ("datasets", "pyarrow")},
        },
    }
    write_whole(output.with_name(output.name + ".json"), json.dumps(manifest, indent=2) + "\n")
    return manifest


def _solutions(found: Items, config: SolutionConfig) -> tuple[list[str | None] | None, str]:
    """The worked solution of each question, and in words how its length is bounded."""
    column = config.column
    if column not in columns_of(found.rows.features):
        return None, f"not bounded: the source has no column '{column}'"
    bound, unit = config.max_words, "words"
    if config.tokenizer is not None:
        bound, unit = config.max_tokens, f"tokens of {config.tokenizer}"
    if bound is None:
        return None, "not bounded"
    values = column_values(found.rows, column)
    if wrong := next((v for v in values if v is not None and not isinstance(v, str)), None):
        raise TaskError(f"solution.column={column} holds {type(wrong).__name__}, not text")
    return [values[item.row] for item in found.items], f"at most {bound} {unit}"


def _counter(tokenizer: str | None) -> recipe.Lengths:
    """Counts the tokens of texts, or their words."""
    if tokenizer is None:
        return lambda texts: [len(text.split()) for text in texts]
    encode = load_tokenizer(tokenizer, trust_remote_code=False)

    def tokens(texts: Sequence[str]) -> list[int]:
        counts: list[int] = []
        starts = range(0, len(texts), COUNTED_AT_ONCE)
        for start in track(starts, "counting tokens of solutions", transient=True):
            some = list(texts[start : start + COUNTED_AT_ONCE])
            counts.extend(map(len, encode(some, add_special_tokens=False)["input_ids"]))
        return counts

    return tokens


def table_of(manifest: Mapping[str, Any]) -> Table:
    """What became of the source's rows."""
    table = Table()
    table.add_column("rows")
    table.add_column("number", justify="right")
    table.add_row("in the source", f"{manifest['rows_in_source']:,}")
    for why, count in manifest["dropped"].items():
        table.add_row(f"- {why}", f"{count:,}")
    table.add_row("written", f"{manifest['questions']:,}", style="bold")
    return table

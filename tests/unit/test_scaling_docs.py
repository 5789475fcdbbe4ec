"""The tables of docs/scaling.md are what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.scaling import DEVICES, FINETUNE, MODELS, shapes, table

DOCS = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def written(finetune: str) -> list[list[str]]:
    """The rows of a table of recommendations as they stand in the document."""
    after = DOCS[DOCS.index(f"finetune={finetune}") :].splitlines()
    start = next(i for i, line in enumerate(after) if line.startswith("| devices |"))
    rows = []
    for line in after[start:]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


@pytest.mark.parametrize("finetune", FINETUNE)
def test_the_column_of_7b_is_what_the_command_prints(finetune: str) -> None:
    model = MODELS[1]
    found = [cells(line) for line in table("h100", finetune, [model], (1, 8, 32))]
    header, _, *rows = written(finetune)
    column = header.index(model)
    known = {row[0]: row[column] for row in rows}
    assert found[2:] == [[n, known[n]] for n in ("1", "8", "32")]


@pytest.mark.slow
def test_all_tables_are_what_the_command_prints() -> None:
    assert "\n".join(shapes(MODELS, "h100")) in DOCS
    for finetune in FINETUNE:
        assert "\n".join(table("h100", finetune, MODELS, DEVICES)) in DOCS


def test_weights_are_those_of_the_model_cards() -> None:
    rows = {c[0]: c[1] for c in map(cells, DOCS.splitlines()) if c[0] in MODELS}
    # billions, as the cards say them
    cards = dict(zip(MODELS, (1.54, 7.61, 32.5, 70.6, 72.7), strict=True))
    for model, billions in cards.items():
        assert float(rows[model].rstrip("B")) == pytest.approx(billions, rel=0.01)

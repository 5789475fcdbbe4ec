"""What docs/reliability.md and docs/theory.md say was tested has a test of that name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("page", "least"), [("reliability.md", 40), ("theory.md", 20)])
def test_every_test_that_a_page_of_claims_names_exists(page: str, least: int) -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {path.name for path in files}
    for path in files:
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(), flags=re.M))
    text = (ROOT / "docs" / page).read_text()
    named = {
        name.rpartition("/")[2] for name in re.findall(r"`((?:tests/\w+/)?test_\w+(?:\.py)?)", text)
    }
    assert len(named) > least
    assert named <= known, named - known

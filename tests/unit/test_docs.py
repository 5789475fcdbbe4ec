"""What docs/reliability.md says was tested has a test of that name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {path.name for path in files}
    for path in files:
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(), flags=re.M))
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = {
        name.rpartition("/")[2] for name in re.findall(r"`((?:tests/\w+/)?test_\w+(?:\.py)?)", text)
    }
    assert len(named) > 40
    assert named <= known, named - known

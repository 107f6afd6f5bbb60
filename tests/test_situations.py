"""The table of situations in docs/operating.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_situation_names_a_test_that_exists() -> None:
    section = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8").partition("## Situations that others")[2]
    rows = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith(("| **", "| sit"))]
    assert len(rows) == 38
    named = [place for row in rows for place in re.findall(r"`([a-z_/]+\.py(?:::\w+)?)`", row)]
    assert len(named) >= 36
    for place in named:
        path, _, name = place.partition("::")
        text = (ROOT / "tests" / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, place

"""Foreign text is shown as it is, on one line, and changes nothing on a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.text import counted, visible


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("plain [bold] text", "plain [bold] text"),
        ("äpfel 苹果", "äpfel 苹果"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("two\nlines\ttab", "two\\nlines\\ttab"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\x9b31m", "\\x9b31m"),
        ("\ud800", "\\ud800"),
        ("\u2028", "\\u2028"),
    ],
)
def test_control_characters_of_a_terminal_are_escaped(given_text: str, shown: str) -> None:
    assert visible(given_text) == shown


@given(st.text())
def test_the_result_is_one_line_that_can_be_encoded_and_is_stable(text: str) -> None:
    found = visible(text)
    assert len(found.splitlines()) <= 1
    assert "\x1b" not in found
    found.encode("utf-8")
    assert visible(found) == found


def test_one_thing_is_counted_as_one() -> None:
    assert [counted(n, "agent") for n in (0, 1, 2)] == ["0 agents", "1 agent", "2 agents"]
    assert counted(2, "entry", "entries") == "2 entries"

"""Foreign text made safe to show: what a terminal, a log line or a table cell gets is what a person can see."""

import unicodedata
from typing import Final

_HIDDEN: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
_JOINERS: Final = frozenset("\u200c\u200d")
"""Needed inside words of some scripts and inside emoji; they change no line and no direction."""


def visible(text: str) -> str:
    """Returns the text with every control, escape, direction and line character written as an escape.

    Line feeds and tabs are written out as well: the result is one line. Applying it twice escapes nothing further,
    because the escapes are printable characters.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    category = unicodedata.category(character)
    if category in _HIDDEN or (category == "Cf" and character not in _JOINERS):
        return character.encode("unicode_escape", "surrogatepass").decode("ascii")
    return character

"""Text that is safe to show on a terminal, in a log line or in a table cell: visible characters and no secrets."""

import re
import unicodedata
from typing import Final

_HIDDEN: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
_JOINERS: Final = frozenset("\u200c\u200d")
"""Needed inside words of some scripts and inside emoji; they change no line and no direction."""
_USER_INFO: Final = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s\"'<>]*@")
_QUERY_SECRET: Final = re.compile(
    r"(?P<name>[?&;,/_](?:[A-Za-z0-9_.-]*(?:pas|pwd|secret|token|auth|key|sig)[A-Za-z0-9_.-]*|pw|p|user|usr|login)=)[^&;#\s\"'<>]*",
    re.IGNORECASE,
)
MASK: Final = "***"


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


def mask(text: str) -> str:
    """Hides the secrets of every address in a text: what stands before `@`, and parameters such as `password=`.

    Args:
        text: An address of a camera or device, or any sentence that may hold one.

    Returns:
        The text with `***` in place of each secret. Law: `mask(mask(t)) == mask(t)`.
    """
    return _QUERY_SECRET.sub(rf"\g<name>{MASK}", _USER_INFO.sub(rf"\g<scheme>{MASK}@", text))


def counted(number: int, word: str, plural: str = "") -> str:
    """Returns a number with its noun, such as `1 agent` and `2 agents`."""
    return f"{number:,} {word if number == 1 else plural or word + 's'}"

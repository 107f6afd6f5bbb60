"""Which agents a rollout means: a small language over labels, parsed once, matched purely.

`site=wenatchee,line in (1,2),!canary`: terms joined by commas, all of which must hold. A term is `key` (has the
label), `!key` (has it not), `key=value`, `key!=value`, `key in (a,b)` or `key notin (a,b)`. The key `id` is the agent's
own id. An absent label matches `!key`, `!=` and `notin`, nothing else. The empty selector means every agent.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from models.errors import InputError

MAX_CHARS: Final = 1000
_KEY = r"[A-Za-z0-9](?:[A-Za-z0-9_./-]{0,61}[A-Za-z0-9])?"
_VALUE = r"[^\s,()=!]{1,200}"
_TERM: Final = re.compile(
    rf"\s*(?:(?P<absent>!)\s*(?P<no>{_KEY})"
    rf"|(?P<key>{_KEY})(?:\s*(?P<sign>==|!=|=)\s*(?P<value>{_VALUE})"
    rf"|\s+(?P<list>in|notin)\s*\((?P<values>[^()]*)\))?)\s*(?:,|$)"
)


@dataclass(frozen=True, slots=True)
class Term:
    """One condition: the label `key` is (not) among `values`; no values = it is (not) there at all."""

    key: str
    values: frozenset[str]
    negated: bool

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Returns whether these labels meet it."""
        there = self.key in labels and (not self.values or labels[self.key] in self.values)
        return there is not self.negated


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed selector; `str()` gives its normal form, and `parse_selector(str(s)) == s`."""

    terms: tuple[Term, ...]

    def matches(self, agent_id: str, labels: Mapping[str, object]) -> bool:
        """Returns whether an agent with these labels is meant."""
        known = {key: str(value) for key, value in labels.items()} | {"id": agent_id}
        return all(term.holds(known) for term in self.terms)

    def __str__(self) -> str:
        return ",".join(_write(term) for term in self.terms)


def _write(term: Term) -> str:
    values = sorted(term.values)
    if not values:
        return f"!{term.key}" if term.negated else term.key
    if len(values) == 1:
        return f"{term.key}{'!=' if term.negated else '='}{values[0]}"
    return f"{term.key} {'notin' if term.negated else 'in'} ({','.join(values)})"


def parse_selector(text: str) -> Selector:
    """Reads a selector.

    Raises:
        InputError: `rollout.bad_selector`, naming the place from which it cannot be understood.
    """
    if len(text) > MAX_CHARS:
        raise _refusal(f"{len(text)} characters", f"at most {MAX_CHARS} characters")
    terms, at = [], 0
    while text[at:].strip():
        match = _TERM.match(text, at)
        if match is None or match.end() == at:
            raise _refusal(text[at : at + 80])
        terms.append(_term(match))
        at = match.end()
        if match[0].rstrip().endswith(",") and not text[at:].strip():
            raise _refusal("a comma at the end")
    return Selector(tuple(terms))


def _term(match: "re.Match[str]") -> Term:
    if match["absent"]:
        return Term(match["no"], frozenset(), negated=True)
    if match["list"]:
        values = [value.strip() for value in match["values"].split(",")]
        if not all(re.fullmatch(_VALUE, value) for value in values):
            raise _refusal(match[0].strip())
        return Term(match["key"], frozenset(values), negated=match["list"] == "notin")
    if match["sign"]:
        return Term(match["key"], frozenset((match["value"],)), negated=match["sign"] == "!=")
    return Term(match["key"], frozenset(), negated=False)


def _refusal(got: str, expected: str = "such as site=north,line in (1,2),!canary") -> InputError:
    return InputError("rollout.bad_selector", "This is no selector of labels.", expected=expected, got=got)

"""Errors of both sides: one family per recovery action, a stable dotted `code`, and what was expected and got.

The family says who must act; the code says what happened and travels in messages, API answers and logs.
"""

from typing import Any

from models.text import mask


class SortlineError(Exception):
    """Root of all our errors; raise one of its families.

    Args:
        code: Stable dotted name, such as `bundle.wrong_digest`.
        message: One sentence for a person: what happened and what to do.
        expected: What would have been right.
        got: What came instead.
        context: Further facts by name (path, agent, ...).
    """

    def __init__(
        self, code: str, message: str, *, expected: object = None, got: object = None, **context: object
    ) -> None:
        self.code = code
        self.message = mask(message)
        self.expected = expected
        self.got = got
        self.context = context
        parts = [message]
        facts = [f"{word} {value}" for word, value in (("expected", expected), ("got", got)) if value is not None]
        if facts:
            parts.append(f"({', '.join(facts)})")
        # All errors pass here on their way to logs, reports and answers: addresses lose their secrets.
        super().__init__(mask(" ".join(parts)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross process borders (training workers): rebuild from the parts, not from the text."""
        return (_rebuild, (type(self), self.code, self.message, self.expected, self.got, self.context))

    def as_dict(self) -> dict[str, object]:
        """Returns the error as it travels in API answers and reports."""
        facts: dict[str, object] = {"code": self.code, "message": self.message}
        if self.expected is not None:
            facts["expected"] = mask(str(self.expected))
        if self.got is not None:
            facts["got"] = mask(str(self.got))
        facts.update({key: mask(str(value)) for key, value in self.context.items()})
        return facts


def _rebuild(
    kind: type[SortlineError],
    code: str,
    message: str,
    expected: object,
    got: object,
    context: dict[str, object],
) -> SortlineError:
    return kind(code, message, expected=expected, got=got, **context)


class InputError(SortlineError):
    """The caller must correct what was given: an argument, a data set, an uploaded file."""


class ConfigError(SortlineError):
    """The operator must correct the configuration before the program can start."""


class BundleError(SortlineError):
    """The bundle must not be used: keep the one that runs, block this digest, report."""


class TrustError(SortlineError):
    """What was offered is not proven: change nothing, keep what runs, report; somebody must sign or set the clock."""


class MessageError(SortlineError):
    """Drop this message, count it, go on."""


class CameraError(SortlineError):
    """The frame source gave no usable frame: apply the fail-safe, reopen."""


class UnavailableError(SortlineError):
    """Something outside is not there now (broker, database, device): try again later."""


class CapacityError(SortlineError):
    """A budget is used up (disk, queue, memory): make room before going on."""


class ConflictError(SortlineError):
    """The thing is in a state that does not allow this: look at its state, then decide."""

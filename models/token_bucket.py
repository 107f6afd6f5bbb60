"""A token bucket: how much may be moved now so that a rate is kept on average."""

from collections.abc import Callable


class TokenBucket:
    """Tokens flow in at a rate and are taken as they are needed.

    Law: what is taken in any span of t seconds is at most `burst + rate * t`, but for the last taking.

    Args:
        rate: Tokens per second.
        burst: Most tokens it holds; it starts full.
        clock: Monotonic seconds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._level, self._at_s = burst, clock()

    def take(self, amount: float) -> bool:
        """Takes tokens when there are any; a large amount is owed and waited for afterwards."""
        self._refill()
        if self._level <= 0.0:
            return False
        self._level -= amount
        return True

    def charge(self, amount: float) -> float:
        """Takes tokens whether there are any or not, for what has already happened.

        Returns:
            Seconds until what is owed has flowed in again; 0.0 = nothing is owed.
        """
        self._refill()
        self._level -= amount
        return max(0.0, -self._level / self._rate)

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at_s) * self._rate)
        self._at_s = now

    @property
    def wait_s(self) -> float:
        """Seconds until something can be taken, as of the last look; always positive, so that waiting ends."""
        return max(0.0, -self._level / self._rate) + 0.001

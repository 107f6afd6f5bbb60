"""A short seeded run of the chaos suite: the long one is `make chaos`."""

from pathlib import Path

import pytest

from tests.chaos.run import Chaos


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded", pytest.param("mosquitto", marks=pytest.mark.mosquitto)])
def test_the_books_balance_after_random_faults(tmp_path: Path, kind: str) -> None:
    outcome = Chaos(tmp_path, kind, agents=20, seed=7).run(25.0)
    assert outcome.ok, outcome
    assert sum(outcome.faults.values()) >= 5
    assert outcome.counts["records produced by light agents"] > 200

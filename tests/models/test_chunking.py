"""Cutting: a function of the content alone, whose chunks survive insertions elsewhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bundle import sha256
from models.chunking import CHUNK_BYTES, SHORTEST, cut
from models.token_bucket import TokenBucket

NOISE = np.random.default_rng(1).bytes(6_000_000)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 400_000), st.integers(0, 5_000_000), st.booleans())
def test_the_chunks_joined_are_the_data_and_have_their_sizes(size: int, start: int, flat: bool) -> None:
    data = bytes(size) if flat else NOISE[start : start + size]
    chunks = list(cut(data))
    assert b"".join(chunks) == data
    assert all(SHORTEST <= len(chunk) <= CHUNK_BYTES for chunk in chunks[:-1])
    assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in chunks[-1:])


@pytest.mark.parametrize("at", [0, 1_000_000, 3_333_333, 5_999_999])
@pytest.mark.parametrize("inserted", [b"x", b"a new head" * 1000])
def test_an_insertion_makes_only_the_chunks_around_it_new(at: int, inserted: bytes) -> None:
    before = {sha256(chunk) for chunk in cut(NOISE)}
    after = list(cut(NOISE[:at] + inserted + NOISE[at:]))
    new = [chunk for chunk in after if sha256(chunk) not in before]
    assert 1 <= len(new) <= 6
    assert len(after) > 70


def test_blocks_of_the_computation_leave_no_trace() -> None:
    """The hash is computed block by block: a cut near a block's border is where it is without blocks."""
    import models.chunking as module

    whole = module._rolling(np.frombuffer(NOISE[: 3 << 20], np.uint8))
    expected = np.flatnonzero(whole < np.uint32(2**17)) + 1
    assert np.array_equal(module._candidates(NOISE[: 3 << 20]), expected)
    assert len(expected) > 50


def test_the_rolling_hash_is_the_documented_sum() -> None:
    import models.chunking as module

    raw = np.frombuffer(NOISE[:100], np.uint8)
    hashed = module._rolling(raw)
    for i in (0, 5, 31, 32, 99):
        terms = [int(module._GEAR[raw[i - k]]) << k for k in range(min(i + 1, 32))]
        assert int(hashed[i]) == sum(terms) % 2**32


@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 50)), max_size=60))
def test_a_bucket_never_exceeds_burst_and_rate(steps: list[tuple[float, int]]) -> None:
    now, taken, largest = 0.0, 0.0, 0
    bucket = TokenBucket(10.0, 40.0, lambda: now)
    for wait, amount in steps:
        now += wait
        if bucket.take(amount):
            taken += amount
            largest = max(largest, amount)
        assert taken <= 40.0 + 10.0 * now + largest + 1e-6


def test_an_empty_bucket_gives_the_time_to_wait() -> None:
    now = 0.0
    bucket = TokenBucket(10.0, 40.0, lambda: now)
    assert bucket.take(90)
    assert not bucket.take(1)
    now += bucket.wait_s + 0.01
    assert bucket.take(1)


def test_a_charged_bucket_owes_what_it_did_not_hold() -> None:
    now = 0.0
    bucket = TokenBucket(10.0, 10.0, lambda: now)
    assert bucket.charge(10.0) == 0.0
    assert bucket.charge(5.0) == pytest.approx(0.5)
    now = 2.0
    assert bucket.charge(0.0) == 0.0

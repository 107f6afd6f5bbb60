"""Lanes, scalars and the camera's figures add exactly, refuse contradictions and stay small; old windows decode."""

import statistics
import zlib
from collections import Counter
from functools import reduce
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import MessageError
from models.histogram import Histogram, pack_counts, unpack_counts
from models.messages import Batch, Record, RecordKind, encode_batch
from models.profile import BINS
from models.statistics import Moments
from models.windows import DIRT_COLUMNS, DIRT_ROWS, QUANTITIES, CameraCounts, LaneCounts, Window, merge

GOLDEN = Path(__file__).parents[1] / "golden"
FEATURES, LANES = 3, 4
MOST = Moments(1, 3_000_000_000, 9 * 10**18)
Item = tuple[int, str, str, str, tuple[int, ...], int | None]
"""Lane, class, grade, outlet, bin of each feature (-1 = not known), bin of the weight."""

items = st.lists(
    st.tuples(
        st.integers(0, LANES - 1),
        st.sampled_from(("sound", "rot", "worm")),
        st.sampled_from(("good", "unsure", "bad")),
        st.sampled_from(("pass", "reject")),
        st.tuples(*(st.integers(-1, BINS - 1) for _ in range(FEATURES))),
        st.none() | st.integers(0, BINS - 1),
    ),
    max_size=25,
)
looks = st.lists(
    st.tuples(
        st.tuples(*(st.floats(-300.0, 300.0) for _ in QUANTITIES)),
        st.sets(st.integers(0, DIRT_ROWS * DIRT_COLUMNS - 1), max_size=4),
        st.booleans(),
    ),
    max_size=6,
)


def bins_of(found: list[int | None]) -> dict[str, tuple[int, ...]]:
    counts = np.bincount([b for b in found if b is not None], minlength=BINS)
    return {"weight_g": tuple(int(n) for n in counts)} if counts.any() else {}


def features_of(found: list[Item], features: int = FEATURES) -> tuple[np.ndarray, tuple[int, ...]]:
    counts = np.zeros((features, BINS), np.int64)
    for item in found:
        for row, at in enumerate(item[4]):
            if at >= 0:
                counts[row, at] += 1
    return counts, tuple(int(len(found) - row.sum()) for row in counts)


def lane_of(found: list[Item], features: int = FEATURES) -> LaneCounts:
    if not found:
        return LaneCounts()
    counts, nulls = features_of(found, features)
    return LaneCounts(
        items=len(found),
        classes=Counter(i[1] for i in found),
        grades=Counter(i[2] for i in found),
        outlets=Counter(i[3] for i in found),
        features=pack_counts(counts),
        nulls=nulls,
        scalars=bins_of([i[5] for i in found]),
    )


def camera_of(found: list[Any]) -> CameraCounts:
    camera = CameraCounts()
    for values, dirty, outside in found:
        grid = np.zeros(DIRT_ROWS * DIRT_COLUMNS, np.int64)
        grid[sorted(dirty)] = 1
        one = CameraCounts(
            looks=1,
            repeated=3 * outside,
            dirt_looks=1,
            dirt=pack_counts(grid) if dirty else b"",
            outside={"dirt": 1} if outside else {},
            levels={"exposure": 40_000},
        )
        moments: dict[str, Any] = {name: Moments.of(value) for name, value in zip(QUANTITIES, values, strict=True)}
        camera = camera.merged(msgspec.structs.replace(one, **moments))
    return camera


def window_of(found: list[Item], seen: list[Any], features: int = FEATURES, lanes: int = LANES) -> Window:
    counts, nulls = features_of(found, features)
    by_lane = tuple(lane_of([i for i in found if i[0] == lane], features) for lane in range(lanes))
    return Window(
        started_ms=1000,
        duration_ms=10_000,
        bundle="ab" * 32,
        items=len(found),
        lanes=tuple(lane.items for lane in by_lane),
        by_lane=by_lane,
        classes=Counter(i[1] for i in found),
        grades=Counter(i[2] for i in found),
        outlets=Counter(i[3] for i in found),
        features=counts.astype("<u4").tobytes(),
        nulls=nulls,
        scalars=bins_of([i[5] for i in found]),
        camera_health=camera_of(seen),
    )


def total_of(parts: list[Window]) -> Window:
    return msgspec.structs.replace(reduce(merge, parts), duration_ms=10_000)


@settings(max_examples=40)
@given(items, looks, st.lists(st.integers(0, 25), max_size=4), st.randoms(use_true_random=False))
def test_any_partition_of_the_items_gives_the_window_of_the_whole(
    found: list[Item], seen: list[Any], cuts: list[int], random: Any
) -> None:
    edges = [0, *sorted(min(cut, len(found)) for cut in cuts), len(found)]
    camera = [0, *sorted(min(cut, len(seen)) for cut in cuts), len(seen)]
    parts = [window_of(found[a:b], seen[c:d]) for a, b, c, d in zip(edges, edges[1:], camera, camera[1:], strict=False)]
    whole = window_of(found, seen)
    whole.check()
    random.shuffle(parts)
    from_left = total_of(parts)
    from_right = msgspec.structs.replace(reduce(lambda a, b: merge(b, a), reversed(parts)), duration_ms=10_000)
    assert from_left == from_right == whole
    from_left.check()
    assert msgspec.msgpack.encode(from_left.by_lane[0]) is not None
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(from_left), type=Window) == from_left


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_packed_counts_come_back_in_the_smallest_width(counts: list[int]) -> None:
    packed = pack_counts(np.asarray(counts))
    assert unpack_counts(packed, len(counts)).tolist() == counts
    width = 1 if max(counts) < 256 else 2 if max(counts) < 65536 else 4
    assert len(packed) == width * len(counts)


@given(st.lists(st.floats(-1e4, 1e4), max_size=30), st.lists(st.floats(-1e4, 1e4), max_size=30))
def test_moments_add_in_any_order_and_are_those_of_the_measurements(a: list[float], b: list[float]) -> None:
    whole = reduce(Moments.__add__, map(Moments.of, (*a, *b)), Moments())
    one, two = (reduce(Moments.__add__, map(Moments.of, part), Moments()) for part in (a, b))
    assert one + two == two + one == whole
    assert whole.possible
    if a or b:
        thousandths = [round(value * 1000.0) for value in (*a, *b)]
        assert whole.mean * 1000.0 == pytest.approx(statistics.mean(thousandths), rel=1e-9)
        assert whole.deviation * 1000.0 == pytest.approx(statistics.pstdev(thousandths), rel=1e-9)


def test_a_sum_knows_its_lanes_only_where_every_part_does() -> None:
    known = window_of([(0, "sound", "good", "pass", (1, 2, 3), 4)], [])
    older = msgspec.structs.replace(known, by_lane=())
    idle = Window(started_ms=0, duration_ms=1, bundle="ab" * 32)
    for a, b in ((known, older), (older, known)):
        added = merge(a, b)
        added.check()
        assert added.by_lane == ()
        assert added.lanes == (2, 0, 0, 0)
    assert merge(known, idle).by_lane == merge(idle, known).by_lane == known.by_lane
    merge(known, idle).check()


SOME: list[Item] = [
    (0, "sound", "good", "pass", (1, 2, 3), 4),
    (0, "rot", "bad", "reject", (1, -1, 3), None),
    (2, "sound", "unsure", "pass", (9, 2, 15), 4),
]
LOOKS: list[Any] = [((1.0,) * 7, {5}, True), ((1.1,) * 7, set(), False)]


def lane_changed(**changes: Any) -> dict[str, Any]:
    first, *rest = window_of(SOME, []).by_lane
    return {"by_lane": (msgspec.structs.replace(first, **changes), *rest)}


def camera_changed(**changes: Any) -> dict[str, Any]:
    return {"camera_health": msgspec.structs.replace(camera_of(LOOKS), **changes)}


@pytest.mark.parametrize(
    "change",
    [
        {"by_lane": window_of(SOME, []).by_lane[:3]},
        {"by_lane": (LaneCounts(),) * 4},
        lane_changed(items=1),
        lane_changed(classes={"sound": 2}),
        lane_changed(classes={"sound": 1, "rot": 2}),
        lane_changed(outlets={}),
        lane_changed(grades={"good": 2}),
        lane_changed(scalars={}),
        lane_changed(scalars={"length_mm": (0,) * 15 + (1,)}),
        lane_changed(features=b"123"),
        lane_changed(features=bytes(3 * BINS), nulls=(2, 2, 2)),
        lane_changed(nulls=(0, 1)),
        lane_changed(features=b"", nulls=()),
        {"by_lane": (*window_of(SOME, []).by_lane[:3], LaneCounts(features=b"\1" * 48, nulls=(0, 0, 0)))},
        {"scalars": {"weight_g": (4,) + (0,) * 15}},
        camera_changed(looks=1),
        camera_changed(sharpness=Moments(2, 4000, 7)),
        camera_changed(exposure=Moments(0, 5, 0)),
        camera_changed(dirt=b"\3" + bytes(191)),
        camera_changed(dirt=b"\1" * 20),
        camera_changed(dirt_looks=0),
        camera_changed(dirt_looks=3),
        camera_changed(outside={"exposure": 3}),
    ],
)
def test_a_window_whose_lanes_or_looks_contradict_it_is_refused(change: dict[str, Any]) -> None:
    window = window_of(SOME, LOOKS)
    window.check()
    with pytest.raises(MessageError) as caught:
        msgspec.structs.replace(window, **change).check()
    assert caught.value.code == "window.inconsistent"


@pytest.mark.parametrize(
    "wire",
    [
        {"scalars": {"weight_g": [1, 2]}},
        {"by_lane": [{"items": -1}]},
        {"by_lane": [{}] * 65},
        {"camera_health": {"looks": "many"}},
        {"camera_health": {"exposure": [1, 2**63, 3]}},
        {"camera_health": {"dirt": b"1" * 1000}},
    ],
)
def test_what_is_out_of_bounds_on_the_wire_is_no_window(wire: dict[str, Any]) -> None:
    data = msgspec.msgpack.encode({"started_ms": 1, "duration_ms": 1, "bundle": ""} | wire)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(data, type=Window)


def test_a_window_whose_lanes_count_other_features_than_the_line_does_not_add() -> None:
    a = window_of(SOME, [])
    b = msgspec.structs.replace(a, by_lane=(*window_of([], [], 5).by_lane[:2], lane_of(SOME[:1], 5), LaneCounts()))
    with pytest.raises(MessageError) as caught:
        merge(a, b)
    assert caught.value.code == "window.inconsistent"


def test_looks_that_sum_to_more_than_fits_do_not_add() -> None:
    most = msgspec.structs.replace(window_of(SOME, LOOKS), camera_health=CameraCounts(looks=1, exposure=MOST))
    most.check()
    with pytest.raises(MessageError, match="more than fits"):
        merge(most, most)


def golden() -> Window:
    window = window_of(SOME, LOOKS)
    return msgspec.structs.replace(window, lot="B-1182", variety="gala", latency_ms=Histogram(buckets={25: 3}))


def test_the_golden_window_is_what_this_program_writes_and_reads() -> None:
    data = (GOLDEN / "window-v1-lanes.msgpack").read_bytes()
    assert msgspec.msgpack.encode(golden()) == data
    assert msgspec.msgpack.decode(data, type=Window) == golden()


def test_a_window_of_an_agent_that_counts_no_lanes_decodes_and_adds() -> None:
    old = msgspec.msgpack.decode((GOLDEN / "window-v1-line.msgpack").read_bytes(), type=Window)
    old.check()
    assert (old.items, old.by_lane, old.scalars, old.camera_health) == (4, (), {}, CameraCounts())
    doubled = merge(old, old)
    doubled.check()
    assert (doubled.items, doubled.by_lane) == (8, ())


def test_a_control_plane_that_knows_no_lanes_reads_a_new_window() -> None:
    names = [f for f in Window.__struct_fields__ if f not in {"by_lane", "scalars", "camera_health"}]
    older: Any = msgspec.defstruct("Older", [(name, Any, None) for name in names])
    read = msgspec.msgpack.decode(msgspec.msgpack.encode(golden()), type=older)
    assert (read.schema_version, read.items, read.classes) == (1, 3, {"sound": 2, "rot": 1})


def busy_window(seed: int, per_lane: int) -> Window:
    """A window of 16 features and 4 lanes with the counts of real work: correlated features, most of them central."""
    rng = np.random.default_rng(seed)
    found: list[Item] = []
    for lane in range(LANES):
        for _ in range(per_lane):
            centre = rng.normal(8.0, 2.0)
            at = np.clip(np.round(rng.normal(centre, 3.5, 16)), 0, 15).astype(int)
            defect = rng.random() < 0.2
            kind = str(rng.choice(["rot", "worm", "bruise", "scab"])) if defect else "sound"
            found.append(
                (
                    lane,
                    kind,
                    "unsure" if rng.random() < 0.05 else "good",
                    "reject" if defect else "pass",
                    tuple(int(b) for b in at),
                    int(rng.integers(0, 16)),
                )
            )
    centres, spreads = (4.1, 40.0, 0.95, 1.06, 0.01, 0.0, 0.0), (0.05, 0.6, 0.004, 0.004, 0.003, 0.1, 0.1)
    seen = [(tuple(rng.normal(centres, spreads)), {5, 6, 21, 22}, False) for _ in range(10)]
    latencies = Histogram()
    for value in rng.lognormal(2.0, 0.4, per_lane * LANES):
        latencies.add(float(value))
    return msgspec.structs.replace(
        window_of(found, seen, 16),
        latency_ms=latencies,
        inference_ms=latencies,
        jitter_ms=latencies,
        frames=300,
        views=per_lane * 24,
        shots={"fired": per_lane},
        ejectors={f"{lane}/reject/{what}": 20 for lane in range(4) for what in ("fired", "confirmed")},
        lead_ms={f"{lane}/reject": 12.345 for lane in range(4)},
        lifetime_items=123_456,
    )


@pytest.mark.parametrize("per_lane", [5, 50, 100])
def test_a_window_of_four_lanes_and_sixteen_features_takes_less_than_two_kilobytes(per_lane: int) -> None:
    for seed in range(3):
        window = busy_window(seed, per_lane)
        window.check()
        data = msgspec.msgpack.encode(window)
        record = Record(boot_id="0" * 16, seq=7, kind=RecordKind.WINDOW, payload=data)
        assert len(encode_batch(Batch(records=(record,)))) < 2048
        assert len(zlib.compress(data, 6)) < 2048

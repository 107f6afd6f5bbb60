"""Which lot runs: the newest request counts, late and repeated ones change nothing, and power cuts lose none."""

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.cli.commands import main
from edge_agent.line_protocol import Beat
from edge_agent.state_directory import StateDirectory
from edge_agent.supervisor.lots import (
    MAX_LIFE_MS,
    PAUSE_S,
    Lots,
    LotState,
    accept,
    lot_file,
    submit_lot_request,
)
from models.errors import InputError, MessageError
from models.messages import CLOCK_SLACK_MS, Command, CommandKind, Live, LotSource, Response, encode
from tests.simulators.power import Recorder, states

NOW = 1_790_000_000_000


def command(number: int = 1, *, issued: int = NOW, life: int = 60_000, lot: str = "", variety: str = "gala") -> Command:
    return Command(
        request_id=f"{number:032x}",
        issued_at_ms=issued,
        expires_at_ms=issued + life,
        kind=CommandKind.SET_LOT,
        lot=lot or f"lot-{number}",
        variety=variety,
    )


class Host:
    """A supervisor without processes; what the line hears must be on the disk by then."""

    def __init__(self, root: Path) -> None:
        self.root, self.places = root, StateDirectory(root)
        self.counters: Counter[str] = Counter()
        self.lots: list[tuple[str, str]] = []
        self.answers: list[Response] = []
        self.events: list[str] = []

    def event(self, code: str, message: str, **facts: str) -> None:
        self.events.append(code)

    def set_lot(self, lot: str, variety: str) -> None:
        kept = lot_file(self.root).read()
        assert (kept.lot, kept.variety) == (lot, variety), "the line was given a lot that a power cut would lose"
        self.lots.append((lot, variety))

    def respond(self, response: Response) -> None:
        self.answers.append(response)

    def report(self) -> None:
        return


class Clock:
    def __init__(self) -> None:
        self.ms = NOW

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lots_of(
    host: Host, configured: tuple[str, str], wall_ms: Clock, clock: Callable[[], float], **options: bool
) -> Lots:
    return Lots(
        host.root,
        configured,
        host,
        set_lot=lambda lot, variety: host.set_lot(lot, variety),  # noqa: PLW0108  a test replaces it later
        respond=host.respond,
        wall_ms=wall_ms,
        clock=clock,
        **options,
    )


def opened(host: Host, clock: Clock, configured: tuple[str, str] = ("", ""), **options: bool) -> Lots:
    """The lots of a host, where commands come as seldom as they may."""
    steps = count()
    return lots_of(host, configured, clock, lambda: next(steps) * PAUSE_S, **options)


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "late_ms", "code"),
    [
        (command(), 60_001, "command.expired"),
        (command(), -CLOCK_SLACK_MS - 1, "command.from_future"),
        (command(life=0), 0, "command.bad_times"),
        (command(life=-5), 0, "command.bad_times"),
        (command(life=MAX_LIFE_MS + 1), 0, "command.bad_times"),
        (command(9, issued=NOW - 30_000), 0, "command.overtaken"),
        (command(9, issued=NOW - 20_000), 0, "command.overtaken"),
    ],
)
def test_a_command_that_must_not_count_is_refused_by_name_and_answered(
    host: Host, clock: Clock, sent: Command, late_ms: int, code: str
) -> None:
    lots = opened(host, clock)
    lots.command(encode(command(8, issued=NOW - 20_000)))
    before, clock.ms = lots.state, NOW + late_ms
    with pytest.raises(MessageError) as caught:
        lots.command(encode(sent))
    assert caught.value.code == code
    assert host.answers[-1].fault.code == code
    assert host.answers[-1].request_id == sent.request_id
    assert lots.state == before == lot_file(host.root).read()
    assert host.lots == [("lot-8", "gala")]


def test_a_clock_that_is_off_by_less_than_the_slack_is_accepted(host: Host, clock: Clock) -> None:
    for number, off_ms in enumerate((-CLOCK_SLACK_MS, 0, 60_000)):
        clock.ms = NOW + off_ms + number
        opened(host, clock).command(encode(command(number, issued=NOW + number)))
    assert len(host.lots) == 3


def test_a_repeated_command_is_confirmed_again_and_does_nothing_again(host: Host, clock: Clock) -> None:
    lots = opened(host, clock)
    lots.command(encode(command(1)))
    lots.command(encode(command(2, issued=NOW + 1)))
    clock.ms += 120_000  # long expired, but it was applied before
    opened(host, clock).command(encode(command(1)))
    assert [answer.fault for answer in host.answers] == [None, None, None]
    assert host.lots == [("lot-1", "gala"), ("lot-2", "gala")]
    assert lot_file(host.root).read().lot == "lot-2"


@given(st.permutations(range(6)), st.lists(st.integers(0, 5), max_size=12), st.integers(0, 70_000))
def test_the_command_that_was_issued_last_wins_in_whatever_order_they_come(
    order: list[int], repeats: list[int], pause_ms: int
) -> None:
    state, now, heard, codes = LotState(), NOW + 6, [], set()
    for number in (*order, *repeats):
        sent = command(number, issued=NOW + number)
        try:
            after = accept(state, sent, now)
        except MessageError as error:
            codes.add(error.code)
        else:
            assert after.issued_at_ms >= state.issued_at_ms
            assert (after is state) == (sent.request_id in state.requests)
            state = after
            heard.append(number)
        now += pause_ms // 10
    assert codes <= {"command.overtaken", "command.expired"}
    assert state.lot == f"lot-{max(heard)}"


def test_a_flood_of_commands_is_no_flood_of_writes_and_windows(host: Host, clock: Clock) -> None:
    now_s = [100.0]
    lots = lots_of(host, ("", ""), clock, lambda: now_s[0])
    lots.command(encode(command(1)))
    now_s[0] += PAUSE_S / 2
    with pytest.raises(MessageError) as caught:
        lots.command(encode(command(2, issued=NOW + 1)))
    assert caught.value.code == host.answers[-1].fault.code == "command.too_soon"
    lots.command(encode(command(1)))  # a repetition writes nothing, so it is answered
    now_s[0] += PAUSE_S / 2
    lots.command(encode(command(2, issued=NOW + 1)))
    assert host.lots == [("lot-1", "gala"), ("lot-2", "gala")]


def test_a_command_accepted_with_both_clocks_years_ahead_does_not_block_later_ones(host: Host, clock: Clock) -> None:
    ahead = 10 * 365 * 86_400_000
    clock.ms += ahead
    opened(host, clock).command(encode(command(1, issued=NOW + ahead)))
    clock.ms = NOW
    opened(host, clock).command(encode(command(2)))
    assert lot_file(host.root).read().lot == "lot-2"


def test_an_agent_may_take_its_lot_from_the_line_alone(host: Host, clock: Clock) -> None:
    lots = opened(host, clock, commands=False)
    with pytest.raises(MessageError, match="line alone"):
        lots.command(encode(command()))
    assert host.answers[0].fault.code == "command.not_allowed"
    submit_lot_request(host.root, "B-7", "gala", "e" * 32)
    lots.tick()
    assert host.lots == [("B-7", "gala")]


@pytest.mark.parametrize("payload", [b"", b"{}", b"x" * 9000, encode(command()).replace(b"set-lot", b"set-belt")])
def test_a_malformed_command_is_not_answered(host: Host, clock: Clock, payload: bytes) -> None:
    with pytest.raises(MessageError, match="Command"):
        opened(host, clock).command(payload)
    assert host.answers == []


def test_the_same_lot_named_again_goes_on_since_it_began(host: Host, clock: Clock) -> None:
    lots = opened(host, clock)
    lots.command(encode(command(1, lot="A")))
    clock.ms += 5000
    lots.command(encode(command(2, issued=NOW + 5000, lot="A")))
    assert (lots.state.since_ms, lots.state.issued_at_ms) == (NOW, NOW + 5000)
    assert host.lots == [("A", "gala")], "a bundle that waits for a lot change must not take this for one"
    assert host.events == ["lot.changed"]


def test_a_full_disk_changes_nothing_and_the_operators_request_waits(
    host: Host, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lots = opened(host, clock)
    submit_lot_request(host.root, "B-7", "gala", "e" * 32)
    with monkeypatch.context() as patch:
        patch.setattr(
            "edge_agent.delivery.state_file.write_atomically", lambda *_: (_ for _ in ()).throw(OSError(28, "No space"))
        )
        for attempt in (lots.tick, lambda: lots.command(encode(command()))):
            with pytest.raises(OSError, match="No space"):
                attempt()
    assert (host.lots, host.answers, lots.state) == ([], [], LotState())
    lots.tick()
    assert host.lots == [("B-7", "gala")]


# -- the operator -----------------------------------------------------------------------------------------------------


def test_the_operators_request_counts_with_any_clock_and_later_commands_count(host: Host, clock: Clock) -> None:
    lots = opened(host, clock)
    lots.command(encode(command(1)))
    clock.ms = 0  # no battery: 1970
    submit_lot_request(host.root, "B-7", "", "e" * 32)
    lots.tick()
    assert (lots.state.lot, lots.state.source) == ("B-7", LotSource.OPERATOR)
    clock.ms = NOW + 9
    lots.command(encode(command(2, issued=NOW + 9)))
    assert (lots.state.lot, lots.state.source) == ("lot-2", LotSource.CONTROL_PLANE)
    assert not any(path.exists() for path in (host.places.lot_request, host.places.lot_taken))


def test_a_request_written_while_another_is_read_is_not_lost(host: Host, clock: Clock) -> None:
    lots = opened(host, clock)
    submit_lot_request(host.root, "B-7", "gala", "e" * 32)
    heard = host.set_lot

    def says_another(lot: str, variety: str) -> None:
        heard(lot, variety)
        host.set_lot = heard
        submit_lot_request(host.root, "B-8", "gala", "f" * 32)

    host.set_lot = says_another
    lots.tick()
    lots.tick()
    assert host.lots == [("B-7", "gala"), ("B-8", "gala")]


def test_a_request_that_returns_after_a_power_cut_is_not_applied_twice(host: Host, clock: Clock) -> None:
    lots = opened(host, clock)
    submit_lot_request(host.root, "B-7", "gala", "e" * 32)
    said = host.places.lot_request.read_bytes()
    lots.tick()
    lots.command(encode(command(2)))
    host.places.lot_taken.write_bytes(said)
    opened(host, clock).tick()
    assert lot_file(host.root).read().lot == "lot-2"
    assert not host.places.lot_taken.exists()


@pytest.mark.parametrize("rubbish", [b"", b"\xff", b"x" * 20_000, msgspec.json.encode({"lot": "A", "variety": "b"})])
def test_a_broken_request_is_reported_once_and_removed(host: Host, clock: Clock, rubbish: bytes) -> None:
    lots = opened(host, clock)
    host.places.lot_request.write_bytes(rubbish)
    for _ in range(3):
        lots.tick()
    assert (host.events, host.counters["refused_lot.unreadable"], host.lots) == (["lot.unreadable"], 1, [])


@pytest.mark.parametrize("lot", ["a\nb", "x" * 65, "\x00", "\u2028"])
def test_an_invalid_name_is_refused_before_it_is_written(tmp_path: Path, lot: str) -> None:
    with pytest.raises(InputError) as caught:
        submit_lot_request(tmp_path, lot, "gala", "e" * 32)
    assert caught.value.code == "lot.bad_name"
    assert list(tmp_path.iterdir()) == []


def test_the_command_at_the_line_leaves_the_request_and_shows_it(host: Host, clock: Clock, capsys) -> None:
    state_dir = ["--state-dir", str(host.root)]
    assert main(["lot", *state_dir]) == 2
    assert "agent.no_state" in capsys.readouterr().err
    (host.root / "lock").touch()
    assert main(["lot", *state_dir, "--lot", "B-7"]) == 2
    assert "--variety" in capsys.readouterr().err
    submit_lot_request(host.root, "B-7", "gala", "e" * 32)
    opened(host, clock).tick()
    assert main(["lot", *state_dir, "--json"]) == 0
    shown = msgspec.json.decode(capsys.readouterr().out)
    assert (shown["lot"], shown["variety"], shown["source"], shown["terms"]) == (
        "B-7",
        "gala",
        "operator",
        "no bundle judges",
    )


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_the_configured_lot_counts_until_a_lot_is_named_and_again_after_a_change(host: Host, clock: Clock) -> None:
    lots = opened(host, clock, ("A", "gala"))
    assert (lots.state.lot, lots.state.source) == ("A", LotSource.CONFIGURATION)
    lots.command(encode(command(1)))
    assert opened(host, clock, ("A", "gala")).state.lot == "lot-1"
    clock.ms += 1000
    again = opened(host, clock, ("B", "fuji")).state
    assert (again.lot, again.variety, again.source, again.since_ms) == (
        "B",
        "fuji",
        LotSource.CONFIGURATION,
        NOW + 1000,
    )
    assert again.issued_at_ms == NOW, "an older command must not come after"
    clock.ms += 1000
    assert opened(host, clock, ("B", "fuji")).state == again


@pytest.mark.parametrize("harm", [lambda d: d[:-9], lambda d: d.replace(b"lot-1", b"lot-7"), lambda _: b"\xff"])
def test_a_broken_file_is_set_aside_and_the_configuration_counts(host: Host, clock: Clock, harm) -> None:
    opened(host, clock, ("A", "")).command(encode(command(1)))
    path = host.places.lot
    path.write_bytes(harm(path.read_bytes()))
    lots = opened(host, clock, ("A", ""))
    assert (lots.state.lot, host.events[-1]) == ("A", "state.quarantined")
    assert len(list(host.root.glob("lot.json.broken-*"))) == 1


def test_a_power_cut_anywhere_loses_neither_the_lot_of_the_line_nor_a_request(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "agent"
    root.mkdir()
    host = Host(root)
    lots = opened(host, clock)
    lots.command(encode(command(1)))
    with monkeypatch.context() as patch:
        recorder = Recorder(root, patch)
        submit_lot_request(root, "B-7", "gala", "e" * 32)
        recorder.mark("said")
        lots.tick()
        recorder.mark("B-7")
        lots.command(encode(command(2, issued=NOW + 1)))
        recorder.mark("lot-2")
    assert {op.kind for op in recorder.ops} >= {"create", "write", "rename", "fsync", "remove"}
    seen = 0
    for cut, disk in states(recorder.begin, recorder.ops):
        place = tmp_path / "after"
        disk.write_to(place)
        facts = {fact for at, fact in recorder.marks if at <= cut}
        after = Host(place)
        found = opened(after, clock)
        found.tick()
        assert after.events in ([], ["lot.changed"]), "a file is broken"
        allowed = {"lot-2"} if "lot-2" in facts else {"B-7", "lot-2"} if "said" in facts else {"lot-1", "B-7"}
        assert found.state.lot in allowed, (cut, facts)
        seen += 1
        shutil.rmtree(place)
    assert seen > 30


# -- the line ---------------------------------------------------------------------------------------------------------


def test_the_lot_has_begun_when_the_line_says_so(host: Host, clock: Clock) -> None:
    lots = opened(host, clock)
    lots.command(encode(command(1)))
    live = Live(boot_id="0" * 16, at_ms=0)
    beat = Beat(digest="", items_on_bundle=0, belt_running=True, camera_fault="", live=live, terms="variety")
    assert not lots.running(None).begun
    assert (lots.running(beat).begun, lots.running(beat).terms) == (False, "")
    same = msgspec.structs.replace(beat, lot="lot-1", variety="gala")
    assert (lots.running(same).begun, lots.running(same).terms) == (True, "variety")

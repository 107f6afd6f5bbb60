"""A line changes over at a gap, at a lot change or at once, and never later than its deadline."""

from typing import Any, cast

import pytest

from edge_agent.delivery.lifecycle import SlotState, Trigger, advance
from edge_agent.delivery.state_file import champion_file
from edge_agent.line.loader import LoadedJudge, is_due
from edge_agent.line_protocol import Load, Pipe, ToLine
from models.messages import Desired, Swap, decode, encode


@pytest.mark.parametrize(
    ("swap", "within_s", "waited_s", "at_gap", "lot_changed", "due"),
    [
        (Swap.BELT_GAP, None, 0.0, True, False, True),
        (Swap.BELT_GAP, None, 1.9, False, False, False),
        (Swap.BELT_GAP, None, 2.1, False, False, True),
        (Swap.BELT_GAP, 30.0, 2.1, False, False, False),
        (Swap.LOT_CHANGE, 600.0, 599.0, True, False, False),
        (Swap.LOT_CHANGE, 600.0, 601.0, False, False, True),
        (Swap.LOT_CHANGE, None, 3599.0, True, False, False),
        (Swap.LOT_CHANGE, None, 3601.0, False, False, True),
        (Swap.LOT_CHANGE, 600.0, 1.0, True, True, True),
        (Swap.LOT_CHANGE, 600.0, 1.0, False, True, False),
        (Swap.NOW, None, 0.0, False, False, True),
    ],
)
def test_a_bundle_takes_over_when_what_it_waits_for_has_come(
    swap: Swap, within_s: float | None, waited_s: float, at_gap: bool, lot_changed: bool, due: bool
) -> None:
    loaded = LoadedJudge(cast("Any", None), 1.0, 0.0, swap, within_s)
    assert is_due(loaded, waited_s=waited_s, line_within_s=2.0, at_gap=at_gap, lot_changed=lot_changed) is due


def test_the_changeover_travels_from_the_assignment_to_the_line(tmp_path) -> None:
    import socket

    desired = Desired(generation=3, bundle="a" * 64, swap=Swap.LOT_CHANGE, swap_within_s=900.0)
    read = decode(encode(desired), Desired)
    assert read == desired
    state = advance(SlotState(), Trigger.DESIRED, target=read.bundle, swap=read.swap, swap_within_s=read.swap_within_s)
    champion_file(tmp_path).save(state)
    kept = champion_file(tmp_path).load()
    assert (kept.swap, kept.swap_within_s) == (Swap.LOT_CHANGE, 900.0)
    ours, theirs = socket.socketpair()
    sender, receiver = Pipe(ours), Pipe(theirs)
    sender.send(Load(digest="a" * 64, directory="/slots/a", swap=kept.swap, swap_within_s=kept.swap_within_s))
    got = receiver.receive(ToLine, 1.0)
    assert (got.swap, got.swap_within_s) == (Swap.LOT_CHANGE, 900.0)
    for end in (sender, receiver):
        end.close()


def test_an_assignment_of_an_older_control_plane_changes_over_at_a_gap() -> None:
    old = decode(b'{"schema_version":1,"generation":1,"bundle":"%s"}' % (b"a" * 64), Desired)
    assert (old.swap, old.swap_within_s) == (Swap.BELT_GAP, None)

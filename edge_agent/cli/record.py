"""`sortline-agent replay`, `collect` and `picture`: what a line has seen, judged again, kept for training, or drawn."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.cli.options import (
    at_least,
    check_file,
    check_folder,
    config_of,
    end_progress,
    line_options,
    print_facts,
    progress_line,
)

_REPLAY = """Runs a recording (run --record DIR) through the line again, as fast as it goes, and compares all decisions.

With the bundle that judged then, everything must be equal to the last bit: item, position on the belt, class,
outlet, probabilities. If it is not, the differences are listed and the exit status is 1: report that as a bug, with
the recording. With another bundle the answer is a table: what the old one said against what the new one says, on
the same fruit; the exit status is 0.

A recording that was torn by a power cut is replayed up to the tear, and the tear is named. Recordings whose oldest
part was evicted, or that lost frames, replay exactly too: each segment begins with the state of the line.
"""
_REPLAY_EPILOG = """examples:
  sortline-agent replay REC                        with the bundle it was recorded with, if it is still there
  sortline-agent replay REC --bundle old-bundle    the same, the bundle is elsewhere now
  sortline-agent replay REC --bundle new-bundle    a new model on yesterday's fruit
  sortline-agent replay REC --json | jq .exact     for a script
"""


def add_replay(commands: Any) -> None:
    """Adds the subcommand `replay`."""
    replay = commands.add_parser(
        "replay",
        help="judge a recording again: bit-exact with its bundle, a comparison with another",
        description=_REPLAY,
        epilog=_REPLAY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    replay.add_argument("folder", type=Path, metavar="DIR", help="the recording")
    replay.add_argument("--bundle", type=Path, metavar="B", help="judges (default: the recorded bundle, where it was)")
    replay.add_argument("--json", action="store_true", help="print the report as JSON")
    replay.set_defaults(act=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from edge_agent.recording.comparison import replay  # noqa: PLC0415
    from edge_agent.recording.replay import Replay  # noqa: PLC0415

    bundle = arguments.bundle or Replay(arguments.folder).bundle_directory()
    show = progress_line("replaying", "frames")

    def progress(done: int, wanted: int) -> None:
        if done % 10 == 0 or done == wanted:
            show(done, wanted)

    report = replay(arguments.folder, bundle, progress=progress)
    end_progress()
    for torn in report.torn:
        sys.stderr.write(f"torn tail: {torn}\n")
    if arguments.json:
        print_facts(asdict(report), as_json=True)
    else:
        sys.stdout.write("\n".join(report.lines()) + "\n")
    return 1 if report.exact is False else 0


def add_collect(commands: Any) -> None:
    """Adds the subcommand `collect`."""
    collect = commands.add_parser("collect", help="write views for training, from the line's own pipeline")
    line_options(collect)
    collect.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    collect.add_argument("--items", type=at_least(1, int), default=300, help="how many items (default: 300)")
    collect.add_argument("--json", action="store_true")
    collect.set_defaults(act=_collect)


def _collect(arguments: argparse.Namespace) -> int:
    from edge_agent.offline.collect import collect  # noqa: PLC0415

    line = config_of(arguments).line
    check_folder(arguments.output)
    found = collect(line, arguments.output, items=arguments.items, progress=progress_line("collecting", "items"))
    end_progress()
    print_facts(asdict(found), as_json=arguments.json)
    return 0


def add_picture(commands: Any) -> None:
    """Adds the subcommand `picture`."""
    picture = commands.add_parser("picture", help="draw a sheet of the line at work: frames, items, views, verdicts")
    line_options(picture)
    picture.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="judges")
    picture.add_argument("--seconds", type=at_least(0.01), default=6.0, help="of the camera's time (default: 6)")
    picture.add_argument("--output", type=Path, default=Path("line.png"), metavar="FILE", help="default: line.png")
    picture.add_argument("--json", action="store_true")
    picture.set_defaults(act=_picture)


def _picture(arguments: argparse.Namespace) -> int:
    from edge_agent.offline.contact_sheet import write_sheet  # noqa: PLC0415

    # Nothing waits for a picture: recordings and the simulation run as fast as they go.
    line = msgspec.structs.replace(config_of(arguments).line, paced=False)
    check_file(arguments.output)
    facts = write_sheet(line, arguments.bundle, arguments.output, seconds=arguments.seconds)
    print_facts(facts | {"picture": str(arguments.output)}, as_json=arguments.json)
    return 0

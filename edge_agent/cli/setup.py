"""`sortline-agent enrol`, `calibrate` and `import`: what makes a box ready to sort."""

import argparse
import datetime as dt
import sys
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.cli.options import (
    agent_directory,
    at_least,
    check_file,
    check_folder,
    config_of,
    end_progress,
    line_options,
    print_facts,
    progress_line,
)


def add_enrol(commands: Any) -> None:
    """Adds the subcommand `enrol`."""
    enrol = commands.add_parser("enrol", help="get this box's certificate for a one-time token")
    enrol.add_argument("--token", required=True, help="from `sortline agents enrol NAME`; - reads it from the input")
    enrol.add_argument("--control-plane", required=True, metavar="URL", help="https://host:port where agents enrol")
    enrol.add_argument("--config", type=Path, metavar="FILE", help="TOML of the agent")
    enrol.add_argument("--state-dir", metavar="DIR", help="as for run (default: sortline-agent-state)")
    enrol.add_argument("--json", action="store_true")
    enrol.set_defaults(act=_enrol)


def _enrol(arguments: argparse.Namespace) -> int:
    from edge_agent.identity.certificate import identity_folder  # noqa: PLC0415
    from edge_agent.identity.enrolment import enrol  # noqa: PLC0415
    from edge_agent.trust.verifier import places  # noqa: PLC0415

    config = config_of(arguments)
    folder, (_, anchor) = identity_folder(config), places(Path(config.state_dir).resolve(), config.trust)
    # The token serves once: a place that cannot be written must be found out before it is spent.
    check_folder(folder)
    check_folder(anchor.parent)
    token = sys.stdin.readline() if arguments.token == "-" else arguments.token  # noqa: S105  no secret of ours
    facts = enrol(folder, token, arguments.control_plane, anchor=anchor)
    until = dt.datetime.fromtimestamp(facts.not_after_s, dt.UTC).isoformat()
    print_facts({"agent": facts.agent, "identity": str(folder), "until": until}, as_json=arguments.json)
    return 0


def add_calibrate(commands: Any) -> None:
    """Adds the subcommand `calibrate`."""
    parser = commands.add_parser("calibrate", help="learn scale, lanes, direction and speed from the camera")
    line_options(parser)
    parser.add_argument("--checkerboard", metavar="CxR", help="scale from a board with so many inner corners: 9x6")
    parser.add_argument(
        "--square-mm", type=at_least(0.0), default=0.0, metavar="MM", help="edge of one square of the board"
    )
    parser.add_argument("--board-camera", metavar="SOURCE", help="the board is in this picture, folder or video")
    parser.add_argument(
        "--item-mm", type=at_least(0.0), default=0.0, metavar="MM", help="scale from items of this mean diameter"
    )
    parser.add_argument("--frames", type=at_least(1, int), default=450, help="how many frames to watch (default: 450)")
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="of the calibration (default: today, UTC)")
    parser.add_argument("--output", type=Path, default=Path("geometry.toml"), metavar="FILE", help="for --config")
    parser.add_argument("--overlay", type=Path, metavar="FILE", help="picture to look at (default: beside the output)")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(act=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from edge_agent.calibration.calibrate import Target, calibrate, camera_opener, write_calibration  # noqa: PLC0415
    from edge_agent.calibration.scale import parse_pattern  # noqa: PLC0415

    line = config_of(arguments).line
    target = Target(
        pattern=parse_pattern(arguments.checkerboard) if arguments.checkerboard else None,
        square_mm=arguments.square_mm,
        item_mm=arguments.item_mm,
        lanes=arguments.lanes,
    )
    overlay = arguments.overlay or arguments.output.with_suffix(".png")
    for path in (arguments.output, overlay):
        check_folder(path.parent)
        if path.exists():
            check_file(path)
    board = arguments.board_camera and msgspec.structs.replace(line, camera=arguments.board_camera)
    date = arguments.date or dt.datetime.now(dt.UTC).date().isoformat()
    try:
        found, picture = calibrate(
            line,
            target,
            date=date,
            frames=arguments.frames,
            board_opener=camera_opener(board) if board else None,
            progress=progress_line("watching the line:", "frames"),
        )
    finally:
        end_progress()
    write_calibration(found, picture, arguments.output, overlay)
    for note in found.notes:
        sys.stderr.write(f"note: {note}\n")
    facts = msgspec.to_builtins(found) | {"geometry": str(arguments.output), "overlay": str(overlay)}
    print_facts(facts, as_json=arguments.json)
    return 0


def add_import(commands: Any) -> None:
    """Adds the subcommand `import`."""
    stick = commands.add_parser("import", help="take up what `sortline export` wrote: for a line without network")
    stick.add_argument("folder", type=Path, metavar="DIR", help="for example on a stick")
    stick.add_argument("--id", help="agent id")
    stick.add_argument("--config", type=Path, metavar="FILE", help="TOML of the agent")
    stick.add_argument("--state-dir", metavar="DIR", help="of the agent, which may be running")
    stick.add_argument("--json", action="store_true")
    stick.set_defaults(act=_import)


def _import(arguments: argparse.Namespace) -> int:
    """Verifies here, so that the person with the stick gets the answer; then the agent does the rest."""
    from edge_agent.delivery.offline_import import read_export, stage_import  # noqa: PLC0415
    from edge_agent.identity.certificate import with_identity  # noqa: PLC0415
    from edge_agent.trust.verifier import verify_now  # noqa: PLC0415
    from models.offline_export import find_export  # noqa: PLC0415

    config = with_identity(config_of(arguments))
    root = Path(config.state_dir).resolve()
    folder = find_export(arguments.folder, config.id)
    found = read_export(folder)
    check_folder(root)
    facts = verify_now(root, config.trust, config.id, *found)
    desired = stage_import(folder, root)
    shown = {"agent": config.id, "generation": desired.generation, "bundle": desired.bundle}
    print_facts(shown | facts, as_json=arguments.json)
    return 0


def add_relearn_camera(commands: Any) -> None:
    """Adds the subcommand `relearn-camera`."""
    relearn = commands.add_parser(
        "relearn-camera", help="learn again what the belt looks like when all is well; clean the lens before"
    )
    relearn.add_argument("--state-dir", type=Path, default=Path("sortline-agent-state"), help="of the agent")
    relearn.set_defaults(act=_relearn_camera)


def _relearn_camera(arguments: argparse.Namespace) -> int:
    agent_directory(arguments.state_dir).camera_levels.unlink(missing_ok=True)
    return 0

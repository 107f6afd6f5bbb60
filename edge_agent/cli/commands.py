"""The `sortline-agent` command. Data on standard output, everything else on standard error.

Exit status: 0 ok, 1 failed, 2 wrong usage or configuration, 4 something is not reachable, 130 interrupted.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from models.errors import CameraError, ConfigError, SortlineError, UnavailableError

_EPILOG = """examples:
  sortline-agent run --id line-1 --broker 10.0.0.5:1883 --camera /dev/video0
                                        join the fleet: receive bundles, sort, report
  sortline-agent enrol --token T --control-plane https://10.0.0.5:8443
                                        get this box's certificate; run finds it by itself
  sortline-agent run --bundle DIR --camera video.mp4 --unpaced --json
                                        judge a recording with one bundle, alone, every frame
  sortline-agent run --bundle DIR --camera simulated --seconds 30
                                        sort on the simulated line for 30 seconds
  sortline-agent run --bundle DIR --camera /dev/video0 --record REC --record-quota-mb 8000
                                        sort and record: for a bug report, or for tomorrow's model
  sortline-agent replay REC             was it the same, bit by bit? with the bundle that judged
  sortline-agent replay REC --bundle B  what would bundle B have done with that fruit?
  sortline-agent collect --output DIR --items 300
                                        labelled training views from the simulated line
  sortline-agent calibrate --camera line.mp4 --item-mm 75
                                        learn scale, lanes, direction and speed; writes geometry.toml
  sortline-agent picture --bundle DIR --camera line.mp4
                                        see what the line sees and decides; writes line.png
  sortline-agent import /media/stick --id line-1
                                        take up signed metadata, assignment and bundle from a stick
  sortline-agent lot --lot B-1182 --variety gala
                                        another lot runs from now on; needs no network
  sortline-agent selftest DIR           would this machine accept this bundle?
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sortline-agent",
        description="The box beside a sorting line: judges every item, fires ejectors, reports.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="sort: in a fleet (--broker), or alone with one bundle (--bundle)")
    _line_options(run)
    run.add_argument("--id", help="agent id in the fleet: lower-case letters, digits, dashes")
    run.add_argument("--broker", metavar="HOST:PORT", help="MQTT broker of the control plane")
    run.add_argument("--password-file", metavar="FILE", help="holds the agent's broker password")
    run.add_argument("--state-dir", metavar="DIR", help="slots, spool and state (default: sortline-agent-state)")
    run.add_argument("--bundle", type=Path, metavar="DIR", help="judge with this bundle, without a fleet")
    run.add_argument("--seconds", type=float, default=0.0, help="with --bundle: stop after so much of the line's time")
    run.add_argument("--verdicts", type=Path, metavar="FILE", help="with --bundle: one JSON line per item")
    run.add_argument("--json", action="store_true", help="with --bundle: print the totals as JSON")
    run.add_argument(
        "--record", type=Path, metavar="DIR", help="with --bundle: record frames and decisions there (see replay)"
    )
    run.add_argument(
        "--record-quota-mb",
        type=int,
        default=4000,
        metavar="N",
        help="with --record: never more than so much; the oldest goes first, faults go last (default: 4000; two lanes "
        "at 30 frames/s take about 10 MB/s)",
    )
    _replay_options(commands)
    _enrol_options(commands.add_parser("enrol", help="get this box's certificate for a one-time token"))
    collect = commands.add_parser("collect", help="write views for training, from the line's own pipeline")
    _line_options(collect)
    collect.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    collect.add_argument("--items", type=int, default=300, help="how many items (default: 300)")
    collect.add_argument("--json", action="store_true")
    _calibrate_options(commands.add_parser("calibrate", help="learn scale, lanes, direction and speed from the camera"))
    picture = commands.add_parser("picture", help="draw a sheet of the line at work: frames, items, views, verdicts")
    _line_options(picture)
    picture.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="judges")
    picture.add_argument("--seconds", type=float, default=6.0, help="of the camera's time (default: 6)")
    picture.add_argument("--output", type=Path, default=Path("line.png"), metavar="FILE", help="default: line.png")
    picture.add_argument("--json", action="store_true")
    stick = commands.add_parser("import", help="take up what `sortline export` wrote: for a line without network")
    stick.add_argument("folder", type=Path, metavar="DIR", help="for example on a stick")
    stick.add_argument("--id", help="agent id")
    stick.add_argument("--config", type=Path, metavar="FILE", help="TOML of the agent")
    stick.add_argument("--state-dir", metavar="DIR", help="of the agent, which may be running")
    stick.add_argument("--json", action="store_true")
    _lot_options(commands.add_parser("lot", help="say which lot runs from now on, or show it; needs no network"))
    selftest = commands.add_parser("selftest", help="try a bundle as an agent would before it accepts it")
    selftest.add_argument("directory", type=Path, metavar="BUNDLE")
    selftest.add_argument("--budget-ms", type=float, default=50.0)
    capacity = commands.add_parser("capacity", help="measure what one core of this machine carries")
    _line_options(capacity)
    capacity.add_argument("--bundle", type=Path, metavar="DIR")
    capacity.add_argument("--json", action="store_true")
    status = commands.add_parser("status", help="what an agent on this machine runs, from its state directory")
    status.add_argument("--state-dir", type=Path, default=Path("sortline-agent-state"))
    status.add_argument("--json", action="store_true")
    config = commands.add_parser("config", help="check or show the configuration")
    config.add_argument("action", choices=["check", "show"])
    config.add_argument("--config", type=Path, metavar="FILE")
    return parser


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


def _replay_options(commands: Any) -> None:
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


def _lot_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lot", metavar="NAME", help="the new lot; '' = not known")
    parser.add_argument("--variety", metavar="NAME", help="what it is, as the recipe calls it; '' = not known")
    parser.add_argument("--state-dir", type=Path, default=Path("sortline-agent-state"), help="of the agent")
    parser.add_argument("--json", action="store_true")


def _enrol_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token", required=True, help="from `sortline agents enrol NAME`; - reads it from the input")
    parser.add_argument("--control-plane", required=True, metavar="URL", help="https://host:port where agents enrol")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML of the agent")
    parser.add_argument("--state-dir", metavar="DIR", help="as for run (default: sortline-agent-state)")
    parser.add_argument("--json", action="store_true")


def _calibrate_options(parser: argparse.ArgumentParser) -> None:
    _line_options(parser)
    parser.add_argument("--checkerboard", metavar="CxR", help="scale from a board with so many inner corners: 9x6")
    parser.add_argument("--square-mm", type=float, default=0.0, metavar="MM", help="edge of one square of the board")
    parser.add_argument("--board-camera", metavar="SOURCE", help="the board is in this picture, folder or video")
    parser.add_argument(
        "--item-mm", type=float, default=0.0, metavar="MM", help="scale from items of this mean diameter"
    )
    parser.add_argument("--frames", type=int, default=450, help="how many frames to watch (default: 450)")
    parser.add_argument("--date", metavar="YYYY-MM-DD", help="of the calibration (default: today, UTC)")
    parser.add_argument("--output", type=Path, default=Path("geometry.toml"), metavar="FILE", help="for --config")
    parser.add_argument("--overlay", type=Path, metavar="FILE", help="picture to look at (default: beside the output)")
    parser.add_argument("--json", action="store_true")


def _line_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML; SORTLINE_AGENT__SECTION__KEY overrides it")
    parser.add_argument("--camera", help="simulated, a video, a folder of frames, /dev/video0, rtsp://...")
    parser.add_argument("--unpaced", action="store_true", help="recordings: as fast as possible, every frame")
    parser.add_argument("--loop", action="store_true", help="recordings: again from the start at the end")
    parser.add_argument("--lanes", type=int, help="lanes in the image (default: 2)")
    parser.add_argument("--items-per-s", type=float, help="simulated: items per second and lane (default: 9)")
    parser.add_argument("--seed", type=int, help="simulated: which world")
    parser.add_argument("--photos", metavar="DIR", help="simulated: roll these real photographs")
    parser.add_argument("--defect-share", type=float, help="simulated: share of defective items")
    parser.add_argument("--trouble", metavar="SCHEDULE", help='simulated: such as "30s brightness=0.7; 60s clear"')


_LINE_FLAGS = ("camera", "lanes", "items_per_s", "seed", "photos", "defect_share", "trouble")


def _config(arguments: argparse.Namespace) -> Any:
    from edge_agent.config import load_agent_config  # noqa: PLC0415

    line = {name: getattr(arguments, name) for name in _LINE_FLAGS if getattr(arguments, name, None) is not None}
    if getattr(arguments, "unpaced", False):
        line["paced"] = False
    if getattr(arguments, "loop", False):
        line["loop"] = True
    overrides: dict[str, Any] = {"line": line} if line else {}
    for flag, key in (("id", "id"), ("state_dir", "state_dir")):
        if getattr(arguments, flag, None) is not None:
            overrides[key] = str(getattr(arguments, flag))
    if getattr(arguments, "broker", None):
        host, _, port = arguments.broker.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError("config.bad_value", "--broker is HOST:PORT.", expected="HOST:PORT", got=arguments.broker)
        overrides["broker"] = {"host": host, "port": int(port)}
    if getattr(arguments, "password_file", None):
        overrides.setdefault("broker", {})["password_file"] = arguments.password_file
    return load_agent_config(arguments.config, overrides)


def _run(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    if arguments.bundle is None:
        if arguments.record is not None:
            raise ConfigError("config.bad_value", "--record needs --bundle.", expected="--bundle DIR", got="none")
        from edge_agent.identity.certificate import with_identity  # noqa: PLC0415
        from edge_agent.supervisor.supervisor import Supervisor  # noqa: PLC0415

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
        return Supervisor(with_identity(config)).run()
    from edge_agent.offline.run import run_standalone  # noqa: PLC0415

    def show(live: Any) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{live.items} items, {live.items_per_s:.1f}/s, p99 {live.p99_ms:.1f} ms   ")

    recorder = _recorder(arguments, config)
    stream = arguments.verdicts.open("w", encoding="utf-8") if arguments.verdicts else None
    try:
        facts = run_standalone(
            config.line,
            bundle=arguments.bundle,
            seconds=arguments.seconds,
            on_live=show,
            verdicts=stream,
            recorder=recorder,
        )
    finally:
        if recorder is not None:
            recorder.close()
        if stream is not None:
            stream.close()
        if sys.stderr.isatty():
            sys.stderr.write("\n")
    _print(facts, as_json=arguments.json)
    return 0


def _enrol(arguments: argparse.Namespace) -> int:
    import datetime as dt  # noqa: PLC0415

    from edge_agent.identity.certificate import identity_folder  # noqa: PLC0415
    from edge_agent.identity.enrolment import enrol  # noqa: PLC0415
    from edge_agent.trust.verifier import places  # noqa: PLC0415

    token = sys.stdin.readline() if arguments.token == "-" else arguments.token  # noqa: S105  no secret of ours
    config = _config(arguments)
    folder, (_, anchor) = identity_folder(config), places(Path(config.state_dir).resolve(), config.trust)
    facts = enrol(folder, token, arguments.control_plane, anchor=anchor)
    until = dt.datetime.fromtimestamp(facts.not_after_s, dt.UTC).isoformat()
    _print({"agent": facts.agent, "identity": str(folder), "until": until}, as_json=arguments.json)
    return 0


def _recorder(arguments: argparse.Namespace, config: Any) -> Any:
    if arguments.record is None:
        return None
    from edge_agent.recording.recorder import Recorder  # noqa: PLC0415

    about = {"bundle": str(arguments.bundle.resolve()), "threads": str(config.line.threads or 1)}
    return Recorder(
        arguments.record, quota_bytes=arguments.record_quota_mb * 1_000_000, about=about, patient=not config.line.paced
    )


def _replay(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict  # noqa: PLC0415

    from edge_agent.recording.comparison import replay  # noqa: PLC0415
    from edge_agent.recording.replay import Replay  # noqa: PLC0415

    bundle = arguments.bundle or Replay(arguments.folder).bundle_directory()

    def progress(done: int, wanted: int) -> None:
        if sys.stderr.isatty() and (done % 10 == 0 or done == wanted):
            sys.stderr.write(f"\rreplaying {done}/{wanted} frames ")

    report = replay(arguments.folder, bundle, progress=progress)
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    for torn in report.torn:
        sys.stderr.write(f"torn tail: {torn}\n")
    if arguments.json:
        _print(asdict(report), as_json=True)
    else:
        sys.stdout.write("\n".join(report.lines()) + "\n")
    return 1 if report.exact is False else 0


def _collect(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict  # noqa: PLC0415

    from edge_agent.offline.collect import collect  # noqa: PLC0415

    def progress(done: int, wanted: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\rcollecting {done}/{wanted} items ")

    found = collect(_config(arguments).line, arguments.output, items=arguments.items, progress=progress)
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    _print(asdict(found), as_json=arguments.json)
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    import datetime as dt  # noqa: PLC0415

    from edge_agent.calibration.calibrate import Target, calibrate, camera_opener, write_calibration  # noqa: PLC0415
    from edge_agent.calibration.scale import parse_pattern  # noqa: PLC0415

    def progress(done: int, wanted: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\rwatching the line: {done}/{wanted} frames ")

    line = _config(arguments).line
    target = Target(
        pattern=parse_pattern(arguments.checkerboard) if arguments.checkerboard else None,
        square_mm=arguments.square_mm,
        item_mm=arguments.item_mm,
        lanes=arguments.lanes,
    )
    board = arguments.board_camera and msgspec.structs.replace(line, camera=arguments.board_camera)
    date = arguments.date or dt.datetime.now(dt.UTC).date().isoformat()
    try:
        found, picture = calibrate(
            line,
            target,
            date=date,
            frames=arguments.frames,
            board_opener=camera_opener(board) if board else None,
            progress=progress,
        )
    finally:
        if sys.stderr.isatty():
            sys.stderr.write("\n")
    overlay = arguments.overlay or arguments.output.with_suffix(".png")
    write_calibration(found, picture, arguments.output, overlay)
    for note in found.notes:
        sys.stderr.write(f"note: {note}\n")
    facts = msgspec.to_builtins(found) | {"geometry": str(arguments.output), "overlay": str(overlay)}
    _print(facts, as_json=arguments.json)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    """Verifies here, so that the person with the stick hears the answer; then the agent does the rest."""
    from edge_agent.delivery.offline_import import read_export, stage_import  # noqa: PLC0415
    from edge_agent.identity.certificate import with_identity  # noqa: PLC0415
    from edge_agent.trust.verifier import verify_now  # noqa: PLC0415

    config = with_identity(_config(arguments))
    root = Path(config.state_dir).resolve()
    facts = verify_now(root, config.trust, config.id, *read_export(arguments.folder))
    desired = stage_import(arguments.folder, root)
    found = {"agent": config.id, "generation": desired.generation, "bundle": desired.bundle}
    _print(found | facts, as_json=arguments.json)
    return 0


def _selftest(arguments: argparse.Namespace) -> int:
    from edge_agent.line.selftest import main as selftest  # noqa: PLC0415

    return selftest([str(arguments.directory), "--budget-ms", str(arguments.budget_ms)])


def _picture(arguments: argparse.Namespace) -> int:
    from edge_agent.offline.contact_sheet import write_sheet  # noqa: PLC0415

    # Nothing waits for a picture: recordings and the simulation run as fast as they go.
    line = msgspec.structs.replace(_config(arguments).line, paced=False)
    facts = write_sheet(line, arguments.bundle, arguments.output, seconds=arguments.seconds)
    _print(facts | {"picture": str(arguments.output)}, as_json=arguments.json)
    return 0


def _capacity(arguments: argparse.Namespace) -> int:
    from edge_agent.offline.capacity import capacity  # noqa: PLC0415

    _print(capacity(_config(arguments).line, bundle=arguments.bundle), as_json=arguments.json)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from edge_agent.delivery.state_file import champion_file  # noqa: PLC0415

    state = champion_file(arguments.state_dir).read()
    if state is None:
        raise ConfigError(
            "agent.no_state", f"{arguments.state_dir} holds no agent.", expected="state.json", got="nothing"
        )
    _print(msgspec.to_builtins(state), as_json=arguments.json)
    return 0


def _lot(arguments: argparse.Namespace) -> int:
    import secrets  # noqa: PLC0415

    from edge_agent.supervisor.lots import known_lot, submit_lot_request, wait_until_applied  # noqa: PLC0415

    root: Path = arguments.state_dir
    if not (root / "lock").exists():
        raise ConfigError("agent.no_state", f"{root} holds no agent.", expected="--state-dir of an agent", got=root)
    said = [value for value in (arguments.lot, arguments.variety) if value is not None]
    if len(said) == 1:
        raise ConfigError("config.bad_value", "A lot has a variety.", expected="--lot and --variety", got="one of them")
    facts: dict[str, Any] = {}
    if said:
        request_id = secrets.token_hex(16)
        submit_lot_request(root, arguments.lot, arguments.variety, request_id)
        facts = {"taken_up": wait_until_applied(root, request_id, timeout_s=3.0)}
        if not facts["taken_up"]:
            sys.stderr.write("no agent has taken it up yet: the next one that runs here does\n")
            _print(facts | {"lot": arguments.lot, "variety": arguments.variety}, as_json=arguments.json)
            return 0
    _print(facts | known_lot(root), as_json=arguments.json)
    return 0


def _show_config(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    if arguments.action == "show":
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(config)).decode() + "\n")
    else:
        sys.stderr.write("the configuration is good\n")
    return 0


def _print(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(msgspec.json.encode(facts).decode() + "\n")
        return
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        sys.stdout.write(f"{key.replace('_', ' '):<{width}}  {value}\n")


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "enrol": _enrol,
    "replay": _replay,
    "collect": _collect,
    "calibrate": _calibrate,
    "picture": _picture,
    "import": _import,
    "lot": _lot,
    "selftest": _selftest,
    "capacity": _capacity,
    "status": _status,
    "config": _show_config,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the command; returns the exit status.

    Called without arguments, as the program is, it ends the process where a camera's driver holds a thread.
    """
    status = _answered(argv)
    live_camera = sys.modules.get("edge_agent.devices.live_camera")
    if argv is None and live_camera is not None and live_camera.left_behind():
        # The thread would return into an interpreter that is being torn down, and abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _answered(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except ConfigError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 2
    except (UnavailableError, CameraError) as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 4
    except SortlineError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

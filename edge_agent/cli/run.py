"""`sortline-agent run` and `lot`: sort in a fleet or alone, and name the lot that is sorted."""

import argparse
import logging
import secrets
import sys
from pathlib import Path
from typing import Any

from edge_agent.cli.options import (
    agent_directory,
    at_least,
    check_file,
    check_folder,
    config_of,
    end_progress,
    line_options,
    print_facts,
)
from models.errors import ConfigError
from models.files import write_atomically


def add_run(commands: Any) -> None:
    """Adds the subcommand `run`."""
    run = commands.add_parser("run", help="sort: in a fleet (--broker), or alone with one bundle (--bundle)")
    line_options(run)
    run.add_argument("--id", help="agent id in the fleet: lower-case letters, digits, dashes")
    run.add_argument(
        "--broker", metavar="ADDRESS", help="MQTT broker: HOST:PORT, [IPV6]:PORT, mqtt://... or mqtts://..."
    )
    run.add_argument("--password-file", metavar="FILE", help="holds the agent's broker password")
    run.add_argument("--state-dir", metavar="DIR", help="slots, spool and state (default: sortline-agent-state)")
    run.add_argument("--bundle", type=Path, metavar="DIR", help="judge with this bundle, without a fleet")
    run.add_argument(
        "--seconds", type=at_least(0.0), default=0.0, help="with --bundle: stop after so much of the line's time"
    )
    run.add_argument("--verdicts", type=Path, metavar="FILE", help="with --bundle: one JSON line per item")
    run.add_argument("--json", action="store_true", help="with --bundle: print the totals as JSON")
    run.add_argument(
        "--record", type=Path, metavar="DIR", help="with --bundle: record frames and decisions there (see replay)"
    )
    run.add_argument(
        "--record-quota-mb",
        type=at_least(1, int),
        default=4000,
        metavar="N",
        help="with --record: never more than so much; the oldest goes first, faults go last (default: 4000; two lanes "
        "at 30 frames/s take about 10 MB/s)",
    )
    run.set_defaults(act=_run)


def _run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    if arguments.bundle is not None:
        return _run_alone(arguments, config)
    for flag in ("record", "verdicts"):
        if getattr(arguments, flag) is not None:
            raise ConfigError("config.bad_value", f"--{flag} needs --bundle.", expected="--bundle DIR", got="none")
    from edge_agent.identity.certificate import with_identity  # noqa: PLC0415
    from edge_agent.supervisor.supervisor import Supervisor  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    return Supervisor(with_identity(config)).run()


def _run_alone(arguments: argparse.Namespace, config: Any) -> int:
    from edge_agent.offline.run import run_standalone  # noqa: PLC0415
    from models.bundle import read_bundle  # noqa: PLC0415

    def show(live: Any) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{live.items} items, {live.items_per_s:.1f}/s, p99 {live.p99_ms:.1f} ms   ")

    read_bundle(arguments.bundle).recipe.check_outlets(config.line.outlets)
    if arguments.verdicts is not None:
        check_file(arguments.verdicts)
    if arguments.record is not None:
        check_folder(arguments.record)
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
        end_progress()
    print_facts(facts, as_json=arguments.json)
    return 0


def _recorder(arguments: argparse.Namespace, config: Any) -> Any:
    if arguments.record is None:
        return None
    from edge_agent.recording.recorder import Recorder  # noqa: PLC0415

    about = {"bundle": str(arguments.bundle.resolve()), "threads": str(config.line.threads or 1)}
    return Recorder(
        arguments.record, quota_bytes=arguments.record_quota_mb * 1_000_000, about=about, patient=not config.line.paced
    )


def add_lot(commands: Any) -> None:
    """Adds the subcommand `lot`."""
    lot = commands.add_parser("lot", help="say which lot runs from now on, or show it; needs no network")
    lot.add_argument("--lot", metavar="NAME", help="the new lot; '' = not known")
    lot.add_argument("--variety", metavar="NAME", help="what it is, as the recipe calls it; '' = not known")
    lot.add_argument("--state-dir", type=Path, default=Path("sortline-agent-state"), help="of the agent")
    lot.add_argument("--json", action="store_true")
    lot.set_defaults(act=_lot)


def _lot(arguments: argparse.Namespace) -> int:
    from edge_agent.supervisor.lots import known_lot, submit_lot_request, wait_until_applied  # noqa: PLC0415

    root = agent_directory(arguments.state_dir).root
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
            print_facts(facts | {"lot": arguments.lot, "variety": arguments.variety}, as_json=arguments.json)
            return 0
    print_facts(facts | known_lot(root), as_json=arguments.json)
    return 0


def add_trouble(commands: Any) -> None:
    """Adds the subcommand `trouble`."""
    trouble = commands.add_parser("trouble", help="say what is wrong with a simulated line from now on")
    trouble.add_argument("faults", metavar="FAULTS", help='such as "dirt=0.6 dirt_x=0.8", or "clear"')
    trouble.add_argument("--state-dir", type=Path, default=Path("sortline-agent-state"), help="of the agent")
    trouble.set_defaults(act=_trouble)


def _trouble(arguments: argparse.Namespace) -> int:
    from edge_agent.simulation.faults import parse_faults  # noqa: PLC0415

    parse_faults(arguments.faults)
    write_atomically(agent_directory(arguments.state_dir).trouble, arguments.faults.encode())
    return 0

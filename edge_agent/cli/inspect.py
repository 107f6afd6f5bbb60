"""`sortline-agent status`, `selftest`, `capacity` and `config`: looks at an agent or a machine and changes nothing."""

import argparse
import datetime as dt
import sys
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.cli.options import at_least, config_of, line_options, print_facts
from models.errors import ConfigError, InputError


def add_selftest(commands: Any) -> None:
    """Adds the subcommand `selftest`."""
    selftest = commands.add_parser("selftest", help="try a bundle as an agent would before it accepts it")
    selftest.add_argument("directory", type=Path, metavar="BUNDLE")
    selftest.add_argument("--budget-ms", type=at_least(0.001), default=50.0)
    selftest.add_argument("--config", type=Path, metavar="FILE", help="TOML of the agent: its outlets must be enough")
    selftest.set_defaults(act=_selftest)


def _selftest(arguments: argparse.Namespace) -> int:
    from edge_agent.line.selftest import main as selftest  # noqa: PLC0415

    outlets = config_of(arguments).line.outlets if arguments.config else ()
    options = [*(f"--outlet={name}" for name in outlets), "--budget-ms", str(arguments.budget_ms)]
    return selftest([str(arguments.directory), *options])


def add_capacity(commands: Any) -> None:
    """Adds the subcommand `capacity`."""
    capacity = commands.add_parser("capacity", help="measure what one core of this machine carries")
    line_options(capacity)
    capacity.add_argument("--bundle", type=Path, metavar="DIR")
    capacity.add_argument("--json", action="store_true")
    capacity.set_defaults(act=_capacity)


def _capacity(arguments: argparse.Namespace) -> int:
    from edge_agent.offline.capacity import capacity  # noqa: PLC0415

    print_facts(capacity(config_of(arguments).line, bundle=arguments.bundle), as_json=arguments.json)
    return 0


def add_status(commands: Any) -> None:
    """Adds the subcommand `status`."""
    status = commands.add_parser("status", help="what an agent on this machine runs, from its state directory")
    status.add_argument("--state-dir", type=Path, default=Path("sortline-agent-state"))
    status.add_argument("--json", action="store_true")
    status.set_defaults(act=_status)


def _status(arguments: argparse.Namespace) -> int:
    from edge_agent.delivery.lifecycle import SlotState  # noqa: PLC0415
    from edge_agent.delivery.state_file import champion_file  # noqa: PLC0415
    from edge_agent.state_directory import StateDirectory  # noqa: PLC0415

    state = champion_file(arguments.state_dir).read()
    if state is None and StateDirectory(arguments.state_dir).lock_file.exists():
        state = SlotState()  # an agent that never had a bundle; perhaps because it never had a broker
    if state is None:
        raise ConfigError(
            "agent.no_state", f"{arguments.state_dir} holds no agent.", expected="state.json", got="nothing"
        )
    owned = StateDirectory(arguments.state_dir).is_owned()
    facts = msgspec.to_builtins(state) | {"running": owned, "broker": _broker(arguments.state_dir)}
    print_facts(facts, as_json=arguments.json)
    return 0


def _broker(state_dir: Path) -> str:
    """Returns what the agent found out last about its broker, for people."""
    from edge_agent.supervisor.connection_file import connection_file  # noqa: PLC0415

    try:
        found = connection_file(state_dir).read()
    except InputError as error:
        return str(error)
    if found is None:
        return "not known"
    since = dt.datetime.fromtimestamp(found.at_ms / 1000.0, dt.UTC).isoformat(timespec="seconds")
    if found.connected:
        return f"{found.broker}, connected since {since}"
    why = f"{found.code}: {found.message}" if found.code else found.message or "no reason is known yet"
    return f"{found.broker}, not connected at {since}: {why}"


def add_config(commands: Any) -> None:
    """Adds the subcommand `config`."""
    config = commands.add_parser("config", help="check or show the configuration")
    config.add_argument("action", choices=["check", "show"])
    config.add_argument("--config", type=Path, metavar="FILE")
    config.set_defaults(act=_show_config)


def _show_config(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    if arguments.action == "show":
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(config)).decode() + "\n")
    else:
        sys.stderr.write("the configuration is good\n")
    return 0

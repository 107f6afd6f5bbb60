"""`python -m tests.chaos`: prints what was done to the system and what became of its records and bundles."""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.run import Chaos, Outcome
from tests.simulators.processes import MOSQUITTO


def show(console: Console, outcome: Outcome) -> None:
    table = Table(
        title=f"{outcome.broker} broker, {outcome.agents} light agents, {outcome.seconds:.0f} s", title_justify="left"
    )
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("must be", justify="right")
    for name, count in sorted(outcome.faults.items()):
        table.add_row(f"fault: {name}", f"{count:,}")
    for name, count in outcome.counts.items():
        table.add_row(name, f"{count:,}")
    for name, (count, wanted) in outcome.oracle.items():
        good = count == wanted
        table.add_row(name, f"{count:,}" if good else f"[red]{count:,}", f"{wanted:,}")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="of chaos per broker (default: 120)")
    parser.add_argument("--agents", type=int, default=60, help="light agents beside the real one (default: 60)")
    parser.add_argument("--long", action="store_true", help="an hour per broker, 200 light agents")
    parser.add_argument("--broker", choices=("embedded", "mosquitto"), action="append")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)
    seconds, agents = (3600.0, 200) if given.long else (given.seconds, given.agents)
    kinds = given.broker or ["embedded", *(["mosquitto"] if Path(MOSQUITTO).exists() else [])]
    console, outcomes = Console(), []
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="sortline-chaos-") as folder:
            outcomes.append(Chaos(Path(folder), kind, agents=agents, seed=given.seed).run(seconds))
            show(console, outcomes[-1])
    if given.json:
        given.json.write_text(json.dumps([outcome.as_dict() for outcome in outcomes], indent=2) + "\n")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Cost of trust: bytes per agent, time of verifying on the agent, time of signing on the control plane.

`python -m benchmarks.trust [--json PATH] [--quick]`. Exit status 1 when a bound is missed.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from sqlmodel import col, select

from benchmarks.figures import Figures
from control_plane.database.engine import open_database, reading, writing
from control_plane.database.migrate import migrate
from control_plane.database.tables.agents import Agent
from control_plane.trust import ceremony
from control_plane.trust import metadata as md
from control_plane.trust.online_signer import OnlineSigner
from control_plane.trust.signing import is_bin, sign_changes
from models.bundle import Chunk, FileEntry, Manifest, sha256
from models.messages import Desired, encode
from models.signed_set import MAX_SET_BYTES, ROLES, make_set
from models.topics import bin_of
from models.trust import verify

_SIGNATURES = 7
"""That a set without rotations has an agent check: the root twice, timestamp, snapshot, targets, assign, bin."""


def installation(folder: ceremony.TrustFolder, now: datetime) -> tuple[bytes, bytes, str]:
    """Development keys and one released bundle: root, targets, digest."""
    keys = folder.path / "keys"
    root = ceremony.initialise(folder, [keys / "root.pem"], keys / "release.pem", None, now)
    digest = sha256(b"model")
    entry = FileEntry(path="card.md", size_bytes=5, sha256=digest, chunks=(Chunk(digest, 5),))
    manifest = Manifest(name="apples", files=(entry,))
    (release,) = ceremony.open_keys([keys / "release.pem"], lambda _path: "")
    folder.write("targets.json", ceremony.release(folder.targets, root, manifest, release, now))
    return root, folder.targets, sha256(manifest.encoded())


@dataclass
class Fleet:
    """The signed metadata of a fleet of one size."""

    root: bytes
    common: bytes
    bins: dict[str, bytes]
    documents: dict[str, bytes]
    one_document: int
    """Bytes of the set when one document lists all agents."""


def signed_fleet(folder: ceremony.TrustFolder, agents: int, now: datetime) -> Fleet:
    """Every agent is assigned the same bundle."""
    root, targets, bundle = installation(folder, now)
    documents = {f"line-{n}": encode(Desired(generation=n, bundle=bundle)) for n in range(1, agents + 1)}
    parts = {"root": root, "targets": targets}
    parts |= sign_changes(parts, documents, folder.online_signer, now, force=False)
    common = make_set([root], {role: parts[role] for role in ROLES})
    keys = md.assign_keys_of(md.read_targets(targets).signed)
    everyone = md.sign(md.new_bin(1, documents, now), [folder.online_signer("assign", keys)])
    few = md.sign(md.new_snapshot(1, {"targets": targets, "assign": everyone}, now), [])
    others = len(common) - len(parts["assign"]) - len(parts["snapshot"]) + len(few)
    bins = {role: data for role, data in parts.items() if is_bin(role)}
    return Fleet(root, common, bins, documents, others + len(everyone))


def median_ms(action: Callable[[], object], times: int) -> float:
    """Returns the median time of several runs in milliseconds, without the first one."""
    action()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        found.append(1000.0 * (time.perf_counter() - started))
    return statistics.median(found)


def measure(figures: Figures, root_folder: Path, agents: int, runs: int, processes: int) -> None:
    """Measures one fleet size from the agent whose bin is the largest."""
    now = datetime.now(UTC).replace(microsecond=0)
    fleet = signed_fleet(ceremony.TrustFolder(root_folder / f"trust-{agents}"), agents, now)
    agent_id = max(fleet.documents, key=lambda name: len(fleet.bins[bin_of(name)]))
    offered, own_bin, document = fleet.common, fleet.bins[bin_of(agent_id)], fleet.documents[agent_id]
    scratch = iter(range(1_000_000))

    def first() -> bytes:
        place = root_folder / f"scratch-{agents}-{next(scratch)}"
        outcome = verify(
            offered, own_bin, document, agent_id=agent_id, anchor=fleet.root, trusted=b"", now=now, scratch=place
        )
        assert outcome.error is None, outcome.error
        return outcome.trusted

    key = Ed25519PrivateKey.generate()
    size = len(offered) + len(own_bin)
    sample = bytes(size // 6)
    signature, public = key.sign(sample), key.public_key()

    def bare() -> None:
        for _ in range(_SIGNATURES):
            public.verify(signature, sample)

    anchor = root_folder / f"root-{agents}.json"
    anchor.write_bytes(fleet.root)
    question = msgspec.msgpack.encode({"offered": offered, "bin": own_bin, "document": document})
    command = [sys.executable, "-m", "edge_agent.trust.verify", "--folder", str(root_folder / f"agent-{agents}")]
    command += ["--root", str(anchor), "--agent", agent_id]

    def whole() -> None:
        subprocess.run(command, input=question, check=True, capture_output=True)

    def nothing() -> None:
        subprocess.run([sys.executable, "-c", "pass"], check=True)

    ours, bare_ms = median_ms(first, runs), median_ms(bare, runs)
    whole_ms, nothing_ms = median_ms(whole, processes), median_ms(nothing, processes)
    bins = [len(data) for data in fleet.bins.values()]
    rows: list[tuple[str, float | str, str]] = [
        ("set, the same for all", len(offered) / 1024, "KiB"),
        ("largest bin", len(own_bin) / 1024, "KiB"),
        ("mean bin", statistics.mean(bins) / 1024, "KiB"),
        ("an agent gets at a change of its bin, mean", (len(offered) + statistics.mean(bins)) / 1024, "KiB"),
        ("one document for all, as a comparison", fleet.one_document / 1024, "KiB"),
        ("verify, in a process that is warm", ours, "ms"),
        ("verify / seven bare signature checks of a part's mean size", ours / bare_ms, ""),
        ("the whole process, start to answer", whole_ms, "ms"),
        ("the whole process / an empty one", whole_ms / nothing_ms, ""),
    ]
    limit = ("<=", MAX_SET_BYTES / 1024)
    bounds = {"set, the same for all": limit, "largest bin": limit, "the whole process / an empty one": ("<=", 40.0)}
    figures.table(f"metadata refresh, {agents} agents", rows, bounds)


def measure_signing(figures: Figures, root_folder: Path, agents: int) -> None:
    """The control plane's transaction, SQLite on this disk."""
    now = datetime.now(UTC).replace(microsecond=0)
    folder = ceremony.TrustFolder(root_folder / f"plane-{agents}")
    _, _, bundle = installation(folder, now)
    url = f"sqlite:///{root_folder / f'plane-{agents}.sqlite'}"
    migrate(url)
    engine, assignments = open_database(url), OnlineSigner(folder)
    with writing(engine) as session:
        session.add_all(Agent(id=f"line-{n}", generation=0, desired_bundle="") for n in range(1, agents + 1))
        assignments.take_folder(session, now)
        session.commit()

    def sign_changes(change: Iterable[str], at: datetime) -> float:
        wanted = set(change)
        started = time.perf_counter()
        with writing(engine) as session:
            for agent in session.exec(select(Agent).where(col(Agent.id).in_(wanted))) if wanted else ():
                agent.generation, agent.desired_bundle = agent.generation + 1, bundle
                session.add(agent)
            session.flush()
            begun = time.perf_counter()
            assignments.sign_changes(session, at)
            session.commit()
        return 1000.0 * (time.perf_counter() - (begun if wanted else started))

    def published() -> float:
        known: dict[str, int] = {}
        with reading(engine) as session:
            return 1.0 * sum(len(data) for _, _, data in assignments.news(session, known))

    everyone = [f"line-{n}" for n in range(1, agents + 1)]
    first_ms = sign_changes(everyone, now)
    one_ms = statistics.median(sign_changes(["line-1"], now) for _ in range(5))
    idle_ms = statistics.median(sign_changes([], now) for _ in range(5))
    hourly_ms = sign_changes([], now + timedelta(hours=2))
    all_ms = sign_changes(everyone, now + timedelta(hours=2))
    rows: list[tuple[str, float | str, str]] = [
        ("every agent changed, first time", first_ms, "ms"),
        ("every agent changed again", all_ms, "ms"),
        ("one agent changed", one_ms, "ms"),
        ("nothing changed (every half minute)", idle_ms, "ms"),
        ("nothing changed, an hour is over", hourly_ms, "ms"),
        ("retained at the broker, set and bins", published() / 1024, "KiB"),
    ]
    figures.table(f"signing, {agents} agents", rows, {})
    engine.dispose()


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 when a bound is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trust", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    figures = Figures(Console())
    with tempfile.TemporaryDirectory() as folder:
        for agents in (10, 200) if arguments.quick else (10, 200, 1_000, 5_000, 20_000, 45_000):
            measure(figures, Path(folder), agents, 5 if arguments.quick else 25, 3 if arguments.quick else 9)
        for agents in (200,) if arguments.quick else (200, 5_000):
            measure_signing(figures, Path(folder), agents)
    if arguments.json:
        figures.write(arguments.json, {"quick": arguments.quick})
    for missed in figures.missed:
        print(f"missed: {missed}")
    return 1 if figures.missed else 0


if __name__ == "__main__":
    sys.exit(main())

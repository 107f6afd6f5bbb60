"""What trust costs an agent: size and time of verifying, against bare signature checks and a bare process.

`python -m benchmarks.trust [--json PATH] [--quick]`. Exit status 1 when a bound is missed.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console

from benchmarks.figures import Figures
from control_plane.trust import ceremony
from control_plane.trust import metadata as md
from models.bundle import Chunk, FileEntry, Manifest, sha256
from models.messages import Desired, encode
from models.trust import ASSIGN, MAX_SET_BYTES, make_set, verify

_SIGNATURES = 6
"""That a set without rotations has an agent check: the root twice, timestamp, snapshot, targets, assign."""


def signed_set(folder: ceremony.Folder, agents: int, now: datetime) -> tuple[bytes, bytes, bytes]:
    """A set with these assignments; returns it, one document and the root."""
    keys = folder.path / "keys"
    root = ceremony.initialise(folder, [keys / "root.pem"], keys / "release.pem", None, now)
    digest = sha256(b"model")
    entry = FileEntry(path="card.md", size_bytes=5, sha256=digest, chunks=(Chunk(digest, 5),))
    manifest = Manifest(name="apples", files=(entry,))
    (release,) = ceremony.open_keys([keys / "release.pem"], lambda _path: "")
    targets = ceremony.release(folder.targets, root, manifest, release, now)
    wanted = {
        f"line-{n}": encode(Desired(generation=n, bundle=sha256(manifest.encoded()))) for n in range(1, agents + 1)
    }
    roles = md.roles_of(md.read_root(root).signed) | {ASSIGN: md.assign_keys_of(md.read_targets(targets).signed)}
    assign = md.sign(md.new_assign(1, wanted, now), [folder.online_signer(ASSIGN, roles[ASSIGN])])
    snapshot = md.new_snapshot(1, targets, assign, now)
    snapshot_data = md.sign(snapshot, [folder.online_signer("snapshot", roles["snapshot"])])
    timestamp = md.new_timestamp(1, snapshot_data, now)
    timestamp_data = md.sign(timestamp, [folder.online_signer("timestamp", roles["timestamp"])])
    parts = {"timestamp": timestamp_data, "snapshot": snapshot_data, "targets": targets, ASSIGN: assign}
    return make_set([root], parts), wanted["line-1"], root


def median_ms(action: Callable[[], object], times: int) -> float:
    """Of several runs, the first one left out."""
    action()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        found.append(1000.0 * (time.perf_counter() - started))
    return statistics.median(found)


def measure(figures: Figures, root_folder: Path, agents: int, runs: int, processes: int) -> None:
    """One fleet size."""
    now = datetime.now(UTC).replace(microsecond=0)
    offered, document, root = signed_set(ceremony.Folder(root_folder / f"trust-{agents}"), agents, now)
    scratch = iter(range(1_000_000))

    def first() -> bytes:
        place = root_folder / f"scratch-{agents}-{next(scratch)}"
        outcome = verify(offered, document, agent_id="line-1", anchor=root, trusted=b"", now=now, scratch=place)
        assert outcome.error is None, outcome.error
        return outcome.trusted

    key = Ed25519PrivateKey.generate()
    signature, public = key.sign(offered), key.public_key()

    def bare() -> None:
        for _ in range(_SIGNATURES):
            public.verify(signature, offered)

    anchor = root_folder / f"root-{agents}.json"
    anchor.write_bytes(root)
    question = msgspec.msgpack.encode({"offered": offered, "document": document})
    command = [sys.executable, "-m", "edge_agent.verify", "--folder", str(root_folder / f"agent-{agents}")]
    command += ["--root", str(anchor), "--agent", "line-1"]

    def whole() -> None:
        subprocess.run(command, input=question, check=True, capture_output=True)

    def nothing() -> None:
        subprocess.run([sys.executable, "-c", "pass"], check=True)

    ours, bare_ms = median_ms(first, runs), median_ms(bare, runs)
    whole_ms, nothing_ms = median_ms(whole, processes), median_ms(nothing, processes)
    rows: list[tuple[str, float | str, str]] = [
        ("size of the set", len(offered) / 1024, "KiB"),
        ("verify, in a process that is warm", ours, "ms"),
        ("verify / six bare signature checks of that size", ours / bare_ms, ""),
        ("the whole process, start to answer", whole_ms, "ms"),
        ("the whole process / an empty one", whole_ms / nothing_ms, ""),
    ]
    bounds = {"size of the set": ("<=", MAX_SET_BYTES / 1024), "the whole process / an empty one": ("<=", 40.0)}
    figures.table(f"metadata refresh, {agents} agents", rows, bounds)


def main(argv: list[str] | None = None) -> int:
    """Entry."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trust", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    figures = Figures(Console())
    with tempfile.TemporaryDirectory() as folder:
        for agents in (1, 200) if arguments.quick else (1, 50, 200, 800):
            measure(figures, Path(folder), agents, 5 if arguments.quick else 25, 3 if arguments.quick else 9)
    if arguments.json:
        figures.write(arguments.json, {"quick": arguments.quick})
    for missed in figures.missed:
        print(f"missed: {missed}")
    return 1 if figures.missed else 0


if __name__ == "__main__":
    sys.exit(main())

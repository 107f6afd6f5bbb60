"""Key ceremonies, releases and what a USB stick carries. Offline keys are opened here, never sent anywhere."""

import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from control_plane.cli.output import AsJson, Server, err, say, table_of
from models.errors import ConfigError, InputError

keys = typer.Typer(no_args_is_help=True, help="Keys that decide what may run (see docs/operating.md).")

Trust = Annotated[Path, typer.Option("--trust", help="Folder of public metadata and online keys.")]
KeyFiles = Annotated[list[Path], typer.Option("--key", help="Private key file; again for the next.")]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="Holds the passphrase; else SORTLINE_KEY_PASSPHRASE, else asked for.")
]
DEFAULT_TRUST = Path("sortline-data/trust")


def _passphrase(file: Path | None, *, confirm: bool = False) -> Callable[[Path], str]:
    def ask(key: Path) -> str:
        if file is not None:
            try:
                return file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ConfigError("keys.unreadable", f"{file} cannot be read.", got=error.strerror) from error
        given = os.environ.get("SORTLINE_KEY_PASSPHRASE")
        return given or str(typer.prompt(f"Passphrase of {key}", hide_input=True, confirmation_prompt=confirm))

    return ask


def _warn_of(root: bytes) -> None:
    from models.signed_set import is_development  # noqa: PLC0415

    if is_development(root):
        warn_development()


def warn_development() -> None:
    """Prints the red banner of development keys."""
    from control_plane.trust.keys import BANNER  # noqa: PLC0415

    err.print(f"[bold white on red] {BANNER} [/]", highlight=False)


@keys.command("init")
def init(
    trust: Trust = DEFAULT_TRUST,
    root_key: Annotated[
        list[Path] | None, typer.Option(help="New root key file, three times, each on a medium of its own.")
    ] = None,
    release_key: Annotated[Path | None, typer.Option(help="New release key file.")] = None,
    development: Annotated[bool, typer.Option("--development", help="All keys here, in clear, threshold 1.")] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Make all keys and the first signed metadata. For a plant: on a machine without network.

    Example: `sortline keys init --trust trust --root-key /media/a/root-1.pem --root-key /media/b/root-2.pem --root-key
    /media/c/root-3.pem --release-key /media/d/release.pem`, then copy `trust` to the control plane's data folder and
    `1.root.json` to every box.
    """
    from control_plane.trust.ceremony import TrustFolder, initialise  # noqa: PLC0415

    if development:
        root_keys, release = [trust / "development" / "root-1.pem"], trust / "development" / "release.pem"
        initialise(TrustFolder(trust), root_keys, release, None, datetime.now(UTC))
        warn_development()
    else:
        if not release_key:
            raise InputError("keys.wrong_number", "Name the release key.", expected="--release-key FILE", got="none")
        ask = _passphrase(passphrase_file, confirm=True)
        initialise(TrustFolder(trust), root_key or [], release_key, ask, datetime.now(UTC))
    err.print(f"metadata and online keys are in {trust}; the trust anchor of every box is {trust / '1.root.json'}")


@keys.command("rotate")
def rotate(
    role: Annotated[str, typer.Argument(help="root, release or online")],
    key: KeyFiles,
    trust: Trust = DEFAULT_TRUST,
    new: Annotated[Path | None, typer.Option(help="New key file (root, release).")] = None,
    retire: Annotated[str, typer.Option(help="root: first digits of the id that the new key replaces.")] = "",
    release_key: Annotated[Path | None, typer.Option(help="online: the release key, which signs the targets.")] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Replace keys: writes the next root. `rotate root` without --new only renews it.

    Two root keys must sign. When they are not in one place, sign with one here and with the other by `keys sign`. Then
    bring the folder to the control plane: `sortline keys push`.
    """
    from control_plane.trust import ceremony  # noqa: PLC0415
    from control_plane.trust.keys import new_key  # noqa: PLC0415

    folder, ask = ceremony.TrustFolder(trust), _passphrase(passphrase_file)
    development = bool(_development(folder.root))
    signers = ceremony.open_keys(key, ask)
    fresh = new_key(new, None if development else _passphrase(passphrase_file, confirm=True)(new)) if new else None
    release = ceremony.open_keys([release_key], ask) if release_key else []
    done = ceremony.rotate(folder, role, signers, datetime.now(UTC), retire=retire, new=fresh, release_signers=release)
    _tell(done, folder.root)


def _development(root: bytes) -> bool:
    from models.signed_set import is_development  # noqa: PLC0415

    return is_development(root)


def _tell(done: Any, root: bytes) -> None:
    if done.missing:
        err.print(
            f"root {done.version} waits in {done.path}: {done.missing} more signature(s), by `sortline keys sign`"
        )
    else:
        err.print(f"root {done.version} is complete: {done.path}; bring it to the control plane with `keys push`")
    _warn_of(root)


@keys.command("sign")
def sign(
    key: KeyFiles,
    bundle: Annotated[Path | None, typer.Argument(help="A bundle to release; none: the root that waits.")] = None,
    trust: Trust = DEFAULT_TRUST,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Release a bundle with the release key, or add a signature to a root that waits. No control plane needed."""
    from control_plane.trust import ceremony  # noqa: PLC0415
    from models.bundle import read_bundle  # noqa: PLC0415

    folder = ceremony.TrustFolder(trust)
    signers = ceremony.open_keys(key, _passphrase(passphrase_file))
    if bundle is None:
        _tell(ceremony.add_signature(folder, signers), folder.root)
        return
    found = read_bundle(bundle)
    targets = ceremony.release(folder.targets, folder.root, found.manifest, signers[0], datetime.now(UTC))
    folder.write("targets.json", targets)
    err.print(f"{found.digest} is released in {trust / 'targets.json'}; bring it to the control plane with `keys push`")
    _warn_of(folder.root)


@keys.command("renew")
def renew(key: KeyFiles, trust: Trust = DEFAULT_TRUST, passphrase_file: PassphraseFile = None) -> None:
    """Give the targets another year, with the release key; what is released stays."""
    from control_plane.trust import ceremony  # noqa: PLC0415

    folder = ceremony.TrustFolder(trust)
    signers = ceremony.open_keys(key, _passphrase(passphrase_file))
    folder.write("targets.json", ceremony.renew_targets(folder.targets, folder.root, signers, datetime.now(UTC)))
    err.print(f"{trust / 'targets.json'} is renewed; bring it to the control plane with `keys push`")


@keys.command("push")
def push(trust: Trust = DEFAULT_TRUST, server: Server = "") -> None:
    """Bring roots and targets of a folder to the control plane, which verifies them like anybody would."""
    from control_plane.client import Client  # noqa: PLC0415
    from control_plane.trust.ceremony import TrustFolder  # noqa: PLC0415
    from models.signed_set import make_set  # noqa: PLC0415

    folder = TrustFolder(trust)
    data = make_set(folder.roots(), {"targets": folder.targets})
    done = Client(server).post("/api/v1/trust/set?actor=cli", content=data)
    err.print("taken: " + (", ".join(done["taken"]) or "nothing new"))


@keys.command("pull")
def pull(trust: Trust = DEFAULT_TRUST, server: Server = "") -> None:
    """Bring a folder up to what the control plane has by now; do this before a ceremony. Everything is verified."""
    from control_plane.client import Client  # noqa: PLC0415
    from control_plane.trust.ceremony import TrustFolder, follow  # noqa: PLC0415
    from models.signed_set import parse_set  # noqa: PLC0415

    known = parse_set(Client(server).get("/api/v1/trust/set"))
    new = follow(TrustFolder(trust), [bytes(root) for root in known.roots], known.part("targets"))
    err.print("new here: " + (", ".join(new) or "nothing"))


@keys.command("status")
def status(
    trust: Annotated[Path | None, typer.Option("--trust", help="Look into a folder instead of asking.")] = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Roles, keys, versions, expiry; an alarm from two thirds of a life on, or 80 % of the size (exit status 1)."""
    from control_plane.trust.signing import FULL_SHARE  # noqa: PLC0415

    found = _local_status(trust) if trust is not None else _remote_status(server)
    say(found, as_json=as_json, table=_status_table)
    if found["development"]:
        warn_development()
    full = {part: share for part, share in found["fill"].items() if share >= FULL_SHARE}
    for part, share in full.items():
        err.print(f"[bold red]{part} {share:.0%} full[/]: {_CURES[part]}")
    if full or any(role["alarm"] for role in found["roles"]):
        raise typer.Exit(1)


_CURES = {
    "set": "withdraw bundles that nobody shall start any more",
    "bin": "too many agents for one control plane; give some of them another",
}


def _remote_status(server: str) -> dict[str, Any]:
    from control_plane.client import Client  # noqa: PLC0415

    return dict(Client(server).get("/api/v1/trust"))


def _local_status(trust: Path) -> dict[str, Any]:
    from control_plane.trust import ceremony  # noqa: PLC0415

    folder = ceremony.TrustFolder(trust)
    rows = ceremony.status(folder.root, {"targets": folder.targets}, datetime.now(UTC))
    return {"development": _development(folder.root), "roles": [asdict(row) for row in rows], "fill": {}}


def _status_table(found: dict[str, Any]) -> Table:
    rows = [
        [
            row["role"],
            row["version"] or None,
            f"{row['threshold']} of {len(row['keys'])}",
            " ".join(row["keys"]),
            row["expires_at"][:10] or None,
            f"[bold red]{row['alarm']}[/]" if row["alarm"] else "good" if row["version"] else None,
        ]
        for row in found["roles"]
    ]
    return table_of(["role", "version", "must sign", "keys", "expires", "state"], rows)


# -- models: release and withdraw -------------------------------------------------------------------------------------


def release(
    reference: Annotated[str, typer.Argument(help="NAME, NAME:NUMBER or a bundle digest.")],
    key: KeyFiles,
    server: Server = "",
    passphrase_file: PassphraseFile = None,
) -> None:
    """Release a registered version: signs here with the release key, the control plane gets the signature alone."""
    from control_plane.trust import ceremony  # noqa: PLC0415
    from models.bundle import parse_manifest  # noqa: PLC0415

    def change(client: Any, targets: bytes, root: bytes, digest: str, signer: Any) -> bytes:
        manifest = parse_manifest(client.get(f"/api/v1/blobs/{digest}"), digest=digest)
        return ceremony.release(targets, root, manifest, signer, datetime.now(UTC))

    _change_released(reference, key, server, passphrase_file, change)
    err.print(f"{reference} is released: it may be rolled out")


def withdraw(
    reference: Annotated[str, typer.Argument(help="NAME, NAME:NUMBER or a bundle digest.")],
    key: KeyFiles,
    server: Server = "",
    passphrase_file: PassphraseFile = None,
) -> None:
    """Take a release back: no agent starts with it any more; where it runs it goes on until the next rollout.

    Prints one agent id per line: those that still run it.
    """
    from control_plane.client import Client  # noqa: PLC0415
    from control_plane.trust import ceremony  # noqa: PLC0415

    def change(_client: Any, targets: bytes, root: bytes, digest: str, signer: Any) -> bytes:
        return ceremony.withdraw(targets, root, digest, signer, datetime.now(UTC))

    digest = _change_released(reference, key, server, passphrase_file, change)
    err.print(f"{reference} is withdrawn")
    running = [agent["id"] for agent in Client(server).get("/api/v1/agents") if agent["active"] == digest]
    if running:
        err.print(f"{len(running)} agents still run it, until a rollout gives them another (sortline rollouts create):")
        typer.echo("\n".join(running))


def _change_released(
    reference: str, key: list[Path], server: str, passphrase_file: Path | None, change: Callable[..., bytes]
) -> str:
    """Changes what is released; returns the digest of the bundle."""
    from control_plane.client import Client  # noqa: PLC0415
    from control_plane.trust import ceremony  # noqa: PLC0415
    from models.signed_set import make_set, parse_set  # noqa: PLC0415

    client = Client(server)
    digest = str(client.get(f"/api/v1/versions/{reference}")["bundle"])
    known = parse_set(client.get("/api/v1/trust/set"))
    root = bytes(known.roots[-1])
    (signer,) = ceremony.open_keys(key[:1], _passphrase(passphrase_file))
    targets = change(client, known.part("targets"), root, digest, signer)
    client.post("/api/v1/trust/set?actor=cli", content=make_set([], {"targets": targets}))
    _warn_of(root)
    return digest


def export(
    agent: Annotated[str, typer.Option(help="Agent id.")],
    to: Annotated[Path, typer.Option(help="New folder, for example on a stick.")],
    server: Server = "",
) -> None:
    """Write what an agent without network needs: signed metadata, its assignment, its bundle.

    There: `sortline-agent import FOLDER`. The agent verifies it as if it had come over the network.
    """
    from control_plane.client import Client  # noqa: PLC0415
    from control_plane.trust.export import export_agent  # noqa: PLC0415

    facts = export_agent(Client(server), agent, to)
    err.print(
        f"{facts['files']} files, {facts['bytes'] / 1e6:.1f} MB for {agent} in {to}: bundle {facts['bundle'][:12]}"
    )

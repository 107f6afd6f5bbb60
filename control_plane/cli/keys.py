"""Key ceremonies. Offline keys are opened here and never sent anywhere."""

import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from rich.table import Table

from control_plane.cli.output import (
    Actor,
    AsJson,
    Server,
    acting,
    alarming,
    banner,
    note,
    say,
    table_of,
    warn,
)
from control_plane.client import Client
from models.errors import ConfigError, InputError
from models.text import counted

keys = typer.Typer(no_args_is_help=True, help="Keys that decide what may run (see docs/operating.md).")

Trust = Annotated[Path, typer.Option("--trust", help="Folder of public metadata and online keys.")]
KeyFiles = Annotated[list[Path], typer.Option("--key", help="File of a private key; once for each key.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        help="File that holds the passphrase of the keys. Without it, the environment variable "
        "SORTLINE_KEY_PASSPHRASE; without that, a question on the terminal.",
        show_default=False,
    ),
]
DEFAULT_TRUST = Path("sortline-data/trust")


def passphrase_from(file: Path | None, *, confirm: bool = False) -> Callable[[Path], str]:
    """Returns what asks for the passphrase of a key file: in a file, the environment, or the terminal."""

    def ask(key: Path) -> str:
        if file is not None:
            try:
                return file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ConfigError("keys.unreadable", f"{file} cannot be read.", got=error.strerror) from error
        given = os.environ.get("SORTLINE_KEY_PASSPHRASE")
        return given or str(typer.prompt(f"Passphrase of {key}", hide_input=True, confirmation_prompt=confirm))

    return ask


def warn_of_development(root: bytes) -> None:
    """Prints the red banner where the root says that its keys are development keys."""
    from control_plane.trust.keys import BANNER  # noqa: PLC0415
    from models.signed_set import is_development  # noqa: PLC0415

    if is_development(root):
        banner(BANNER)


@keys.command("init")
def init(
    trust: Trust = DEFAULT_TRUST,
    root_key: Annotated[
        list[Path] | None, typer.Option(help="New file for a root key; three times, each on a medium of its own.")
    ] = None,
    release_key: Annotated[Path | None, typer.Option(help="New file for the release key.")] = None,
    development: Annotated[
        bool,
        typer.Option("--development", help="Keep all keys in the trust folder, unencrypted; one signature is enough."),
    ] = False,
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
        warn_of_development(TrustFolder(trust).root)
    else:
        if not release_key:
            raise InputError("keys.wrong_number", "Name the release key.", expected="--release-key FILE", got="none")
        ask = passphrase_from(passphrase_file, confirm=True)
        initialise(TrustFolder(trust), root_key or [], release_key, ask, datetime.now(UTC))
    note(f"metadata and online keys are in {trust}; the trust anchor of every box is {trust / '1.root.json'}")


@keys.command("rotate")
def rotate(
    role: Annotated[str, typer.Argument(help="`root`, `release` or `online`.")],
    key: KeyFiles,
    trust: Trust = DEFAULT_TRUST,
    new: Annotated[Path | None, typer.Option(help="File for the new key (root, release).")] = None,
    retire: Annotated[
        str, typer.Option(help="For root: first digits of the id of the key that the new one replaces.")
    ] = "",
    release_key: Annotated[
        Path | None, typer.Option(help="For online: file of the release key, which signs the targets.")
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Replace keys by writing the next root. `rotate root` without --new only renews it for another year.

    Two root keys must sign. When they are not in one place, sign with one here and with the other by `keys sign`. Then
    bring the folder to the control plane: `sortline keys push`.
    """
    from control_plane.trust import ceremony  # noqa: PLC0415
    from control_plane.trust.keys import new_key  # noqa: PLC0415

    folder, ask = ceremony.TrustFolder(trust), passphrase_from(passphrase_file)
    ceremony.check_replacement(folder, role, retire, new=new is not None)
    development = bool(_development(folder.root))
    signers = ceremony.open_keys(key, ask)
    fresh = new_key(new, None if development else passphrase_from(passphrase_file, confirm=True)(new)) if new else None
    release = ceremony.open_keys([release_key], ask) if release_key else []
    done = ceremony.rotate(folder, role, signers, datetime.now(UTC), retire=retire, new=fresh, release_signers=release)
    _tell(done, folder.root)


def _development(root: bytes) -> bool:
    from models.signed_set import is_development  # noqa: PLC0415

    return is_development(root)


def _tell(done: Any, root: bytes) -> None:
    if done.missing:
        missing = counted(done.missing, "more signature")
        note(f"root {done.version} waits in {done.path} for {missing}, by `sortline keys sign`")
    else:
        note(f"root {done.version} is complete: {done.path}; bring it to the control plane with `keys push`")
    warn_of_development(root)


@keys.command("id")
def key_id(
    key: Annotated[list[Path], typer.Argument(help="Files of private keys.")],
    trust: Annotated[
        Path | None, typer.Option("--trust", help="Also say which role the key has in this folder.", show_default=False)
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Print the id of each key file, as `keys status` and `keys rotate --retire` name it."""
    from control_plane.trust import ceremony  # noqa: PLC0415

    found = []
    for file, signer in zip(key, ceremony.open_keys(key, passphrase_from(passphrase_file)), strict=True):
        keyid = signer.public_key.keyid
        role = ceremony.role_of_key(ceremony.TrustFolder(trust), keyid) if trust else None
        found.append({"file": str(file), "id": keyid, "role": role})
    say(found, as_json=as_json, table=_id_table)


def _id_table(found: list[dict[str, Any]]) -> Table:
    return table_of(["id", "role", "file"], [[row["id"][:12], row["role"] or None, row["file"]] for row in found])


@keys.command("sign")
def sign(
    key: KeyFiles,
    bundle: Annotated[
        Path | None, typer.Argument(help="Directory of a bundle to release. Without it, the root that waits is signed.")
    ] = None,
    trust: Trust = DEFAULT_TRUST,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Release a bundle with the release key, or add a signature to a root that waits. No control plane needed."""
    from control_plane.trust import ceremony  # noqa: PLC0415
    from models.bundle import read_bundle  # noqa: PLC0415

    folder = ceremony.TrustFolder(trust)
    signers = ceremony.open_keys(key, passphrase_from(passphrase_file))
    if bundle is None:
        _tell(ceremony.add_signature(folder, signers), folder.root)
        return
    found = read_bundle(bundle)
    targets = ceremony.release(folder.targets, folder.root, found.manifest, signers[0], datetime.now(UTC))
    folder.write("targets.json", targets)
    note(f"{found.digest} is released in {trust / 'targets.json'}; bring it to the control plane with `keys push`")
    warn_of_development(folder.root)


@keys.command("renew")
def renew(key: KeyFiles, trust: Trust = DEFAULT_TRUST, passphrase_file: PassphraseFile = None) -> None:
    """Give the targets another year, with the release key; what is released stays."""
    from control_plane.trust import ceremony  # noqa: PLC0415

    folder = ceremony.TrustFolder(trust)
    signers = ceremony.open_keys(key, passphrase_from(passphrase_file))
    folder.write("targets.json", ceremony.renew_targets(folder.targets, folder.root, signers, datetime.now(UTC)))
    note(f"{trust / 'targets.json'} is renewed; bring it to the control plane with `keys push`")


@keys.command("push")
def push(trust: Trust = DEFAULT_TRUST, actor: Actor = "", server: Server = "") -> None:
    """Bring roots and targets of a folder to the control plane, which verifies them as every agent does."""
    from control_plane.trust.ceremony import TrustFolder  # noqa: PLC0415
    from models.signed_set import make_set  # noqa: PLC0415

    folder = TrustFolder(trust)
    data = make_set(folder.roots(), {"targets": folder.targets})
    done = Client(server).post(f"/api/v1/trust/set?{urlencode({'actor': acting(actor)})}", content=data)
    note("taken: " + (", ".join(done["taken"]) or "nothing new"))
    for word in ("released", "withdrawn"):
        for digest in done[word]:
            note(f"{word}: {digest}")


@keys.command("pull")
def pull(
    trust: Trust = DEFAULT_TRUST,
    discard: Annotated[
        bool, typer.Option("--discard", help="Give up targets that were signed in this folder alone.")
    ] = False,
    server: Server = "",
) -> None:
    """Bring a folder up to date with the control plane, before a ceremony. Everything is verified."""
    from control_plane.trust.ceremony import TrustFolder, follow  # noqa: PLC0415
    from models.signed_set import parse_set  # noqa: PLC0415

    known = parse_set(Client(server).get("/api/v1/trust/set"))
    new = follow(TrustFolder(trust), [bytes(root) for root in known.roots], known.part("targets"), discard=discard)
    note("new here: " + (", ".join(new) or "nothing"))


@keys.command("status")
def status(
    trust: Annotated[
        Path | None, typer.Option("--trust", help="Look into this folder instead of asking the control plane.")
    ] = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Print roles, keys, versions and expiry, and which bundles are released and withdrawn.

    The exit status is 1 when a role is past two thirds of its life, or when 80 % of a size limit is used.
    """
    from control_plane.trust.keys import BANNER  # noqa: PLC0415
    from control_plane.trust.signing import FULL_SHARE  # noqa: PLC0415

    found = _local_status(trust) if trust is not None else _remote_status(server)
    say(found, as_json=as_json, table=_status_tables)
    if found["development"]:
        banner(BANNER)
    full = {part: share for part, share in found["fill"].items() if share >= FULL_SHARE}
    for part, share in full.items():
        warn(f"{part} {share:.0%} full", _CURES[part])
    if full or any(role["alarm"] for role in found["roles"]):
        raise typer.Exit(1)


_CURES = {
    "set": "withdraw bundles that no agent is to start any more",
    "bin": "too many agents for one control plane; give some of them another",
}


def _remote_status(server: str) -> dict[str, Any]:

    return dict(Client(server).get("/api/v1/trust"))


def _local_status(trust: Path) -> dict[str, Any]:
    from control_plane.trust import ceremony  # noqa: PLC0415

    folder = ceremony.TrustFolder(trust)
    rows = ceremony.status(folder.root, {"targets": folder.targets}, datetime.now(UTC))
    released, withdrawn = ceremony.released_and_withdrawn(folder.targets)
    return {
        "development": _development(folder.root),
        "roles": [asdict(row) for row in rows],
        "fill": {},
        "released": released,
        "withdrawn": withdrawn,
    }


def _status_tables(found: dict[str, Any]) -> list[Table]:
    rows = [
        [digest[:12], facts.get("name"), "released", str(facts.get("released_at", ""))[:16] or None]
        for digest, facts in found.get("released", {}).items()  # a server of an older version does not say
    ]
    rows += [[digest[:12], None, alarming("withdrawn"), None] for digest in found.get("withdrawn", ())]
    return [_status_table(found), *([table_of(["bundle", "name", "release", "since"], rows)] if rows else [])]


def _status_table(found: dict[str, Any]) -> Table:
    rows = [
        [
            row["role"],
            row["version"] or None,
            f"{row['threshold']} of {len(row['keys'])}",
            " ".join(row["keys"]),
            row["expires_at"][:10] or None,
            alarming(row["alarm"]) if row["alarm"] else "good" if row["version"] else None,
        ]
        for row in found["roles"]
    ]
    return table_of(["role", "version", "must sign", "keys", "expires", "state"], rows)

"""Commands on registered models: list, show, stage, push, release, withdraw."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer
from rich.table import Table

from control_plane.cli.keys import KeyFiles, PassphraseFile, passphrase_from, warn_of_development
from control_plane.cli.output import Actor, AsJson, Server, acting, note, say, show, table_of
from control_plane.client import Client
from models.text import counted

models = typer.Typer(no_args_is_help=True, help="Models and their versions.")
Reference = Annotated[str, typer.Argument(help="NAME (its newest version), NAME:NUMBER, or a bundle digest.")]


@models.command("list")
def model_list(server: Server = "", as_json: AsJson = False) -> None:
    """List all models and versions, newest first."""

    def table(found: list[dict[str, Any]]) -> Table:
        rows = [
            [
                f"{m['name']}:{v['number']}",
                v["stage"],
                v["release"] or None,
                v["bundle"][:12],
                v["size_bytes"] // 1024,
                v["created_at"][:16],
            ]
            for m in found
            for v in m["versions"]
        ]
        return table_of(["version", "stage", "release", "bundle", "KB", "made"], rows)

    say(Client(server).get("/api/v1/models"), as_json=as_json, table=table)


@models.command("show")
def model_show(reference: Reference, server: Server = "", as_json: AsJson = False) -> None:
    """Print one version with its lineage and its model card."""
    found = Client(server).get(f"/api/v1/versions/{quote(reference, safe='')}")
    if as_json:
        say(found, as_json=True)
        return
    card = found.pop("card", "")
    say({name: value for name, value in found.items() if name not in {"metrics", "lineage"}}, as_json=False)
    show("", *card.splitlines())


@models.command("stage")
def model_stage(
    reference: Reference,
    stage: Annotated[str, typer.Argument(help="`none`, `staging`, `production` or `archived`.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the audit trail.")],
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Move a version to a stage."""
    body = {"stage": stage, "reason": reason, "actor": acting(actor)}
    found = Client(server).post(f"/api/v1/versions/{quote(reference, safe='')}/stage", body)
    if as_json:
        say(found, as_json=True)
    else:
        note(f"{reference} is in stage {found['stage']}")


@models.command("push")
def model_push(
    directory: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    actor: Actor = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Register a bundle from disk."""
    from models.bundle import pack, read_bundle  # noqa: PLC0415

    name = read_bundle(directory).manifest.name
    query = urlencode({"actor": acting(actor)})
    found = Client(server).post(f"/api/v1/versions?{query}", content=pack(directory))
    if as_json:
        say(found, as_json=True)
    else:
        show(f"{name}:{found['number']}  {found['bundle']}")


@models.command("release")
def release(
    reference: Reference,
    key: KeyFiles,
    actor: Actor = "",
    server: Server = "",
    passphrase_file: PassphraseFile = None,
) -> None:
    """Release a registered version: agents start with released bundles only.

    The release key signs here; the control plane gets the signature alone.
    """
    from control_plane.trust import ceremony  # noqa: PLC0415
    from models.bundle import parse_manifest  # noqa: PLC0415

    def change(client: Client, targets: bytes, root: bytes, digest: str, signer: Any) -> bytes:
        manifest = parse_manifest(client.get(f"/api/v1/blobs/{digest}"), digest=digest)
        return ceremony.release(targets, root, manifest, signer, datetime.now(UTC))

    _change_released(Client(server), reference, key, passphrase_file, actor, change)
    note(f"{reference} is released: it may be rolled out")


@models.command("withdraw")
def withdraw(
    reference: Reference,
    key: KeyFiles,
    actor: Actor = "",
    server: Server = "",
    passphrase_file: PassphraseFile = None,
) -> None:
    """Take a release back: no agent starts with the bundle any more; where it runs, it goes on until the next rollout.

    Prints the ids of the agents that still run it, one per line.
    """
    from control_plane.trust import ceremony  # noqa: PLC0415

    def change(_client: Client, targets: bytes, root: bytes, digest: str, signer: Any) -> bytes:
        return ceremony.withdraw(targets, root, digest, signer, datetime.now(UTC))

    client = Client(server)
    digest = _change_released(client, reference, key, passphrase_file, actor, change)
    note(f"{reference} is withdrawn")
    running = [agent["id"] for agent in client.get("/api/v1/agents") if agent["active"] == digest]
    if running:
        still = "runs" if len(running) == 1 else "run"
        note(f"{counted(len(running), 'agent')} still {still} it, until a rollout brings another (rollouts create):")
        show(*running)


def _change_released(
    client: Client,
    reference: str,
    key: list[Path],
    passphrase_file: Path | None,
    actor: str,
    change: Callable[[Client, bytes, bytes, str, Any], bytes],
) -> str:
    """Changes what is released; returns the digest of the bundle."""
    from control_plane.trust import ceremony  # noqa: PLC0415
    from models.signed_set import make_set, parse_set  # noqa: PLC0415

    digest = str(client.get(f"/api/v1/versions/{quote(reference, safe='')}")["bundle"])
    known = parse_set(client.get("/api/v1/trust/set"))
    root = bytes(known.roots[-1])
    (signer,) = ceremony.open_keys(key[:1], passphrase_from(passphrase_file))
    targets = change(client, known.part("targets"), root, digest, signer)
    query = urlencode({"actor": acting(actor)})
    client.post(f"/api/v1/trust/set?{query}", content=make_set([], {"targets": targets}))
    warn_of_development(root)
    return digest

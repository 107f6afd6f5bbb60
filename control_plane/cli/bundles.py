"""Commands on bundles on disk."""

from pathlib import Path
from typing import Annotated

import typer

from control_plane.cli.output import AsJson, new_directory, new_file, note, say

bundles = typer.Typer(no_args_is_help=True, help="Bundles on disk.")
Directory = Annotated[Path, typer.Argument(help="Directory of the bundle.")]
Archive = Annotated[Path, typer.Argument(help="A bundle as one tar file.")]


@bundles.command("show")
def bundle_show(directory: Directory, as_json: AsJson = False) -> None:
    """Verify a bundle and print what is in it."""
    import msgspec  # noqa: PLC0415

    from models.bundle import read_bundle  # noqa: PLC0415

    bundle = read_bundle(directory)
    facts = {
        "digest": bundle.digest,
        "name": bundle.manifest.name,
        "size_bytes": bundle.manifest.size_bytes,
        "files": {entry.path: entry.size_bytes for entry in bundle.manifest.files},
        "preprocess": msgspec.to_builtins(bundle.preprocess),
        "recipe": msgspec.to_builtins(bundle.recipe),
        "lineage": bundle.lineage,
    }
    if not as_json:
        facts["lineage"] = {name: entry for name, entry in bundle.lineage.items() if name not in _LONG}
    say(facts, as_json=as_json)


_LONG = frozenset({"held_out", "metrics"})
"""Parts of the lineage that fill screens; `--json` has them."""


@bundles.command("verify")
def bundle_verify(directory: Directory) -> None:
    """Verify every file and reproduce the golden views on this machine."""
    from models.bundle import read_bundle  # noqa: PLC0415
    from models.classifier import OnnxClassifier  # noqa: PLC0415

    bundle = read_bundle(directory)
    difference = bundle.golden.check(OnnxClassifier(bundle.model))
    note(f"{bundle.digest} is whole; golden views reproduce within {difference:.2g}")


@bundles.command("pack")
def bundle_pack(directory: Directory, archive: Archive) -> None:
    """Pack a bundle into a tar."""
    from models.bundle import pack, read_bundle  # noqa: PLC0415
    from models.files import write_atomically  # noqa: PLC0415

    new_file(archive)
    digest = read_bundle(directory).digest
    write_atomically(archive, pack(directory))
    note(f"{digest} is packed in {archive}")


@bundles.command("unpack")
def bundle_unpack(archive: Archive, directory: Directory) -> None:
    """Unpack and verify a tar."""
    from models.bundle import unpack  # noqa: PLC0415

    new_directory(directory)
    note(f"{unpack(archive.read_bytes(), directory).digest} is unpacked in {directory}")

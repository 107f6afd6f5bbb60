"""Commands on bundles on disk."""

from pathlib import Path

import typer

from control_plane.cli.output import AsJson, err, say

bundles = typer.Typer(no_args_is_help=True, help="Bundles on disk.")


@bundles.command("show")
def bundle_show(directory: Path, as_json: AsJson = False) -> None:
    """Verify a bundle and say what is in it."""
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
    say(facts, as_json=as_json)


@bundles.command("verify")
def bundle_verify(directory: Path) -> None:
    """Verify every file and reproduce the golden views on this machine."""
    from models.bundle import read_bundle  # noqa: PLC0415
    from models.classifier import OnnxClassifier  # noqa: PLC0415

    bundle = read_bundle(directory)
    difference = bundle.golden.check(OnnxClassifier(bundle.model))
    err.print(f"{bundle.digest} is whole; golden views reproduce within {difference:.2g}")


@bundles.command("pack")
def bundle_pack(directory: Path, archive: Path) -> None:
    """Pack a bundle into a tar."""
    from models.bundle import pack, read_bundle  # noqa: PLC0415
    from models.files import write_atomically  # noqa: PLC0415

    read_bundle(directory)
    write_atomically(archive, pack(directory))


@bundles.command("unpack")
def bundle_unpack(archive: Path, directory: Path) -> None:
    """Unpack and verify a tar."""
    from models.bundle import unpack  # noqa: PLC0415

    err.print(unpack(archive.read_bytes(), directory).digest)

"""The bundle: one atomic, content-addressed deployable. `BUNDLE.md` beside this file is its document.

A directory whose `manifest.json` lists every file with size, sha256 and the sha256 of its chunks; the digest of a
bundle is the sha256 of its manifest. Chunks are cut where the content chooses (`chunking`), so that two versions of a
file share what did not change. Rules a reader keeps, in this order:

1. The manifest is parsed under a size limit; unknown versions, unknown fields, absolute or `..` paths, unsorted or
   duplicate entries, sizes over the limits are refused before any other file is opened.
2. The directory holds exactly the files listed (and the manifest): extra or missing ones are refused by name.
3. Every file has its size and sha256 before its content is parsed.
4. Every part is parsed and checked, and the parts must fit each other.

Laws: `read(write(b)) == b`; equal content has an equal digest; `unpack(pack(b)) == b`.
"""

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal, TypeVar

import msgspec
import numpy as np

from models.chunking import CHUNK_BYTES, cut
from models.errors import BundleError
from models.files import write_atomically
from models.golden import GOLDEN, MAX_GOLDEN_VIEWS, Golden
from models.profile import Profile, feature_names, parse_profile
from models.recipe import Name, Recipe, parse_recipe
from models.topics import MAX_BLOB_BYTES
from models.versioning import version_in
from models.view_spec import PreprocessSpec

VERSION: Final = 2
MAX_MANIFEST_BYTES: Final = MAX_BLOB_BYTES
"""The manifest itself travels as one blob."""
MAX_FILE_BYTES: Final = 256 * 1024 * 1024
MAX_BUNDLE_BYTES: Final = 512 * 1024 * 1024
MANIFEST: Final = "manifest.json"
MODEL: Final = "model.onnx"
PREPROCESS: Final = "preprocess.json"
RECIPE: Final = "recipe.json"
PROFILE: Final = "profile.msgpack"
CARD: Final = "card.md"
LINEAGE: Final = "lineage.json"
PARTS: Final = tuple(sorted((MODEL, PREPROCESS, RECIPE, PROFILE, GOLDEN, CARD, LINEAGE)))
"""Files a bundle has, no more and no fewer. Signatures are detached and stay outside the digest."""

T = TypeVar("T")
_Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A piece of a file: `[sha256, size]`."""

    sha256: _Sha256
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES)]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a bundle."""

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]
    sha256: _Sha256
    chunks: tuple[Chunk, ...]
    """What the file consists of, in order; their sizes sum to the file's."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Table of contents of a bundle (`manifest.json`, canonical JSON)."""

    schema_version: Literal[2] = VERSION
    kind: Literal["sortline-bundle"] = "sortline-bundle"
    name: Name
    files: tuple[FileEntry, ...]

    def encoded(self) -> bytes:
        """Returns canonical JSON: sorted keys, no white space. Its sha256 is the bundle's digest."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def size_bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(entry.size_bytes for entry in self.files)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files were verified and parsed."""

    digest: str
    manifest: Manifest
    preprocess: PreprocessSpec
    recipe: Recipe
    profile: Profile
    golden: Golden
    model: bytes
    card: str
    lineage: dict[str, object]


def sha256(data: bytes) -> str:
    """Returns the hexadecimal sha256 digest."""
    return hashlib.sha256(data).hexdigest()


def blobs_of(manifest: Manifest, read: Callable[[FileEntry], bytes]) -> Iterator[tuple[str, bytes]]:
    """Yields every blob of a bundle once, as (digest, bytes): the manifest, then the chunks of every file.

    Args:
        manifest: Manifest of the bundle.
        read: Returns the bytes of a file.
    """
    data = manifest.encoded()
    yield sha256(data), data
    seen: set[str] = set()
    for entry in manifest.files:
        content, at = memoryview(read(entry)), 0
        for chunk in entry.chunks:
            if chunk.sha256 not in seen:
                seen.add(chunk.sha256)
                yield chunk.sha256, bytes(content[at : at + chunk.size_bytes])
            at += chunk.size_bytes


def describe(name: str, files: Mapping[str, bytes]) -> Manifest:
    """Returns the manifest of these files."""
    entries = tuple(
        FileEntry(
            path=path,
            size_bytes=len(data),
            sha256=sha256(data),
            chunks=tuple(Chunk(sha256(part), len(part)) for part in cut(data)),
        )
        for path, data in sorted(files.items())
    )
    return Manifest(name=name, files=entries)


def write_bundle(directory: Path, name: str, files: Mapping[str, bytes]) -> Bundle:
    """Writes a bundle atomically and reads it back.

    Args:
        directory: Directory to be made; it must not exist.
        name: Name of the model.
        files: Content of each of the `PARTS`.

    Raises:
        BundleError: `bundle.exists`, and everything `read_bundle` refuses: a bundle that could not be read is not
            written.
    """
    if directory.exists():
        raise BundleError("bundle.exists", f"{directory} is already there.", expected="a new directory", got=directory)
    manifest = parse_manifest(describe(name, files).encoded())
    bundle = _assemble(manifest, dict(files))
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for path, data in files.items():
            write_atomically(partial / path, data)
        write_atomically(partial / MANIFEST, manifest.encoded())
        partial.rename(directory)
    except BaseException:
        for leftover in partial.glob("*"):
            leftover.unlink()
        partial.rmdir()
        raise
    return bundle


def parse_manifest(data: bytes, *, digest: str | None = None) -> Manifest:
    """Reads a manifest from an untrusted source.

    Args:
        data: Content of `manifest.json`.
        digest: The sha256 it must have, where that is known.

    Raises:
        BundleError: `bundle.oversize`, `bundle.wrong_digest`, `bundle.wrong_version`, `bundle.malformed_manifest`,
            `bundle.unsafe_path`, `bundle.wrong_files`.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(
            "bundle.oversize",
            "The manifest is too large.",
            expected=f"<= {MAX_MANIFEST_BYTES} bytes",
            got=len(data),
        )
    if digest is not None and sha256(data) != digest:
        raise BundleError(
            "bundle.wrong_digest", "The manifest is not the one named.", expected=digest, got=sha256(data)
        )
    manifest = _decode_manifest(data)
    for entry in manifest.files:
        _check_entry(entry)
    paths = [entry.path for entry in manifest.files]
    if tuple(paths) != PARTS:
        raise BundleError(
            "bundle.wrong_files",
            "The manifest does not list the parts of a bundle.",
            expected=list(PARTS),
            got=paths,
        )
    if manifest.size_bytes > MAX_BUNDLE_BYTES:
        raise BundleError(
            "bundle.oversize",
            "The bundle is too large.",
            expected=f"<= {MAX_BUNDLE_BYTES} bytes",
            got=manifest.size_bytes,
        )
    return manifest


def _decode_manifest(data: bytes) -> Manifest:
    version = version_in(data, absent=0)
    if version is not None and version != VERSION:
        raise BundleError(
            "bundle.wrong_version",
            "The bundle has an unknown version.",
            expected=VERSION,
            got=version,
        )
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            "bundle.malformed_manifest",
            "manifest.json is no manifest.",
            expected="Manifest",
            got=str(error)[:300],
        ) from error


def _check_entry(entry: FileEntry) -> None:
    path = PurePosixPath(entry.path)
    if path.is_absolute() or ".." in path.parts or "\\" in entry.path or "\0" in entry.path or str(path) != entry.path:
        raise BundleError(
            "bundle.unsafe_path",
            "The manifest names a file outside the bundle.",
            expected="a relative path without ..",
            got=entry.path,
        )
    found = sum(chunk.size_bytes for chunk in entry.chunks)
    if found != entry.size_bytes:
        raise BundleError(
            "bundle.malformed_manifest",
            f"The chunks of {entry.path} do not make up the file.",
            expected=f"{entry.size_bytes} bytes",
            got=f"{found} bytes in {len(entry.chunks)} chunks",
        )


def read_bundle(directory: Path, *, digest: str | None = None) -> Bundle:
    """Reads and verifies a bundle.

    Args:
        directory: Directory of the bundle.
        digest: The digest it must have, where that is known.

    Raises:
        BundleError: See the rules in the module's docstring.
    """
    manifest = parse_manifest(_read_file(directory / MANIFEST, MAX_MANIFEST_BYTES), digest=digest)
    found = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.name != MANIFEST)
    if tuple(found) != PARTS:
        raise BundleError(
            "bundle.wrong_files",
            f"{directory} does not hold the files its manifest lists.",
            expected=list(PARTS),
            got=found,
        )
    files = {entry.path: _read_entry(directory, entry) for entry in manifest.files}
    return _assemble(manifest, files)


def _read_entry(directory: Path, entry: FileEntry) -> bytes:
    data = _read_file(directory / entry.path, entry.size_bytes)
    if len(data) != entry.size_bytes or sha256(data) != entry.sha256:
        raise BundleError(
            "bundle.wrong_digest",
            f"{entry.path} is not the file the manifest lists.",
            expected=f"{entry.size_bytes} bytes, sha256 {entry.sha256}",
            got=f"{len(data)} bytes, sha256 {sha256(data)}",
        )
    return data


def _read_file(path: Path, limit: int) -> bytes:
    """Reads a file of at most `limit` bytes; a longer one is refused without reading it."""
    try:
        if path.is_symlink() or not path.is_file():
            raise BundleError("bundle.wrong_files", f"{path} is not a regular file.", expected=path.name, got="nothing")
        size = path.stat().st_size
        if size > limit:
            raise BundleError("bundle.oversize", f"{path} is too large.", expected=f"<= {limit} bytes", got=size)
        return path.read_bytes()
    except OSError as error:
        raise BundleError(
            "bundle.unreadable", f"{path} cannot be read.", expected="a readable file", got=error.strerror
        ) from error


def _assemble(manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Parses the verified parts and checks that they fit each other."""
    bundle = Bundle(
        digest=sha256(manifest.encoded()),
        manifest=manifest,
        preprocess=_parse_json(files[PREPROCESS], PreprocessSpec, PREPROCESS),
        recipe=parse_recipe(files[RECIPE]),
        profile=parse_profile(files[PROFILE]),
        golden=parse_golden(files[GOLDEN]),
        model=files[MODEL],
        card=files[CARD].decode("utf-8", errors="replace"),
        lineage=_parse_json(files[LINEAGE], dict[str, object], LINEAGE),
    )
    bundle.preprocess.check()
    side, classes = bundle.preprocess.view_px, len(bundle.recipe.classes)
    embedding = bundle.golden.embedding.shape[1]
    facts = {
        "view": (bundle.golden.views.shape[1:], (side, side, 3)),
        "classes": (bundle.golden.probabilities.shape[1], classes),
        "features": (bundle.profile.features, feature_names(embedding)),
        "scalars": (bundle.golden.scalars.shape[1], len(bundle.preprocess.scalars)),
    }
    for name, (got, expected) in facts.items():
        if got != expected:
            raise BundleError(
                "bundle.inconsistent",
                f"The parts of the bundle do not fit: {name}.",
                expected=expected,
                got=got,
            )
    return bundle


def _parse_json(data: bytes, kind: type[T], name: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            "bundle.malformed",
            f"{name} cannot be read.",
            expected="valid JSON of version 1",
            got=str(error)[:300],
        ) from error


def parse_golden(data: bytes) -> Golden:
    """Reads `golden.npz`; pickles and archives that inflate beyond the size limit are refused.

    Raises:
        BundleError: `golden.malformed`.
    """
    wanted = {"views", "scalars", "probabilities", "embedding", "tolerance"}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inflated = sum(info.file_size for info in archive.infolist())
            names = {info.filename.removesuffix(".npy") for info in archive.infolist()}
        if inflated > MAX_FILE_BYTES or names != wanted:
            raise ValueError(f"{inflated} bytes of {sorted(names)}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            golden = Golden(
                views=arrays["views"],
                scalars=arrays["scalars"],
                probabilities=arrays["probabilities"],
                embedding=arrays["embedding"],
                tolerance=float(arrays["tolerance"]),
            )
        _check_golden(golden)
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BundleError(
            "golden.malformed",
            "golden.npz cannot be read.",
            expected=f"arrays {sorted(wanted)}",
            got=str(error)[:200],
        ) from error
    return golden


def _check_golden(golden: Golden) -> None:
    count = len(golden.views)
    rows = {len(golden.scalars), len(golden.probabilities), len(golden.embedding)}
    types_ok = golden.views.dtype == np.uint8 and all(
        a.dtype == np.float32 and a.ndim == 2 for a in (golden.scalars, golden.probabilities, golden.embedding)
    )
    if not types_ok or golden.views.ndim != 4 or rows != {count} or not 1 <= count <= MAX_GOLDEN_VIEWS:
        raise ValueError(f"{golden.views.dtype} {golden.views.shape} with {sorted(rows)} rows")
    if not 0.0 <= golden.tolerance <= 0.1:
        raise ValueError(f"tolerance {golden.tolerance}")


def pack(directory: Path) -> bytes:
    """Returns the bundle as an uncompressed tar with fixed owner, mode and time: equal bundles pack to equal bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted((MANIFEST, *PARTS)):
            data = (directory / path).read_bytes()
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def unpack(data: bytes, directory: Path) -> Bundle:
    """Writes the bundle in a tar to a new directory.

    Raises:
        BundleError: `bundle.malformed_tar`, and everything `read_bundle` refuses.
    """
    if len(data) > MAX_BUNDLE_BYTES + 1024 * 1024:
        raise BundleError(
            "bundle.oversize",
            "The archive is too large.",
            expected=f"<= {MAX_BUNDLE_BYTES} bytes",
            got=len(data),
        )
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isreg() else None
                if stream is None or member.name not in (MANIFEST, *PARTS) or member.name in files:
                    raise BundleError(
                        "bundle.wrong_files",
                        "The archive holds something that is no part of a bundle.",
                        expected=[MANIFEST, *PARTS],
                        got=member.name,
                    )
                files[member.name] = stream.read()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise BundleError(
            "bundle.malformed_tar",
            "This is no bundle archive.",
            expected="an uncompressed tar",
            got=str(error)[:200],
        ) from error
    manifest_data = files.pop(MANIFEST, b"")
    manifest = parse_manifest(manifest_data)
    if describe(manifest.name, files).encoded() != manifest_data:
        raise BundleError(
            "bundle.wrong_digest",
            "The files in the archive are not the ones its manifest lists.",
            expected=sha256(manifest_data),
            got=sha256(describe(manifest.name, files).encoded()),
        )
    return write_bundle(directory, manifest.name, files)

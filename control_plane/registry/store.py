"""Bytes by content: `sha256[:2]/sha256` in a folder. What is read is verified; equal content is kept once."""

from pathlib import Path

from models.bundle import MANIFEST, Bundle, Manifest, parse_manifest, read_bundle, sha256
from models.errors import InputError, UnavailableError
from models.files import write_atomically


class Store:
    """The bundle store.

    Args:
        root: Its folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        """Keeps these bytes; returns their digest."""
        digest = sha256(data)
        path = self._path(digest)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """Returns the bytes with this digest.

        Raises:
            InputError: `store.unknown`.
            UnavailableError: `store.corrupt`: the disk changed them.
        """
        path = self._path(digest)
        if not path.is_file():
            raise InputError(
                "store.unknown", "The store holds no such content.", expected="a stored digest", got=digest
            )
        data = path.read_bytes()
        if sha256(data) != digest:
            raise UnavailableError(
                "store.corrupt", f"{path} was changed on disk; restore it.", expected=digest, got=sha256(data)
            )
        return data

    def put_bundle(self, directory: Path) -> Bundle:
        """Verifies a bundle and keeps its files and manifest.

        Raises:
            BundleError: See `models.bundle.read_bundle`.
        """
        bundle = read_bundle(directory)
        for entry in bundle.manifest.files:
            self.put((directory / entry.path).read_bytes())
        self.put(bundle.manifest.encoded())
        return bundle

    def manifest(self, digest: str) -> Manifest:
        """Returns the manifest of a stored bundle."""
        return parse_manifest(self.get(digest), digest=digest)

    def part(self, digest: str, path: str) -> bytes:
        """One file of a stored bundle."""
        for entry in self.manifest(digest).files:
            if entry.path == path:
                return self.get(entry.sha256)
        raise InputError("store.unknown", "The bundle has no such part.", expected="a part", got=path)

    def write_directory(self, digest: str, directory: Path) -> Path:
        """Writes a stored bundle out as a directory."""
        manifest = self.manifest(digest)
        directory.mkdir(parents=True)
        for entry in manifest.files:
            write_atomically(directory / entry.path, self.get(entry.sha256))
        write_atomically(directory / MANIFEST, manifest.encoded())
        return directory

    def _path(self, digest: str) -> Path:
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise InputError(
                "store.bad_digest", "This is no digest.", expected="64 hexadecimal digits", got=digest[:80]
            )
        return self._root / digest[:2] / digest

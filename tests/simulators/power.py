"""Power cuts: records what a program does to its files and builds every state of the disk a cut could leave.

The model is the weakest that POSIX allows: a write or a change of length survives for certain only after an fsync of
the file, a name (create, link, rename, remove, mkdir) only after an fsync of its folder; what is not yet certain may be
lost in any combination. Looked at are: nothing lost, all lost, each alone lost, each alone kept.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Op:
    kind: str
    inode: int
    """The file or folder that is written; an fsync makes the data of a file durable, or the names in a folder."""
    name: str = ""
    target: int = 0
    offset: int = 0
    data: bytes = b""
    source: tuple[int, str] = (0, "")
    site: str = ""


@dataclass
class Disk:
    """A file system in memory: inode -> bytes or names."""

    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})

    def apply(self, op: Op) -> None:
        names = self.folders.setdefault(op.inode, {}) if op.kind in NAMES else {}
        if op.kind == "write":
            old = self.files.get(op.inode, b"")
            old = old.ljust(op.offset, b"\0")
            self.files[op.inode] = old[: op.offset] + op.data + old[op.offset + len(op.data) :]
        elif op.kind == "length":
            self.files[op.inode] = self.files.get(op.inode, b"")[: op.offset].ljust(op.offset, b"\0")
        elif op.kind == "mkdir":
            names[op.name] = op.target
            self.folders.setdefault(op.target, {})
        elif op.kind in {"create", "link"}:
            names[op.name] = op.target
        elif op.kind == "remove":
            names.pop(op.name, None)
        elif op.kind == "rename":
            folder, name = op.source
            if self.folders.get(folder, {}).get(name) == op.target:
                del self.folders[folder][name]
            names[op.name] = op.target

    def write_to(self, place: Path, inode: int = 0) -> None:
        place.mkdir(parents=True, exist_ok=True)
        for name, target in self.folders.get(inode, {}).items():
            if target in self.folders:
                self.write_to(place / name, target)
            else:
                (place / name).write_bytes(self.files.get(target, b""))

    def key(self, inode: int = 0, but: str = "") -> object:
        return tuple(
            (name, self.key(target) if target in self.folders else self.files.get(target, b""))
            for name, target in sorted(self.folders.get(inode, {}).items())
            if name != but
        )


NAMES = {"create", "link", "remove", "rename", "mkdir"}


class Recorder:
    """Watches `os` below a folder while it is patched in."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.ops: list[Op] = []
        self.marks: list[tuple[int, object]] = []
        self._descriptors: dict[int, list[int]] = {}
        self._count = 0
        self._ids: dict[int, int] = {}
        """The file system uses inode numbers again; ours never repeat."""
        self._real = {name: getattr(os, name) for name in dir(os)}
        for name in ("open", "close", "write", "pwrite", "fsync", "ftruncate", "posix_fallocate"):
            patch.setattr(os, name, getattr(self, f"_{name}"))
        for name in ("rename", "link", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, getattr(self, f"_{name}"))
        patch.setattr(os, "replace", self._rename)
        patch.setattr(os, "remove", self._unlink)
        patch.setattr(shutil, "_use_fd_functions", False)
        self.begin = self._image()

    def mark(self, fact: object) -> None:
        """Records a fact that must survive every later power cut."""
        self.marks.append((len(self.ops), fact))

    # -- what is watched --------------------------------------------------------------------------------------

    def _image(self) -> Disk:
        disk = Disk()
        for place in sorted(self.root.rglob("*")):
            inode = self._inode(place)
            disk.folders.setdefault(self._inode(place.parent), {})[place.name] = inode
            if place.is_dir():
                disk.folders.setdefault(inode, {})
            else:
                disk.files[inode] = place.read_bytes()
        return disk

    def _inode(self, path: object, *, new: bool = False) -> int:
        place = Path(path)  # type: ignore[arg-type]
        if place == self.root:
            return 0
        number = place.stat().st_ino
        if new or number not in self._ids:
            self._count += 1
            self._ids[number] = self._count
        return self._ids[number]

    def _inside(self, path: object) -> bool:
        return isinstance(path, str | Path) and Path(path).is_relative_to(self.root)

    def _name(self, kind: str, path: object, target: int = 0, **more: object) -> None:
        place = Path(path)  # type: ignore[arg-type]
        self.ops.append(Op(kind, self._inode(place.parent), place.name, target, **more))  # type: ignore[arg-type]

    def _open(self, path, flags, mode=0o777, **more):
        inside = self._inside(path)
        new = inside and not Path(path).exists()
        descriptor = self._real["open"](path, flags, mode, **more)
        if inside:
            inode = self._inode(path, new=new)
            self._descriptors[descriptor] = [inode, 0]
            if new:
                self._name("create", path, inode)
            elif flags & os.O_TRUNC:
                self.ops.append(Op("length", inode, offset=0))
        return descriptor

    def _close(self, descriptor):
        self._descriptors.pop(descriptor, None)
        return self._real["close"](descriptor)

    def _write(self, descriptor, data):
        size = self._real["write"](descriptor, data)
        if descriptor in self._descriptors:
            state = self._descriptors[descriptor]
            self.ops.append(Op("write", state[0], offset=state[1], data=bytes(data[:size])))
            state[1] += size
        return size

    def _pwrite(self, descriptor, data, offset):
        size = self._real["pwrite"](descriptor, data, offset)
        if descriptor in self._descriptors:
            self.ops.append(Op("write", self._descriptors[descriptor][0], offset=offset, data=bytes(data[:size])))
        return size

    def _fsync(self, descriptor):
        self._real["fsync"](descriptor)
        if descriptor in self._descriptors:
            self.ops.append(Op("fsync", self._descriptors[descriptor][0]))

    def _ftruncate(self, descriptor, size):
        self._real["ftruncate"](descriptor, size)
        if descriptor in self._descriptors:
            self.ops.append(Op("length", self._descriptors[descriptor][0], offset=size))

    def _posix_fallocate(self, descriptor, start, size):
        before = os.fstat(descriptor).st_size
        self._real["posix_fallocate"](descriptor, start, size)
        if descriptor in self._descriptors and start + size > before:
            self.ops.append(Op("length", self._descriptors[descriptor][0], offset=start + size))

    def _rename(self, source, target, **more):
        inside = self._inside(target)
        origin = (self._inode(Path(source).parent), Path(source).name) if inside else (0, "")
        inode = self._inode(source) if inside else 0
        self._real["rename"](source, target, **more)
        if inside:
            self._name("rename", target, inode, source=origin)

    def _link(self, source, target, **more):
        self._real["link"](source, target, **more)
        if self._inside(target):
            self._name("link", target, self._inode(target))

    def _unlink(self, path, **more):
        self._real["unlink"](path, **more)
        if self._inside(path):
            self._name("remove", path)

    def _rmdir(self, path, **more):
        self._real["rmdir"](path, **more)
        if self._inside(path):
            self._name("remove", path)

    def _mkdir(self, path, mode=0o777, **more):
        self._real["mkdir"](path, mode, **more)
        if self._inside(path):
            self._name("mkdir", path, self._inode(path, new=True))


def states(
    begin: Disk, ops: list[Op], without: int | None = None, every: Callable[[int], bool] = lambda _: True
) -> Iterator[tuple[int, Disk]]:
    """(how many operations were begun, the disk after the cut), each different disk once per last mark.

    Args:
        begin: The disk before.
        ops: What was done.
        without: Index of an fsync that is left out.
        every: Which cut points are looked at.
    """
    for cut in range(len(ops) + 1):
        if not every(cut):
            continue
        unsure = [i for i in range(cut) if ops[i].kind != "fsync" and not _certain(ops, i, cut, without)]
        lost_sets: list[set[int]] = [set(), set(unsure), *({i} for i in unsure)]
        lost_sets += [set(unsure) - {i} for i in unsure]
        for lost in lost_sets:
            disk = Disk(dict(begin.files), {inode: dict(names) for inode, names in begin.folders.items()})
            for index in range(cut):
                if index not in lost:
                    disk.apply(ops[index])
            yield cut, disk


def _certain(ops: list[Op], index: int, cut: int, without: int | None) -> bool:
    return any(
        ops[j].kind == "fsync" and ops[j].inode == ops[index].inode and j != without for j in range(index + 1, cut)
    )

"""What a disk holds when the power goes: a simulator of the caches between a program and its disk.

    calls (tests/interposed.py) -> files and names as the kernel has them now
                                -> what of it is on the disk for certain, and what may be: every version since the last sync

- A page that was written after the last sync of its file is on the disk in any version since then, or torn between two.
- A file's length is any that it had since then: a file of the right length full of zeros is one of them.
- Names change by what was done to directories (made, linked, renamed, unlinked): what was done since the last sync of a
  directory happened or did not, each for itself. A rename is one change.
- Of an LMDB environment the calls of its library are seen as all others: pages, fdatasync, and the meta page through a file
  descriptor with O_DSYNC. Header logs are written through a mapping: they are compared at each call.
"""

import fcntl
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdpserver.index import merged
from cdpserver.index.store import CLOSED_NAME
from cdpserver.journal import links
from cdpserver.limits import BLOCK, SECTOR
from tests.interposed import Call, interposed

CHANCES = (0.0, 0.3, 0.7, 1.0)
"""How probable it is that a page, or a change of names, came to the disk: one of these for each file and image."""

CHANGE_NOTHING = ("read", "list", "lock", "map", "chmod")
"""Calls that leave content and names as they are."""


def _content(path: Path) -> bytes:
    """What a file holds. LMDB's lock files mean nothing after a loss of power, and closing one would end this process's locks."""
    return path.read_bytes() if path.is_file() and not _is_lock(path) else b""


def _is_lock(path: Path) -> bool:
    return path.name.endswith("-lock") or path.name == "lock.mdb"


def _is_synced(path: Path) -> bool:
    """Does the indexer sync the content of such a file before anybody sees it?"""
    return path.name in (CLOSED_NAME, links.FILE) or path.parent.name == merged.DIRECTORY


@dataclass
class File:
    """One inode: what is on the disk for certain, and every version of a page that may be there instead."""

    durable: bytes = b""
    now: bytearray = field(default_factory=bytearray)
    versions: dict[int, list[bytes]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def write(self, offset: int, data: bytes, *, durable: bool = False) -> None:
        """As pwrite(2); `durable` with O_DSYNC."""
        end = offset + len(data)
        if end > len(self.now):
            self.resize(end)
        self.now[offset:end] = data
        for page in range(offset // BLOCK, -(-end // BLOCK)):
            part = bytes(self.now[page * BLOCK : page * BLOCK + BLOCK])
            if durable:
                self.versions.pop(page, None)
                held = bytearray(self.durable.ljust(page * BLOCK, b"\0"))
                held[page * BLOCK : page * BLOCK + BLOCK] = part
                self.durable = bytes(held)
            else:
                self.versions.setdefault(page, []).append(part)

    def resize(self, size: int) -> None:
        """As ftruncate(2)."""
        if size != len(self.now):
            self.now = self.now[:size].ljust(size, b"\0")
            self.sizes.append(size)

    def look(self, content: bytes) -> bool:
        """The file as the kernel has it: was anything not known?"""
        if content == self.now:
            return False
        self.resize(len(content))
        for at in range(0, len(content), BLOCK):
            if content[at : at + BLOCK] != self.now[at : at + BLOCK]:
                self.write(at, content[at : at + BLOCK])
        return True

    def sync(self) -> None:
        """All of it is on the disk."""
        self.durable, self.versions, self.sizes = bytes(self.now), {}, []

    @property
    def settled(self) -> bool:
        """Is all of it on the disk?"""
        return not self.versions and not self.sizes

    def after_loss(self, dice: random.Random) -> bytes:
        """What the disk may hold after a loss of power now."""
        if self.settled:
            return self.durable
        size = dice.choice([len(self.durable), *self.sizes[-6:]])
        held = bytearray(self.durable[:size].ljust(size, b"\0"))
        chance = dice.choice(CHANCES)
        for page, versions in self.versions.items():
            at = page * BLOCK
            if at < size and dice.random() < chance:
                part = dice.choice(versions[-3:]).ljust(BLOCK, b"\0")
                if dice.random() < 0.2:
                    part = _torn(held[at : at + BLOCK].ljust(BLOCK, b"\0"), part, dice)
                held[at : at + BLOCK] = part[: size - at]
        return bytes(held)


def _torn(old: bytearray, new: bytes, dice: random.Random) -> bytes:
    """A page of which some sectors came to the disk."""
    return b"".join(dice.choice((old, new))[at : at + SECTOR] for at in range(0, BLOCK, SECTOR))


@dataclass(frozen=True, slots=True)
class Rename:
    """One change of names: what (directory, name) stands for from then on; None for nothing."""

    names: dict[tuple[int, str], int | None]


class Storage:
    """A directory tree under watch. What is there when that begins is on the disk."""

    def __init__(
        self, root: Path, moment: Callable[[Call], None] = lambda _: None, kept: Path | None = None
    ) -> None:
        """`moment` is called before each call that changes anything.

        `kept`: a directory on the same file system, where large files that never change are kept by links; images link them.
        """
        self.root = root
        self.kept = kept
        self.moment = moment
        self.syncs = 0
        self.calls = 0
        self.unseen: set[str] = set()
        """Names of files that were changed by others than the calls of this process."""

        self._files: dict[int, File] = {}
        self._ids: dict[int, int] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._undone: list[Rename] = []
        self._logs: dict[int, Path] = {}
        self._before: Any = None
        self._root = self._adopt(root)

    def _adopt(self, path: Path) -> int:
        """Something that is there, and was not seen being made."""
        id = self._new(path)
        if path.is_dir():
            self._names[id] = {child.name: self._adopt(child) for child in path.iterdir()}
        else:
            content = _content(path)
            self._files[id] = File(content, bytearray(content))
            self._keep(id, path)
        return id

    def _new(self, path: Path) -> int:
        id = len(self._ids) + len(self._files) + len(self._names) + 1
        while id in self._files or id in self._names:
            id += 1
        self._ids[path.lstat().st_ino] = id
        return id

    def _id(self, path: Path) -> int:
        inode = path.lstat().st_ino
        return self._ids[inode] if inode in self._ids else self._appeared(path)

    def _appeared(self, path: Path) -> int:
        """Another process made it."""
        self.unseen.add(path.name)
        id = self._new(path)
        if path.is_dir():
            self._names[id] = {}
        else:
            self._files[id] = File()
            self._files[id].look(_content(path))
        self._undone.append(Rename({(self._id(path.parent), path.name): id}))
        return id

    # -- what is seen

    def before(self, call: Call) -> None:
        """A call begins."""
        if call.kind in CHANGE_NOTHING or (
            call.kind == "open" and not call.flags & (os.O_CREAT | os.O_TRUNC)
        ):
            self._before = None
            return
        self.calls += 1
        self.look()
        self.moment(call)
        self._before = None
        if call.kind == "open":
            self._before = not os.path.lexists(call.path)
        elif call.kind in ("rename", "unlink", "rmdir", "link"):
            self._before = self._id(call.path) if os.path.lexists(call.path) else None

    def after(self, call: Call, result: int) -> None:
        """It is done."""
        if result == -1 or (call.kind == "allocate" and result != 0) or call.kind in CHANGE_NOTHING:
            return
        getattr(self, f"_{call.kind}")(call, result)

    def _open(self, call: Call, _: int) -> None:
        if self._before:
            id = self._new(call.path)
            self._files[id] = File()
            self._undone.append(Rename({(self._id(call.path.parent), call.path.name): id}))
        elif call.flags & os.O_TRUNC and call.path.is_file():
            self._files[self._id(call.path)].resize(0)
        if call.flags & os.O_RDWR and call.path.suffix == ".log":
            self._logs[self._id(call.path)] = call.path

    def _file(self, call: Call) -> File:
        if call.fd < 0:
            return self._files[self._id(call.path)]
        inode = os.fstat(call.fd).st_ino
        return self._files[self._ids[inode] if inode in self._ids else self._appeared(call.path)]

    def _write(self, call: Call, result: int) -> None:
        direct = bool(fcntl.fcntl(call.fd, fcntl.F_GETFL) & os.O_DSYNC)
        self._file(call).write(call.offset, call.data[:result], durable=direct)

    def _truncate(self, call: Call, _: int) -> None:
        self._file(call).resize(os.fstat(call.fd).st_size if call.fd >= 0 else call.path.stat().st_size)

    def _allocate(self, call: Call, _: int) -> None:
        file = self._file(call)
        file.resize(max(len(file.now), call.offset))

    def _copy(self, call: Call, _: int) -> None:
        self._file(call).look(call.path.read_bytes())

    def _sync(self, call: Call, _: int) -> None:
        self.syncs += 1
        found = os.fstat(call.fd)
        id = self._ids.get(found.st_ino)
        if id is None:
            id = self._appeared(call.path)
        if id in self._names:
            self._settle(id)
            return
        # Another process may have written it, as QEMU's tools do.
        with open(f"/proc/self/fd/{call.fd}", "rb") as content:
            if self._files[id].look(content.read()) and id not in self._logs:
                self.unseen.add(call.path.name)
        self._files[id].sync()
        self._keep(id, call.path)

    def _keep(self, id: int, path: Path) -> None:
        if self.kept is not None and path.suffix in (".qcow2", ".raw"):
            kept = self.kept / str(id)
            kept.unlink(missing_ok=True)
            os.link(path, kept)

    def _settle(self, directory: int) -> None:
        left = []
        for change in self._undone:
            if any(place[0] == directory for place in change.names):
                _apply(self._names, change)
            else:
                left.append(change)
        self._undone = left

    def _rename(self, call: Call, _: int) -> None:
        assert call.other is not None and self._before is not None
        source, target = self._id(call.path.parent), self._id(call.other.parent)
        self._undone.append(Rename({(source, call.path.name): None, (target, call.other.name): self._before}))
        if self._before in self._logs:
            self._logs[self._before] = call.other

    def _link(self, call: Call, _: int) -> None:
        assert call.other is not None and self._before is not None
        self._undone.append(Rename({(self._id(call.other.parent), call.other.name): self._before}))

    def _unlink(self, call: Call, _: int) -> None:
        self._undone.append(Rename({(self._id(call.path.parent), call.path.name): None}))

    _rmdir = _unlink

    def _mkdir(self, call: Call, _: int) -> None:
        id = self._new(call.path)
        self._names[id] = {}
        self._undone.append(Rename({(self._id(call.path.parent), call.path.name): id}))

    def _exchange(self, call: Call, _: int) -> None:
        assert call.other is not None
        names = {(self._id(path.parent), path.name): self._id(path) for path in (call.path, call.other)}
        self._undone.append(Rename(dict(names)))

    def _punch(self, call: Call, _: int) -> None:
        with open(f"/proc/self/fd/{call.fd}", "rb") as content:
            self._files[self._ids[os.fstat(call.fd).st_ino]].look(content.read())

    def by_another(self) -> None:
        """Another process of ours has done its work: what it left is in the caches, and what it gave a name to it had synced."""
        known = {id for held in self._current().values() for id in held.values()}
        found = {}
        for folder, folders, files in os.walk(self.root):
            held = {name: self._id(Path(folder, name)) for name in [*folders, *files]}
            found[self._id(Path(folder))] = held
            for name in files:
                path, file = Path(folder, name), self._files[held[name]]
                if (file.look(_content(path)) or held[name] not in known) and _is_synced(path):
                    file.sync()
        for directory, names in self._current().items():
            for name in names.keys() - found.get(directory, {}).keys():
                self._undone.append(Rename({(directory, name): None}))
            for name, id in found.get(directory, {}).items():
                if names.get(name) != id:
                    self._undone.append(Rename({(directory, name): id}))

    def _current(self) -> dict[int, dict[str, int]]:
        names = {id: dict(held) for id, held in self._names.items()}
        for change in self._undone:
            _apply(names, change)
        return names

    def look(self) -> None:
        """Notice what was written through a mapping."""
        for id, path in list(self._logs.items()):
            try:
                with open(path, "rb") as log:
                    if self._ids.get(os.fstat(log.fileno()).st_ino) == id:
                        self._files[id].look(log.read())
                        continue
            except FileNotFoundError:
                pass
            del self._logs[id]

    def differences(self) -> set[str]:
        """Files and names that are not as the calls that were seen have left them, but for those of `unseen`: there are none."""
        self.look()
        return set(self._differing(self.root, self._root, self._current())) - self.unseen

    def _differing(self, path: Path, id: int, names: dict[int, dict[str, int]]) -> Iterator[str]:
        if id in self._files:
            if _content(path) != self._files[id].now and not _is_lock(path):
                yield path.name
            return
        held, there = names[id], {child.name for child in path.iterdir()}
        yield from held.keys() ^ there
        for name in held.keys() & there:
            yield from self._differing(path / name, held[name], names)

    # -- the loss

    def lose_power(self, dice: random.Random, target: Path) -> None:
        """Write to `target` what the disk may hold if the power were lost now."""
        self.look()
        names = {id: dict(held) for id, held in self._names.items()}
        chance = dice.choice(CHANCES)
        upto = len(self._undone) if dice.random() < 0.5 else dice.randrange(len(self._undone) + 1)
        whole = dice.random() < 0.3
        for change in self._undone[:upto]:
            if whole or dice.random() < chance:
                _apply(names, change)
        self._restore(self._root, target, names, dice)

    def _restore(self, id: int, target: Path, names: dict[int, dict[str, int]], dice: random.Random) -> None:
        target.mkdir(parents=True)
        for name, child in names[id].items():
            if child in self._files:
                file = self._files[child]
                if self.kept is not None and file.settled and (self.kept / str(child)).exists():
                    os.link(self.kept / str(child), target / name)
                else:
                    (target / name).write_bytes(file.after_loss(dice))
            else:
                self._restore(child, target / name, names, dice)


def _apply(names: dict[int, dict[str, int]], change: Rename) -> None:
    for (directory, name), id in change.names.items():
        if id is None:
            names[directory].pop(name, None)
        else:
            names[directory][name] = id


@contextmanager
def watched(storage: Storage) -> Iterator[None]:
    """Everything that this process does to the tree is seen."""
    with interposed(storage.root, storage):
        yield

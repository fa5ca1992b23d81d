"""A file system as a tree of paths: looking a path up, walking it, and what is told of a file.

Paths are lists of names in bytes. Symlinks are followed inside the file system alone: its root is the root, and `..` stops
there. Damage shows where it is: a directory whose entry cannot be read lists it as `unreadable`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from cdpserver.errors import CdpError, CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.files.formats.base import FILE_SYSTEMS, FileSystem, Node, Stat
from cdpserver.files.source import Reader
from cdpserver.files.volumes import Volume
from cdpserver.names import show

LIST = "list what is there: cdp file ls DISK@WHEN"

MAX_LINKS = 40
"""Symlinks followed in one path, as Linux has it."""

MAX_DEPTH = 1024
"""Directories below each other that are walked."""

_MODULES = {
    "ext": ("ext", "Ext"),
    "xfs": ("xfs", "Xfs"),
    "btrfs": ("btrfs", "Btrfs"),
    "ntfs": ("ntfs", "Ntfs"),
    "fat": ("fat", "Fat"),
    "exfat": ("exfat", "Exfat"),
}


@dataclass(frozen=True, slots=True)
class Found:
    """A file: its path from where the search began, its node, and what is known of it (None: it cannot be read, `why`)."""

    path: tuple[bytes, ...]
    node: Node
    stat: Stat | None
    target: bytes | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Entered:
    """A directory that is walked; `seen` has the directories of its file system, or subvolume, so far."""

    path: tuple[bytes, ...]
    id: int
    entries: Iterator[tuple[bytes, Node]]
    seen: set[int]


@dataclass
class Tree:
    """A file system that is open."""

    fs: FileSystem
    remarks: list[str] = field(default_factory=list)

    # -- looking up

    def find(self, path: bytes, *, follow: bool) -> Found:
        """What a path names; NotFoundError if nothing. With `follow` also the last name may be a link."""
        node = self.fs.root()
        above: list[tuple[bytes, Node]] = []
        left = _names(path)[::-1]
        links = 0
        while left:
            name = left.pop()
            if name == b"..":
                node = above.pop()[1] if above else node
                continue
            stat = self.fs.stat(node)
            if stat.type != "dir":
                raise NotFoundError(f"{_show(path)}: {_show(_joined(above))} is no directory", hint=LIST)
            child = self._child(node, name, path)
            if self.fs.stat(child).type == "link" and (left or follow or path.endswith(b"/")):
                links += 1
                if links > MAX_LINKS:
                    raise RefusedError(
                        f"{_show(path)} goes through more than {MAX_LINKS} links",
                        hint="name the file itself: cdp file stat shows where links lead",
                    )
                target = self.fs.target(child)
                if target.startswith(b"/"):
                    node, above = self.fs.root(), []
                left.extend(_names(target)[::-1])
                continue
            above.append((name, node))
            node = child
        return self.look(tuple(name for name, _ in above), node)

    def _child(self, node: Node, wanted: bytes, path: bytes) -> Node:
        folded = _fold(wanted) if self.fs.ignores_case else None
        other = None
        for name, child in self.fs.entries(node):
            if name == wanted:
                return child
            if folded is not None and other is None and _fold(name) == folded:
                other = child
        if other is None:
            raise NotFoundError(f"there is no {_show(path)}", hint=LIST)
        return other

    def look(self, path: tuple[bytes, ...], node: Node) -> Found:
        """What is known of a node; never raises because of damage."""
        try:
            stat = self.fs.stat(node)
            return Found(path, node, stat, self.fs.target(node) if stat.type == "link" else None)
        except Exception as error:  # noqa: BLE001 - a parser's exceptions are its own
            return Found(path, node, None, why=reason(error))

    # -- lists

    def entries(self, directory: Found) -> Iterator[Found]:
        """What is in a directory."""
        for name, node in self.fs.entries(directory.node):
            check_entry(name)
            yield self.look((name,), node)

    def walk(self, top: Found) -> Iterator[Found]:
        """Everything below, a directory before what is in it.

        A directory that is inside itself, or has two names, is told and not entered again: a chain of the latter doubles the work
        with each link.
        """
        stack: list[_Entered] = []
        yield Found((), top.node, top.stat, top.target)
        if top.stat is not None and top.stat.type == "dir":
            stack.append(_Entered((), top.stat.id, self.fs.entries(top.node), {top.stat.id}))
        while stack:
            path, entries, seen = stack[-1].path, stack[-1].entries, stack[-1].seen
            try:
                name, node = next(entries)
                check_entry(name)
            except StopIteration:
                stack.pop()
                continue
            except Exception as error:  # noqa: BLE001 - damage ends this directory, not the walk
                stack.pop()
                yield Found(path, None, None, why=reason(error))
                continue
            found = self.look((*path, name), node)
            if found.stat is not None and found.stat.type == "dir":
                if found.stat.id in (above.id for above in stack) or len(stack) >= MAX_DEPTH:
                    yield Found(found.path, node, None, why="the directory is inside itself, or too deep")
                    continue
                if self.fs.begins(node):
                    seen = set()
                if found.stat.id in seen:
                    yield Found(
                        found.path,
                        node,
                        None,
                        why="the directory has two names; its files are told at the first",
                    )
                    continue
                seen.add(found.stat.id)
                yield found
                stack.append(_Entered(found.path, found.stat.id, self.fs.entries(node), seen))
                continue
            yield found

    def search(self, top: Found, matches: Callable[[Found], bool]) -> Iterator[Found | None]:
        """What is below and matches; None for what does not, since somebody may want to stop."""
        return (found if found.stat is None or matches(found) else None for found in self.walk(top))


def matcher(
    *, glob: bytes | None, regex: bytes | None, newer_ns: int | None, kind: str | None
) -> Callable[[Found], bool]:
    """A test of names, times and types; what is None does not matter. UsageError for a regular expression that is none."""
    import fnmatch

    try:
        named = re.compile(fnmatch.translate(glob.decode("latin-1")).encode("latin-1")) if glob else None
        whole = re.compile(regex) if regex else None
    except re.error as error:
        raise UsageError(f"not a regular expression: {error}", hint="see Python's re") from None

    def matches(found: Found) -> bool:
        assert found.stat is not None
        name = found.path[-1] if found.path else b""
        return (
            (named is None or named.match(name) is not None)
            and (whole is None or whole.search(b"/".join(found.path)) is not None)
            and (newer_ns is None or found.stat.mtime_ns > newer_ns)
            and (kind is None or found.stat.type == kind)
        )

    return matches


def open_tree(volume: Volume, reader: Reader, remarks: list[str]) -> Tree:
    """The file system of a volume, read through `reader`. RefusedError for none, or an encrypted one; CorruptError."""
    where = volume.name or "the disk"
    if volume.holds in ("luks", "bitlocker"):
        here = "cdp file has --key-file for its passphrase; or " if volume.holds == "luks" else ""
        raise RefusedError(
            f"{where} is encrypted ({volume.holds})",
            hint=f"{here}attach it to a VM that has the key: cdp fork add",
        )
    if volume.holds not in FILE_SYSTEMS:
        held = f"holds {volume.holds}" if volume.holds else "holds no file system that is known"
        raise RefusedError(f"{where} {volume.note or held}", hint=f"readable are {', '.join(FILE_SYSTEMS)}")
    if "volume groups" in volume.note:
        raise RefusedError(f"{where}: {volume.note}", hint="attach the disk to a VM: cdp fork add")
    module, name = _MODULES[volume.holds]
    opener: Any = getattr(import_module(f"cdpserver.files.formats.{module}"), name)
    try:
        fs: FileSystem = opener(reader)
        fs.stat(fs.root())
    except CdpError:
        raise
    except Exception as error:
        raise CorruptError(
            f"the {volume.holds} file system of {where} is damaged: {reason(error)}",
            hint="try an earlier instant",
        ) from error
    return Tree(fs, [*remarks, *fs.remarks])


def preload() -> None:
    """Load all parsers: afterwards a process needs no files any more."""
    for module, _ in _MODULES.values():
        import_module(f"cdpserver.files.formats.{module}")


def check_entry(name: bytes) -> None:
    """CorruptError for what cannot be the name of a directory's entry."""
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise CorruptError(f"the directory has an entry {_show(name)}, which is no name")


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, CdpError):
        return error.message
    if isinstance(error, MemoryError):
        return "it needs more memory than reading may take"
    if isinstance(error, RecursionError):
        return "it refers to itself"
    return f"{type(error).__name__}: {str(error)[:200]}".rstrip(": ")


def _names(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def _joined(above: list[tuple[bytes, Node]]) -> bytes:
    return b"/" + b"/".join(name for name, _ in above)


def _fold(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape").casefold()


def _show(path: bytes) -> str:
    return show(path.decode("utf-8", "backslashreplace"))

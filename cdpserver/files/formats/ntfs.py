"""NTFS as dissect reads it; how far a file was ever written is looked at here, since what lies behind that is not its content.

Names are UTF-8 of the UTF-16 on disk; half a surrogate pair is kept as it is. The file system's own files are not shown.
There are no Unix modes: files have 0644, directories 0755.
"""

import stat
from collections.abc import Iterator
from typing import Any

from dissect.ntfs.c_ntfs import ATTRIBUTE_TYPE_CODE
from dissect.ntfs.ntfs import NTFS
from dissect.ntfs.util import segment_reference

from cdpserver.errors import CorruptError, RefusedError
from cdpserver.files.formats.base import HOLE, OPAQUE, FileSystem, Run, Stat, clip, stat_of
from cdpserver.files.source import Reader

FIRST_USER = 16
"""Records below are the file system's own, but for the root."""

ROOT = 5
SYSTEM = 0x4
COMPRESSED, ENCRYPTED = 0x00FF, 0x4000
INTERIX_LINK = b"IntxLNK\x01"
"""How ntfs-3g writes a symlink: a system file that begins so, then the target in UTF-16."""

MAX_INTERIX = 65536


class Ntfs(FileSystem):
    """One; a node is dissect's record."""

    kind = "ntfs"
    ignores_case = True

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._fs = NTFS(self.stream)
        self._cluster = self._fs.cluster_size

    def root(self) -> Any:
        """Record 5."""
        return self._record(ROOT)

    def _record(self, number: int) -> Any:
        assert self._fs.mft is not None
        return self._fs.mft.get(number)

    def entries(self, node: Any) -> Iterator[tuple[bytes, Any]]:
        """Every name but those for DOS."""
        for entry in node.iterdir(ignore_dos=True):
            number = segment_reference(entry.header.FileReference)
            if number >= FIRST_USER:
                yield _name(entry.attribute.file_name), self._record(number)

    def stat(self, node: Any) -> Stat:
        """Out of the standard information and the unnamed stream."""
        known = node.attributes.STANDARD_INFORMATION
        size = 0
        if node.is_symlink() or node.is_mount_point():
            mode = stat.S_IFLNK | 0o777
        elif node.is_dir():
            mode = stat.S_IFDIR | 0o755
        else:
            size = node.size() if node.has_stream() else 0
            linked = int(known.file_attributes) & SYSTEM and self._interix(node, size)
            mode = stat.S_IFLNK | 0o777 if linked else stat.S_IFREG | 0o644
        return stat_of(
            mode,
            size=size,
            mtime_ns=known.last_modification_time_ns,
            atime_ns=known.last_access_time_ns,
            uid=0,
            gid=0,
            links=node.header.ReferenceCount,
            id=node.segment,
        )

    def _interix(self, node: Any, size: int) -> bytes:
        if not len(INTERIX_LINK) < size <= MAX_INTERIX:
            return b""
        held = self.content(node, size)
        if not held.startswith(INTERIX_LINK):
            return b""
        return held[len(INTERIX_LINK) :].decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")

    def target(self, node: Any) -> bytes:
        """Of a reparse point with `/` for `\\`, or as ntfs-3g writes it."""
        if not node.is_reparse_point():
            return self._interix(node, node.size())
        return _name(node.reparse_point_name.replace("\\", "/"))

    def runs(self, node: Any) -> Iterator[Run]:
        """The unnamed stream."""
        if not node.has_stream():
            return iter([])
        found = node.attributes.find("", ATTRIBUTE_TYPE_CODE.DATA)
        size = found.size()
        first = found[0] if found.header.resident else found._get_stream_attrs()[0]
        flags = first.header.flags
        if flags & ENCRYPTED:
            raise RefusedError("the file is encrypted (EFS)", hint="read it in a VM with its user's key")
        if first.header.resident:
            return iter([(0, size, OPAQUE)] if size else [])
        written = min(first.header.header.Form.Nonresident.ValidDataLength, size)
        if flags & COMPRESSED:
            return clip(iter([(0, written, OPAQUE)]), size)
        return clip(clip(self._map(found.dataruns()), written), size)

    def _map(self, found: list[tuple[int | None, int]]) -> Iterator[Run]:
        at = 0
        for cluster, count in found:
            end = at + count * self._cluster
            if cluster is not None and cluster < 0:
                raise CorruptError("a file refers to a place before the file system")
            yield at, end, HOLE if cluster is None else cluster * self._cluster
            at = end

    def read(self, node: Any, offset: int, length: int) -> bytes:
        """Resident or compressed content."""
        stream = node.open()
        stream.seek(offset)
        return bytes(stream.read(length)).ljust(length, b"\0")


def _name(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")

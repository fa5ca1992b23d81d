"""FAT12, FAT16 and FAT32: the boot sector and the table's entries as dissect reads them; chains and directories read here.

dissect.fat joins a chain's clusters wrongly where one goes backwards by one, never ends in a chain that is a ring, and leaves
lower-case short names in capitals. Times are of no zone; they are taken for UTC. There are no Unix modes: files have 0644,
directories 0755.
"""

import datetime
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from dissect.fat.fat import FATFS

from cdpserver.errors import CorruptError
from cdpserver.files.formats.base import HOLE, FileSystem, Run, Stat, clip, stat_of
from cdpserver.files.source import Reader

READ_ONLY, LABEL, DIRECTORY, LONG = 0x01, 0x08, 0x10, 0x0F
LOWER_BASE, LOWER_EXTENSION = 0x08, 0x10
_ENTRY = struct.Struct("<11sBBBHHHHHHHI")
_END = {12: 0xFF8, 16: 0xFFF8, 32: 0x0FFFFFF8}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a FAT file system: its first cluster (0: none, or the root of FAT12 and FAT16), and what the directory says."""

    cluster: int
    size: int
    directory: bool
    read_only: bool
    mtime_ns: int
    atime_ns: int
    id: int
    """Where its directory entry is."""


class Fat(FileSystem):
    """One; a node is an Entry."""

    kind = "fat"
    ignores_case = True

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._fs = FATFS(self.stream)
        self._bits = self._fs.fat.bits_per_entry
        self._cluster = self._fs.cluster_size
        self._data = self._fs.first_data_sector * self._fs.sector_size
        self.kind = f"fat{self._bits}"

    def root(self) -> Entry:
        """No entry of a directory describes it."""
        return Entry(self._fs.root.cluster or 0, 0, True, False, 0, 0, -1)

    def stat(self, node: Entry) -> Stat:
        """Out of its directory entry."""
        mode = stat.S_IFDIR | 0o755 if node.directory else stat.S_IFREG | (0o444 if node.read_only else 0o644)
        return stat_of(
            mode,
            size=node.size,
            mtime_ns=node.mtime_ns,
            atime_ns=node.atime_ns,
            uid=0,
            gid=0,
            links=1,
            id=node.cluster if node.directory and node.cluster else -2 - node.id,
        )

    def target(self, node: Entry) -> bytes:
        """There are no links."""
        raise CorruptError("FAT has no links")

    def runs(self, node: Entry) -> Iterator[Run]:
        """The chain of its clusters."""
        return clip(self._chain(node.cluster), node.size)

    def _chain(self, cluster: int) -> Iterator[Run]:
        at = 0
        left = self._fs.fat.entry_count
        while 2 <= cluster < _END[self._bits]:
            left -= 1
            if left < 0:
                raise CorruptError("the file's clusters are a ring")
            yield at, at + self._cluster, self._data + (cluster - 2) * self._cluster
            at += self._cluster
            cluster = self._fs.fat.get(cluster) or 0

    def _directory(self, node: Entry) -> Iterator[tuple[int, bytes]]:
        """(place, bytes) of each 32 bytes of a directory, up to its end."""
        if node.id == -1 and self._bits != 32:
            count = self._fs.bpb.BPB_RootEntCnt * 32
            runs: Iterator[Run] = iter([(0, count, self._data - count)])
        else:
            runs = clip(self._chain(node.cluster), 65536 * 32)
        for start, end, place in runs:
            if place == HOLE:
                return
            for at in range(place, place + end - start, 512):
                sector = self.reader.read(at, 512)
                for within in range(0, len(sector), 32):
                    if sector[within] == 0:
                        return
                    yield at + within, sector[within : within + 32]

    def entries(self, node: Entry) -> Iterator[tuple[bytes, Entry]]:
        """Long names where there are some that belong to the short one."""
        if not node.directory:
            raise CorruptError("what is named as a directory is none")
        parts: list[bytes] = []
        checksum = -1
        for place, entry in self._directory(node):
            if entry[0] == 0xE5:
                parts = []
                continue
            short, flags, lower, _, _, _, read, high, time, date, low, size = _ENTRY.unpack(entry)
            if flags & 0x3F == LONG:
                if entry[0] & 0x40:
                    parts, checksum = [], entry[13]
                if entry[13] == checksum:
                    parts.insert(0, entry[1:11] + entry[14:26] + entry[28:32])
                continue
            whole = parts and checksum == _checksum(short)
            name = _long(parts) if whole else _short(short, lower)
            parts = []
            if flags & LABEL or name in (b".", b".."):
                continue
            cluster = low | (high << 16 if self._bits == 32 else 0)
            written = _time_ns(date, time)
            yield (
                name,
                Entry(
                    cluster,
                    size,
                    bool(flags & DIRECTORY),
                    bool(flags & READ_ONLY),
                    written,
                    _time_ns(read, 0),
                    place,
                ),
            )


def _long(parts: list[bytes]) -> bytes:
    text = b"".join(parts).decode("utf-16-le", "surrogatepass")
    return text.partition("\0")[0].encode("utf-8", "surrogatepass")


def _short(name: bytes, lower: int) -> bytes:
    if name[0] == 0x05:
        name = b"\xe5" + name[1:]
    base = name[:8].rstrip().decode("cp437")
    extension = name[8:].rstrip().decode("cp437")
    base = base.lower() if lower & LOWER_BASE else base
    extension = extension.lower() if lower & LOWER_EXTENSION else extension
    return (f"{base}.{extension}" if extension else base).encode()


def _checksum(short: bytes) -> int:
    total = 0
    for byte in short:
        total = (((total & 1) << 7) + (total >> 1) + byte) & 0xFF
    return total


def _time_ns(date: int, time: int) -> int:
    try:
        moment = datetime.datetime(
            1980 + (date >> 9), date >> 5 & 15, date & 31,
            time >> 11, time >> 5 & 63, 2 * (time & 31), tzinfo=datetime.UTC,
        )  # fmt: skip
    except ValueError:
        return 0
    return int(moment.timestamp()) * 1_000_000_000

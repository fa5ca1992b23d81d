"""exFAT. dissect.fat reads the whole tree when it opens one, rings included, and takes all that is allocated for content; so it
is read here.

As Microsoft's "exFAT file system specification" has it: section 3 the boot sector, 4 the table, 6 and 7 directory entries.
"""

import datetime
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from cdpserver.errors import CorruptError
from cdpserver.files.formats.base import HOLE, FileSystem, Run, Stat, clip, stat_of
from cdpserver.files.source import Reader

FILE, STREAM, NAME = 0x85, 0xC0, 0xC1
READ_ONLY, DIRECTORY = 0x01, 0x10
CONTIGUOUS = 0x02
MAX_DIRECTORY = 256 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A file: its clusters (a chain, or `contiguous`), its size, and how much of that was ever written."""

    cluster: int
    contiguous: bool
    size: int
    written: int
    directory: bool
    read_only: bool
    mtime_ns: int
    atime_ns: int
    place: int


class Exfat(FileSystem):
    """One; a node is an Entry."""

    kind = "exfat"
    ignores_case = True

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        boot = reader.read(0, 512)
        table, table_length, heap, count, root = struct.unpack_from("<IIIII", boot, 80)
        sector_shift, cluster_shift = boot[108], boot[109]
        if not 9 <= sector_shift <= 12 or cluster_shift > 25 - sector_shift:
            raise CorruptError("the boot sector is damaged")
        self._table = table << sector_shift
        self._heap = heap << sector_shift
        self._count = min(count, (table_length << sector_shift) // 4)
        self._cluster = 1 << (sector_shift + cluster_shift)
        self._root = Entry(root, False, MAX_DIRECTORY, MAX_DIRECTORY, True, False, 0, 0, 0)

    def root(self) -> Entry:
        """As long as its chain."""
        return self._root

    def stat(self, node: Entry) -> Stat:
        """Out of its directory entries."""
        mode = stat.S_IFDIR | 0o755 if node.directory else stat.S_IFREG | (0o444 if node.read_only else 0o644)
        return stat_of(
            mode,
            size=0 if node.directory else node.size,
            mtime_ns=node.mtime_ns,
            atime_ns=node.atime_ns,
            uid=0,
            gid=0,
            links=1,
            id=node.cluster if node.directory and node.cluster else -2 - node.place,
        )

    def target(self, node: Entry) -> bytes:
        """There are no links."""
        raise CorruptError("exFAT has no links")

    def runs(self, node: Entry) -> Iterator[Run]:
        """What was never written is zeros."""
        return clip(clip(self._clusters(node), min(node.written, node.size)), node.size)

    def _clusters(self, node: Entry) -> Iterator[Run]:
        if node.contiguous:
            yield 0, node.size, self._place(node.cluster) if node.size else HOLE
            return
        at, cluster, left = 0, node.cluster, self._count
        while 2 <= cluster < 0xFFFFFFF7:
            left -= 1
            if left < 0:
                raise CorruptError("the file's clusters are a ring")
            yield at, at + self._cluster, self._place(cluster)
            at += self._cluster
            cluster = int.from_bytes(self.reader.read(self._table + 4 * cluster, 4), "little")

    def _place(self, cluster: int) -> int:
        if not 2 <= cluster < self._count + 2:
            raise CorruptError(f"a file refers to cluster {cluster} of {self._count}")
        return int(self._heap + (cluster - 2) * self._cluster)

    def entries(self, node: Entry) -> Iterator[tuple[bytes, Entry]]:
        """Sets of entries: the file, its stream, its name in parts of 15 characters."""
        if not node.directory:
            raise CorruptError("what is named as a directory is none")
        held: list[tuple[int, bytes]] = []
        for place, entry in self._sets(node):
            if entry[0] == FILE:
                held = [(place, entry)]
            elif held and entry[0] in (STREAM, NAME):
                held.append((place, entry))
                if len(held) == held[0][1][1] + 1 and held[1][1][0] == STREAM:
                    yield _entry([part for _, part in held], held[0][0])
                    held = []
            else:
                held = []

    def _sets(self, node: Entry) -> Iterator[tuple[int, bytes]]:
        for start, end, place in clip(self._clusters(node), min(node.size, MAX_DIRECTORY)):
            if place == HOLE:
                return
            for at in range(place, place + end - start, 512):
                sector = self.reader.read(at, 512)
                for within in range(0, len(sector), 32):
                    if sector[within] == 0:
                        return
                    yield at + within, sector[within : within + 32]


def _entry(parts: list[bytes], place: int) -> tuple[bytes, Entry]:
    file, stream = parts[0], parts[1]
    (flags,) = struct.unpack_from("<H", file, 4)
    modified, accessed = struct.unpack_from("<II", file, 12)
    length = stream[3]
    written, cluster, size = struct.unpack_from("<Q4xIQ", stream, 8)
    text = b"".join(part[2:32] for part in parts[2:])[: 2 * length].decode("utf-16-le", "surrogatepass")
    return text.encode("utf-8", "surrogatepass"), Entry(
        cluster,
        bool(stream[1] & CONTIGUOUS),
        size,
        written,
        bool(flags & DIRECTORY),
        bool(flags & READ_ONLY),
        _time_ns(modified, file[21], file[23]),
        _time_ns(accessed, 0, file[24]),
        place,
    )


def _time_ns(stamp: int, hundredths: int, zone: int) -> int:
    date, time = stamp >> 16, stamp & 0xFFFF
    # The zone is in quarters of an hour, signed in 7 bits, and holds if the top bit is set.
    quarters = (zone & 0x7F) - (128 if zone & 0x40 else 0) if zone & 0x80 else 0
    try:
        moment = datetime.datetime(
            1980 + (date >> 9), date >> 5 & 15, date & 31,
            time >> 11, time >> 5 & 63, 2 * (time & 31), tzinfo=datetime.UTC,
        )  # fmt: skip
    except ValueError:
        return 0
    return (int(moment.timestamp()) - quarters * 900) * 1_000_000_000 + hundredths * 10_000_000

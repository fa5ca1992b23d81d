"""The hash chain of a timeline: one link for each sealed segment, and for each interval that was thinned or dropped.

    links  | head | SEALED 1/1 | SEALED 1/2 | THINNED 1 | SEALED 2/1 | DROPPED 1 | ...     each hashes the link before it

A segment's digest is of its header page's map and its records, which hold digests of their payload; so a link costs a read of the
header log, and the digest of the newest link stands for all of history. Segments carry their own digest and their predecessor's
in their header pages as well. Links are made when a segment has been sealed, by the indexer: no write waits for one.

Durability: a link is durable before the next one, and before what it says is done; so at most the last one can be torn, and it is
made again. Room for the next ones is allocated ahead, in zeros: on a full file system history can still be dropped.
Threads: none. A flock on the file keeps the indexer and a retention pass apart.
"""

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from blake3 import blake3

from cdpserver import durable
from cdpserver.errors import CorruptError
from cdpserver.journal.instants import FILE as INSTANTS
from cdpserver.journal.log import Journal
from cdpserver.journal.segment import FIXED, PAGE, SEALED, SegmentReader, log_path
from cdpserver.limits import SECTOR

FILE = "links"
HEAD = struct.Struct("<8sII16s32x")
"""Magic, version, size of a link, the timeline's uuid."""

LINK = struct.Struct("<B7xQQQQQ32s32s64s32s")
"""Kind, interval, segment, first and last seq, time (ns), old and new digest, reason; and the link's own digest."""

MAGIC = b"cdplinks"
VERSION = 1
DIGEST_SIZE = 32
REASON_BYTES = 64
NONE = bytes(DIGEST_SIZE)

DIGEST_AT = 32
"""Where a header page has the digest of its segment; zeros: not linked yet."""

PREVIOUS_AT = PAGE - 64
"""Where it has that of the segment before, followed by BLAKE3 of both."""

ROOM = 16 << 10
"""Bytes allocated ahead at least: 80 links."""

CHUNK = 4 << 20
"""Bytes of a header log read at a time."""


class Kind(IntEnum):
    """What a link says."""

    SEALED = 1
    THINNED = 2
    DROPPED = 3


KINDS = frozenset(int(kind) for kind in Kind)


@dataclass(frozen=True, slots=True)
class Link:
    """One link. Those about a whole interval have segment and seqs 0; `old` is zeros in SEALED, `new` in DROPPED."""

    kind: Kind
    interval: int
    segment: int
    first_seq: int
    last_seq: int
    time_ns: int
    old: bytes
    new: bytes
    reason: str
    digest: bytes = NONE

    def body(self) -> bytes:
        """The bytes that its digest is of, after that of the link before."""
        reason = self.reason.encode()[:REASON_BYTES].decode(errors="ignore").encode()
        packed = LINK.pack(
            self.kind,
            self.interval,
            self.segment,
            self.first_seq,
            self.last_seq,
            self.time_ns,
            self.old,
            self.new,
            reason,
            NONE,
        )
        return packed[:-DIGEST_SIZE]


def segment_digest(reader: SegmentReader) -> bytes:
    """Of a sealed segment: what its header page says for good, and its records."""
    page = reader.page()
    digest = blake3(page[:16])
    digest.update(page[FIXED.size : FIXED.size + FIXED.unpack_from(page)[2]])
    step = CHUNK // 64
    for first in range(0, reader.count, step):
        digest.update(reader.raw(first, min(first + step, reader.count)))
    return digest.digest()


def interval_digest(directory: Path, digests: Iterable[bytes]) -> bytes:
    """Of an interval in `directory`, from those of its segments in order, and what a thinned one says that it can give."""
    digest = blake3(b"".join(digests))
    with contextlib.suppress(FileNotFoundError):
        digest.update((directory / INSTANTS).read_bytes())
    return digest.digest()


def stamped(page: bytes) -> tuple[bytes, bytes] | None:
    """The digests that a header page carries: its segment's and the predecessor's. None if it carries none."""
    digest, previous = (
        page[DIGEST_AT : DIGEST_AT + DIGEST_SIZE],
        page[PREVIOUS_AT : PREVIOUS_AT + DIGEST_SIZE],
    )
    return (digest, previous) if page[-DIGEST_SIZE:] == blake3(digest + previous).digest() else None


def is_stamped(page: bytes) -> bool:
    """Does a header page carry anything where the digests have their place, be it whole or damaged?"""
    return any(page[DIGEST_AT : DIGEST_AT + DIGEST_SIZE]) or any(page[PREVIOUS_AT:])


def stamp(log: Path, digest: bytes, previous: bytes) -> None:
    """Let a sealed segment's header page carry them. Durable on return, and so before the link."""
    fd = os.open(log, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, digest, DIGEST_AT)
        os.pwrite(fd, previous + blake3(digest + previous).digest(), PREVIOUS_AT)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def sealed_link(reader: SegmentReader, interval: int, digest: bytes) -> Link:
    """The link about a sealed segment of that digest."""
    count = reader.count
    time_ns = reader.time_of(count - 1) if count else reader.header.first_time_ns
    seqs = reader.first_seq, reader.last_seq
    return Link(Kind.SEALED, interval, reader.segment, *seqs, time_ns, NONE, digest, "")


# --- the file


def read(timeline: Path) -> tuple[bytes, list[Link]]:
    """(uuid, links) of a timeline; FileNotFoundError without the file, CorruptError where the chain breaks.

    A last link that is not whole is one that was being written when its process ended.
    """
    path = timeline / FILE
    data = path.read_bytes()
    uuid = _uuid(data, path)
    return uuid, _whole(data, path)


def head_digest(uuid: bytes, found: list[Link]) -> bytes:
    """The digest that stands for the links."""
    return found[-1].digest if found else blake3(encode_head(uuid)).digest()


def is_torn(timeline: Path, found: list[Link], link: Link) -> bool:
    """May what is in the place after the links be what a power loss leaves of `link`: each sector of it, or zeros?"""
    with open(timeline / FILE, "rb") as file:
        at = HEAD.size + len(found) * LINK.size
        before = found[-1].digest if found else blake3(file.read(HEAD.size)).digest()
        file.seek(at)
        held = file.read(LINK.size).ljust(LINK.size, b"\0")
    body = link.body()
    wanted = body + blake3(before + body).digest()
    edge = SECTOR - at % SECTOR
    parts = [(held[:edge], wanted[:edge]), (held[edge:], wanted[edge:])]
    return all(part in (right, bytes(len(part))) for part, right in parts)


def encode_head(uuid: bytes) -> bytes:
    """How the file begins."""
    return HEAD.pack(MAGIC, VERSION, LINK.size, uuid)


def _uuid(data: bytes, path: Path) -> bytes:
    if len(data) < HEAD.size:
        raise CorruptError(f"{path} is cut short")
    magic, version, size, uuid = HEAD.unpack_from(data)
    if (magic, version, size) != (MAGIC, VERSION, LINK.size):
        raise CorruptError(f"{path} is no chain of this version")
    return bytes(uuid)


def _whole(data: bytes, path: Path) -> list[Link]:
    """The links in order. CorruptError where one does not follow from that before it, unless it is the last: that was torn."""
    found: list[Link] = []
    before = blake3(data[: HEAD.size]).digest()
    for at in range(HEAD.size, len(data) - LINK.size + 1, LINK.size):
        raw = data[at : at + LINK.size]
        if blake3(before + raw[:-DIGEST_SIZE]).digest() != raw[-DIGEST_SIZE:]:
            if data[at + LINK.size :].strip(b"\0"):
                raise CorruptError(
                    f"link {len(found) + 1} of {path} does not follow from those before it",
                    hint="what comes after it is not proven: look at a copy of the file, or at an anchor",
                )
            break
        if raw[0] not in KINDS:
            raise CorruptError(
                f"link {len(found) + 1} of {path} is of the unknown kind {raw[0]}",
                hint="a newer cdpserver wrote it; upgrade this one",
            )
        found.append(_decode(raw))
        before = found[-1].digest
    return found


def _decode(raw: bytes) -> Link:
    kind, interval, segment, first_seq, last_seq, time_ns, old, new, reason, digest = LINK.unpack(raw)
    text = reason.rstrip(b"\0").decode(errors="replace")
    return Link(Kind(kind), interval, segment, first_seq, last_seq, time_ns, old, new, text, digest)


class Chain:
    """The links of a timeline, open for appending. Hold it briefly: a flock keeps others out."""

    def __init__(self, timeline: Path, fd: int) -> None:
        self.timeline = timeline
        self._fd = fd
        self._journal = Journal(timeline)
        self.links: list[Link] = []

    @classmethod
    @contextlib.contextmanager
    def open(cls, timeline: Path, uuid: bytes) -> "Iterator[Chain]":
        """Waits for who has it. CorruptError if it breaks before its end, which `cdp check --chain` explains."""
        fd = os.open(timeline / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            chain = cls(timeline, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                chain._load(uuid)
                yield chain
            finally:
                chain._journal.close()
        finally:
            os.close(fd)

    def _load(self, uuid: bytes) -> None:
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        if len(data) < HEAD.size:
            os.pwrite(self._fd, encode_head(uuid), 0)
            os.fsync(self._fd)
            durable.fsync_dir(self.timeline)
            data = encode_head(uuid)
        if _uuid(data, self.timeline / FILE) != uuid:
            raise CorruptError(
                f"{self.timeline / FILE} is of another timeline", hint="cdp check --chain says more"
            )
        self.links = _whole(data, self.timeline / FILE)

    def append(self, link: Link) -> None:
        """Durable on return."""
        before = self.links[-1].digest if self.links else blake3(os.pread(self._fd, HEAD.size, 0)).digest()
        body = link.body()
        raw = body + blake3(before + body).digest()
        at = HEAD.size + len(self.links) * LINK.size
        with durable.io_errors("write", self.timeline / FILE):
            self._reserve(at + LINK.size)
            written = 0
            while written < len(raw):
                written += os.pwrite(self._fd, raw[written:], at + written)
            os.fdatasync(self._fd)
        self.links.append(_decode(raw))

    def _reserve(self, end: int) -> None:
        size = os.fstat(self._fd).st_size
        if end + ROOM > size:
            try:
                os.posix_fallocate(self._fd, size, 2 * ROOM)
            except OSError as error:
                if error.errno not in durable.NO_SPACE:
                    raise
                # What was allocated before may do.

    def catch_up(self, most: int, *, anew: bool = False) -> bool:
        """Link segments that have been sealed, oldest first, at most so many. Is everything linked but the newest segment?

        CorruptError where one cannot be read, or (but `anew`) is not what its own header page says that it was.
        """
        last, made = self.last_place, 0
        previous = next((link.new for link in reversed(self.links) if link.kind == Kind.SEALED), NONE)
        places = [place for place in self._journal.places(after=last) if place != last]
        for interval, number in places:
            reader = self._journal.reader(interval, number)
            if made == most or reader.state != SEALED:
                return (interval, number) == places[-1]
            digest, carried = segment_digest(reader), stamped(reader.page())
            if carried is not None and carried[0] != digest and not anew:
                raise CorruptError(
                    f"{reader.path} is not what it was when it was sealed", hint="cdp check --chain says more"
                )
            stamp(reader.path, digest, previous)
            self.append(sealed_link(reader, interval, digest))
            previous, made = digest, made + 1
        return True

    @property
    def last_place(self) -> tuple[int, int]:
        """(interval, segment) of the newest that a link is about."""
        return last_place(self.links)

    def drop(self, interval: int, *, reason: str) -> None:
        """Say that an interval is dropped; before that is done. Once is enough."""
        self.catch_up(1 << 62)
        now = current(self.links, interval)
        if now is not None and now.kind != Kind.DROPPED:
            self._replace(Kind.DROPPED, interval, NONE, reason)

    def thin(self, interval: int, new: Path, *, reason: str) -> None:
        """Say that `new` takes the place of an interval, before it does."""
        self.catch_up(1 << 62)
        numbers = sorted(int(path.stem) for path in new.glob("*.log"))
        carried = stamped(self._journal.first_reader(interval).page())
        before = carried[1] if carried is not None else NONE
        digests = []
        for number in numbers:
            with contextlib.closing(SegmentReader(new, number)) as reader:
                digests.append(segment_digest(reader))
            stamp(log_path(new, number), digests[-1], before)
            before = digests[-1]
        self._replace(Kind.THINNED, interval, interval_digest(new, digests), reason)

    def _replace(self, kind: Kind, interval: int, new: bytes, reason: str) -> None:
        # History ages by its own newest record, and so does its chain.
        now_ns = self._journal.last().time_ns
        old = known_digest(self.links, interval)
        self.append(Link(kind, interval, 0, 0, 0, now_ns, old, new, reason))


def last_place(links: list[Link]) -> tuple[int, int]:
    """(interval, segment) of the newest segment that needs no further link."""
    found = (0, 0)
    for link in links:
        found = max(found, (link.interval, link.segment or 1 << 62))
    return found


def current(links: list[Link], interval: int) -> Link | None:
    """The newest link about an interval."""
    return next((link for link in reversed(links) if link.interval == interval), None)


def known_digest(links: list[Link], interval: int) -> bytes:
    """What links say an interval holds: by its segments, or as it was thinned to; zeros if it was dropped, or is not known."""
    last = current(links, interval)
    if last is None:
        return NONE
    if last.kind != Kind.SEALED:
        return last.new
    return blake3(
        b"".join(link.new for link in links if link.interval == interval and link.kind == Kind.SEALED)
    ).digest()

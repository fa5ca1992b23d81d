"""A repository as one sequential stream, for tape: what stands in it, and writing it. docs/format.md is the source.

    head   record, payload, record, payload, ...   the last record   zeros up to a whole block

Whatever a backup needs comes before it, so that whoever reads once, forwards, has each backup whole when its record comes. A
chunk is in the stream once. Records are found again after damage by their magic and check. A drive makes of each write one block
of the tape, and takes none of another size where blocks are fixed: what is written are blocks of one size.
"""

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from blake3 import blake3

from cdpserver.errors import CorruptError
from cdpserver.progress import Progress, nobody
from cdpserver.repository import sessions
from cdpserver.repository.configuration import Config, config_from
from cdpserver.repository.content import ChunkList
from cdpserver.repository.format import ID_SIZE, MAX_CHUNK, PAGE_IDS, ZERO_ID, Kind
from cdpserver.repository.record import Backup
from cdpserver.repository.repository import Repository

MAGIC = b"cdptape1"
HEAD = struct.Struct("<8sII")
"""Magic, bytes of the configuration that follows, CRC of these."""

RECORD = struct.Struct("<HBBIII32s")
CHECK = struct.Struct("<I")
RECORD_SIZE = RECORD.size + CHECK.size
RECORD_MAGIC = 0xCE51

BLOCK = 256 << 10
"""Each write's; drives and host adapters take it, and fixed blocks of any size that divides it."""

MAX_CONFIG = 64 << 10
MAX_PAYLOAD = MAX_CHUNK + 1024


class What(IntEnum):
    """What a record's payload is."""

    DATA = 1
    PAGE = 2
    BACKUP = 3
    """The id of a backup, a line feed, and the object that holds it."""
    END = 4
    """Nothing; the id is the digest of all that came before this record."""


@dataclass(frozen=True, slots=True)
class Record:
    """What stands before a payload of `stored` bytes; `number` counts from 0."""

    what: What
    codec: int
    raw: int
    stored: int
    number: int
    id: bytes


def pack_record(record: Record) -> bytes:
    """As it is written."""
    body = RECORD.pack(
        RECORD_MAGIC, record.what, record.codec, record.raw, record.stored, record.number, record.id
    )
    return body + CHECK.pack(zlib.crc32(body))


def parse_record(data: bytes | bytearray | memoryview) -> Record | None:
    """None if these RECORD_SIZE bytes are none."""
    body = bytes(data[: RECORD.size])
    magic, what, codec, raw, stored, number, id_ = RECORD.unpack(body)
    if magic != RECORD_MAGIC or CHECK.unpack_from(data, RECORD.size)[0] != zlib.crc32(body):
        return None
    if what not in tuple(What) or stored > MAX_PAYLOAD:
        return None
    return Record(What(what), codec, raw, stored, number, id_)


def pack_head(config: Config) -> bytes:
    """What the stream begins with."""
    text = json.dumps(config.show()).encode()
    return HEAD.pack(MAGIC, len(text), zlib.crc32(text)) + text


def parse_head(head: bytes, text: bytes) -> Config:
    """CorruptError."""
    if len(head) < HEAD.size or head[:8] != MAGIC:
        raise CorruptError("this is no export of a repository", hint="cdp repo export writes one")
    if HEAD.unpack(head)[2] != zlib.crc32(text):
        raise CorruptError("the head of the stream is damaged", hint="use another copy of it")
    return config_from(text, "the stream")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    backups: int
    chunks: int
    bytes: int
    digest: str


class _Writer:
    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._digest = blake3()
        self._number = 0
        self._rest = bytearray()
        """Less than a block."""
        self.bytes = 0

    def put(self, data: bytes) -> None:
        self._digest.update(data)
        self._rest += data
        while len(self._rest) >= BLOCK:
            self._write_block()

    def end(self) -> None:
        """What is left, as a whole block."""
        if self._rest:
            self._rest += bytes(BLOCK - len(self._rest))
            self._write_block()

    def _write_block(self) -> None:
        self._write(bytes(self._rest[:BLOCK]))
        del self._rest[:BLOCK]
        self.bytes += BLOCK

    def record(self, what: What, id_: bytes, payload: bytes, *, codec: int = 0, raw: int = 0) -> None:
        self.put(
            pack_record(Record(what, codec, raw or len(payload), len(payload), self._number, id_)) + payload
        )
        self._number += 1

    def digest(self) -> bytes:
        return self._digest.digest()


def export(
    repository: Repository,
    backups: Sequence[Backup],
    write: Callable[[bytes], object],
    *,
    created_ns: int,
    progress: Progress = nobody,
) -> Exported:
    """These backups, in this order; `write` gets a block at a time. CorruptError if one is not whole: then there is no end."""
    written: set[bytes] = set()
    with sessions.session(repository.place, sessions.new_id(created_ns)):  # `gc` waits
        out = _Writer(write)
        out.put(pack_head(repository.config))
        for number, backup in enumerate(backups):
            progress(number / len(backups))
            for id_, kind, length in chunks_of_backup(repository, backup):
                if id_ not in written:
                    written.add(id_)
                    entry, stored = repository.load_stored(id_, length)
                    out.record(What(kind), id_, stored, codec=entry.codec, raw=entry.raw)
            payload = backup.id.encode() + b"\n" + repository.place.get(f"backups/{backup.id}")
            out.record(What.BACKUP, blake3(payload).digest(), payload)
        digest = out.digest()
        out.record(What.END, digest, b"")
        out.end()
    progress(1.0)
    return Exported(len(backups), len(written), out.bytes, digest.hex())


def chunks_of_backup(repository: Repository, backup: Backup) -> Iterator[tuple[bytes, Kind, int | None]]:
    """(id, kind, length) of what a backup needs: chunks and patches of a page, then it and its table. CorruptError."""
    for disk in backup.disks:
        chunks = ChunkList(repository, disk)
        for number, page in enumerate(disk.pages):
            for patch in chunks.table(number).values():
                if patch.id != ZERO_ID:
                    yield patch.id, Kind.DATA, patch.length
            if (table := chunks.table_id(number)) != ZERO_ID:
                yield table, Kind.DATA, None
            if page == ZERO_ID:
                continue
            ids = chunks.page(number)
            first = number * PAGE_IDS
            for at in range(0, len(ids), ID_SIZE):
                id_ = ids[at : at + ID_SIZE]
                if id_ != ZERO_ID:
                    yield id_, Kind.DATA, chunks.length(first + at // ID_SIZE)
            yield page, Kind.PAGE, len(ids)

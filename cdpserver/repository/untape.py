"""Reads a stream that `tape` wrote, once and forwards, into a repository: a new one, or the one that it came from.

What is damaged is passed over up to the next record. A backup becomes one when everything that it needs is there; of one that
misses something its disks and ranges are told. Chunks that are there already are not stored again, so a second copy of the stream
fills what the first one had lost.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from cdpserver.errors import CorruptError, RefusedError
from cdpserver.repository import sessions
from cdpserver.repository.check import Damage, missing
from cdpserver.repository.configuration import Config
from cdpserver.repository.format import Kind
from cdpserver.repository.packs import PackWriter
from cdpserver.repository.place import Place
from cdpserver.repository.repository import Repository, adopt, find_config
from cdpserver.repository.retain import retain
from cdpserver.repository.tape import (
    BLOCK,
    HEAD,
    MAX_CONFIG,
    RECORD_MAGIC,
    RECORD_SIZE,
    Record,
    What,
    parse_head,
    parse_record,
)

PIECE = 4 * BLOCK
"""Asked for with each read: a drive refuses one that is smaller than the tape's block, or no multiple of a fixed one."""

SIGN = RECORD_MAGIC.to_bytes(2, "little")


class Source(Protocol):
    """What a stream is read from."""

    def read(self, size: int, /) -> bytes | None:
        """At most so many bytes, by one request; none at the end."""


@dataclass(slots=True)
class Imported:
    """What came out of a stream, and what did not."""

    backups: list[str] = field(default_factory=list)
    """Whole, and there now."""
    damage: list[Damage] = field(default_factory=list)
    """Of backups that are not whole, and so are not there."""
    chunks: int = 0
    lost_chunks: int = 0
    """Their payload is not what its record says."""
    lost_bytes: int = 0
    """Passed over to find the next record."""
    ended: bool = False
    """The last record came; otherwise there was more."""
    intact: bool = False
    """The digest of all bytes is the one that was written."""

    @property
    def sound(self) -> bool:
        """Everything came out, and nothing is missing."""
        return self.ended and self.intact and not self.damage


class Reader:
    """The records of a stream. `ended` and `intact` are right when there are no more."""

    def __init__(self, source: Source) -> None:
        """CorruptError if it is no such stream, or its head is damaged."""
        self._source = source
        self._buffer = bytearray()
        self._digest = blake3()
        self.bytes = 0
        self.lost_bytes = 0
        self.ended = False
        self.intact = False
        head = self._take(HEAD.size)
        length = HEAD.unpack(head)[1] if len(head) == HEAD.size else 0
        self.config: Config = parse_head(head, self._take(min(length, MAX_CONFIG)))

    def records(self) -> Iterator[tuple[Record, bytes]]:
        """(record, payload), whatever the payload is worth."""
        while self._fill(RECORD_SIZE):
            record = parse_record(self._buffer[:RECORD_SIZE])
            if record is None:
                self._pass_over()
                continue
            if record.what == What.END:
                self.intact = record.id == self._digest.digest() and not self.lost_bytes
                self.ended = True
                self._fill(
                    RECORD_SIZE + -(self.bytes + RECORD_SIZE) % BLOCK
                )  # the writer may wait for the last block to go
                return
            if not self._fill(RECORD_SIZE + record.stored):
                break  # cut in the middle of a payload
            self._take(RECORD_SIZE)
            yield record, self._take(record.stored)
        self.lost_bytes += len(self._buffer)

    def _pass_over(self) -> None:
        """To what may be the next record."""
        at = self._buffer.find(SIGN, 1)
        length = at if at > 0 else max(1, len(self._buffer) - 1)
        self.lost_bytes += length
        self._take(length)

    def _fill(self, length: int) -> bool:
        while len(self._buffer) < length:
            data = self._source.read(PIECE)
            if not data:
                return False
            self._buffer += data
        return True

    def _take(self, length: int) -> bytes:
        self._fill(length)
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._digest.update(data)
        self.bytes += len(data)
        return data


def import_(
    place: Place,
    source: Source,
    *,
    secret: bytes | None = None,
    cache: Path | None = None,
) -> Imported:
    """Everything of the stream that is whole; no buffer before `source`.

    RefusedError into another repository; CorruptError for what is no stream.
    """
    reader = Reader(source)
    _prepare(place, reader.config)
    found = Imported()
    with Repository(place, secret=secret, cache=cache) as repository:
        id_ = sessions.new_id(time.time_ns())
        with sessions.session(place, id_) as check_held, PackWriter(repository, id_) as writer:
            repository.refresh()
            for record, payload in reader.records():
                if record.what == What.BACKUP:
                    writer.flush()
                    check_held()
                    _backup(repository, record, payload, found)
                else:
                    _chunk(repository, writer, record, payload, found)
            writer.flush()
    found.lost_bytes, found.ended, found.intact = reader.lost_bytes, reader.ended, reader.intact
    return found


def _prepare(place: Place, config: Config) -> None:
    there = find_config(place)
    if there is None:
        adopt(place, config)
    elif there.id != config.id:
        raise RefusedError(
            f"{place.where} is another repository than the stream's", hint="choose an empty place"
        )


def _chunk(
    repository: Repository, writer: PackWriter, record: Record, payload: bytes, found: Imported
) -> None:
    kind = Kind(record.what)
    try:
        repository.opened(record.id, kind, record.codec, record.raw, payload)
    except CorruptError:
        found.lost_chunks += 1
        return
    found.chunks += 1
    if writer.claim_page(record.id, record.raw) if kind == Kind.PAGE else writer.claim(record.id):
        writer.add(record.id, kind, record.raw, (payload, record.codec))


def _backup(repository: Repository, record: Record, payload: bytes, found: Imported) -> None:
    name, _, data = payload.partition(b"\n")
    id_ = name.decode(errors="replace")[:80]
    try:
        if blake3(payload).digest() != record.id:
            raise CorruptError("its record is damaged")
        backup = repository.unpack_backup(id_, data)
        damage = missing(repository, backup)
    except CorruptError as error:
        damage = [Damage(id_, "", 0, 0, error.message)]
    if damage:
        found.damage += damage
        return
    if id_ not in repository.backup_ids():
        backup = replace(backup, since_ns=repository.now_ns(), made_ns=backup.order[0])
        retain(repository, backup)
        repository.write_backup(backup)
        repository.note_made(id_)
    found.backups.append(id_)

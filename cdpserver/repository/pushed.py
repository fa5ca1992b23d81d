"""A backup whose content is sent to us: QEMU's backup job writes, chunks are stored as they become whole.

    pwrite, zero (any thread) -> Assembly of the disk -> queue -> one thread: Pipeline -> packs
                                                                     commit: lists, backup

Invariants: the backup is published only if every request of every disk was taken, and no chunk was left unfinished; of a full one
every chunk must have come. What is wrong once stays wrong: a disk whose connection was lost counts no more.
Durability: after `commit`, as any backup's. A process that is killed before leaves chunks that `gc` takes away, and no backup.
"""

import contextlib
import errno
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from cdpserver import messages
from cdpserver.errors import BrokenError, CdpError, NoSpaceError, RefusedError
from cdpserver.names import format_time
from cdpserver.repository.assembly import Assembly
from cdpserver.repository.content import ChunkList
from cdpserver.repository.format import ID_SIZE, PAGE_IDS, ZERO_ID, chunk_count
from cdpserver.repository.listing import Listed, Listing
from cdpserver.repository.packs import PackWriter
from cdpserver.repository.patches import Patch
from cdpserver.repository.pipeline import Pipeline
from cdpserver.repository.pipeline import Sent as SentChunk
from cdpserver.repository.place import HeldCheck
from cdpserver.repository.record import FULL, BackedUpDisk, Backup
from cdpserver.repository.repository import Repository
from cdpserver.repository.take import check_list, publish

MUCH_BYTES = 96 << 20
"""So much is held, and the sender is asked to pause: what the guest is about to overwrite needs the room above."""

MOST_BYTES = 256 << 20
"""So much is held, and requests wait."""

ROOM_S = 20.0
"""How long one waits at most; then it fails, and the backup with it. A guest's write may stand behind it: Linux gives it 30 s."""

TIMELINE = "qemu:"
"""What the timeline of a disk begins with that is none of ours."""

CHUNKS_HELD = 4
"""Where chunks are large the limits are no less than so many."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A disk that is to come."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Intent:
    """A backup of a VM that is to be made of what comes. `parent` is the backup before, of an incremental one."""

    id: str
    created_ns: int
    vm: str
    kind: str
    reason: str
    parent: str
    disks: tuple[Sent, ...]
    tags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "Intent":
        """From a message; the reverse of `dataclasses.asdict`."""
        disks = tuple(Sent(str(one["name"]), int(one["size"])) for one in fields["disks"])
        texts = {name: str(fields[name]) for name in ("id", "vm", "kind", "reason", "parent")}
        tags = {str(name): str(value) for name, value in fields["tags"].items()}
        return cls(**texts, created_ns=int(fields["created_ns"]), disks=disks, tags=tags)


class Disk:
    """One disk that is being sent, by one connection."""

    def __init__(self, sent: Sent, step: int, old: ChunkList | None) -> None:
        self.name, self.size = sent.name, sent.size
        self.count = chunk_count(sent.size, step)
        self._old, self._step = old, step
        self._pages: dict[int, bytearray] = {}
        """The ids of the pages of its list of which something came; 128 MiB for each TiB of 256 KiB chunks."""
        self._tables: dict[int, dict[int, Patch]] = {}
        """What is patched in these, where the backup before is a copy that was made by what changed."""
        self.assembly = Assembly(sent.size, step)
        self.connected = False
        self.whole = 0
        """Chunks that came whole."""
        self.zeroed: list[int] = []
        """Of these those that are zeros now, where an earlier backup may have something else."""

    def put(self, chunk: int, id_: bytes) -> None:
        """Chunk number `chunk` is the one of that id."""
        page = chunk // PAGE_IDS
        if page not in self._pages:
            length = min(PAGE_IDS, self.count - page * PAGE_IDS) * ID_SIZE
            self._pages[page] = bytearray(self._old.page(page) if self._old is not None else length)
            self._tables[page] = dict(self._old.table(page)) if self._old is not None else {}
        at = chunk % PAGE_IDS * ID_SIZE
        self._pages[page][at : at + ID_SIZE] = id_
        self._tables[page].pop(chunk % PAGE_IDS, None)

    def listed(self, writer: PackWriter) -> Listed:
        """Its list, which is stored."""
        made = Listing(writer, self._old, count=self.count, step=self._step)
        for number in sorted(self._pages):
            made.put_page(number, self._pages[number], self._tables[number])
        return made.end()


class Pushed:
    """Takes what is sent, until `commit` or `close`. Threads: any."""

    def __init__(self, repository: Repository, intent: Intent, check_held: HeldCheck) -> None:
        """In the session `intent.id`, which the caller holds. NotFoundError, CorruptError for a parent that is not there."""
        self._repository, self._intent, self._check_held = repository, intent, check_held
        self._started = time.monotonic()
        step = repository.chunk_size
        self._parent = repository.backup(intent.parent) if intent.parent else None
        self.disks = {one.name: Disk(one, step, self._old(one)) for one in intent.disks}
        self._much = max(MUCH_BYTES, CHUNKS_HELD * step)
        self._most = self._much + max(MOST_BYTES - MUCH_BYTES, CHUNKS_HELD * step)
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._queue: SimpleQueue[SentChunk | None] = SimpleQueue()
        self._queued = 0
        self._failed: CdpError | None = None
        self._over = False
        self._read_bytes = 0
        self._writer = PackWriter(repository, intent.id)
        self._pipeline = Pipeline(repository, self._writer)
        self._thread = threading.Thread(target=self._store, name="storing")
        self._thread.start()

    def _old(self, sent: Sent) -> ChunkList | None:
        if self._parent is None:
            return None
        before = self._parent.disk(sent.name)
        if before is None or before.size != sent.size:
            raise RefusedError(
                f"backup {self._parent.id} has no {sent.name} of that size", hint="make a full one"
            )
        check_list(self._repository, before)
        return ChunkList(self._repository, before)

    # -- what is sent

    def connect(self, name: str) -> Disk:
        """A disk's one connection. RefusedError for a second one: what the first had under way may be missing."""
        with self._lock:
            disk = self.disks.get(name)
            if disk is None or self._over:
                raise RefusedError("there is no such disk to be sent", hint="cdp backup run says which")
            if disk.connected:
                raise self._fail(RefusedError(f"{name} has a client already", hint="make the backup again"))
            disk.connected = True
            return disk

    def lost(self, disk: Disk) -> None:
        """Its connection has ended."""
        with self._lock:
            if not self._over:
                self._fail(
                    BrokenError(f"QEMU closed its connection for {disk.name}", hint="make the backup again")
                )

    def write(self, disk: Disk, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Take data. The error that ended the backup, if one did."""
        with self._taking(len(data)):
            self._read_bytes += len(data)
            for chunk, content in disk.assembly.write(offset, data):
                self._put(disk, chunk, content)

    def zero(self, disk: Disk, offset: int, length: int) -> None:
        """Take zeros, as many as they are."""
        with self._taking(0):
            for chunk, content in disk.assembly.zero(offset, length):
                if content is not None:
                    self._put(disk, chunk, content)
                    continue
                disk.whole += 1
                if self._parent is not None:
                    disk.zeroed.append(chunk)

    @contextlib.contextmanager
    def _taking(self, length: int) -> Iterator[None]:
        """With the lock, and room for so much. The error that ended the backup, if one did."""
        with self._room:
            room = self._room.wait_for(
                lambda: self._failed is not None or self._held() + length <= self._most, ROOM_S
            )
            if not room:
                self._fail(
                    BrokenError(
                        f"the repository took nothing for {ROOM_S:.0f} s", hint="make the backup again"
                    )
                )
            if self._failed is not None:
                raise self._failed
            try:
                yield
            except OSError as error:  # of an assembly's file
                raise self._fail(_no_file(error)) from None

    def _put(self, disk: Disk, chunk: int, content: bytearray) -> None:
        disk.whole += 1
        self._queued += len(content)
        self._queue.put((disk.put, chunk, content))

    def _held(self) -> int:
        return self._queued + sum(disk.assembly.held for disk in self.disks.values())

    def _fail(self, error: CdpError) -> CdpError:
        """What happened first is what is told."""
        self._failed = self._failed or error
        self._room.notify_all()
        return self._failed

    # -- what is stored

    def _store(self) -> None:
        """The thread: until the queue ends, or something fails."""
        try:
            self._pipeline.store_sent(self._items())
        except CdpError as error:
            with self._lock:
                self._fail(error)
        except Exception as error:  # noqa: BLE001 - told to whoever commits; requests must not wait for a thread that is gone
            with self._lock:
                self._fail(BrokenError(f"storing failed: {error!r}"))

    def _items(self) -> Iterator[SentChunk]:
        while (item := self._queue.get()) is not None:
            with self._lock:
                self._queued -= len(item[2])
                self._room.notify_all()
                if self._failed is not None:
                    return
            yield item

    # -- what the controller asks

    def status(self) -> dict[str, Any]:
        """How far it is. An error's fields, if one ended it."""
        with self._lock:
            failed = messages.error_fields(self._failed) if self._failed is not None else {}
            return {"read_bytes": self._read_bytes, "much": self._held() > self._much, **failed}

    def commit(self, time_ns: int, grade: str) -> Backup:
        """Publish what came as the disks at `time_ns`. The error that ended it, if one did: then there is no backup."""
        with self._lock:
            if self._failed is None:
                self._check_whole()
            if self._failed is not None:
                raise self._failed
            self._over = True  # a connection that ends now has done its work
        self._end()
        if self._failed is not None:
            raise self._failed
        disks = [self._listed(disk, time_ns, grade) for disk in self.disks.values()]
        self._writer.flush()
        intent, parent, now_ns = self._intent, self._parent, self._repository.now_ns()
        backup = Backup(
            id=intent.id,
            kind=intent.kind,
            reason=intent.reason,
            created_ns=intent.created_ns,
            name=f"{intent.vm}@{format_time(time_ns)}",
            disks=tuple(disks),
            parent=intent.parent,
            increments=parent.increments + 1 if parent is not None else 0,
            read_bytes=self._read_bytes,
            new_bytes=self._pipeline.new_bytes,
            stored_bytes=self._writer.stored_bytes,
            seconds=round(time.monotonic() - self._started, 3),
            tags=dict(intent.tags),
            since_ns=now_ns,
            made_ns=now_ns,
        )
        publish(self._repository, backup, self._check_held)
        return backup

    def _check_whole(self) -> None:
        for disk in self.disks.values():
            unfinished = disk.assembly.unfinished
            if self._intent.kind == FULL:
                unfinished = max(unfinished, disk.count - disk.whole)
            if unfinished:
                self._fail(
                    BrokenError(
                        f"{unfinished} chunks of {disk.name} did not come whole", hint="make the backup again"
                    )
                )

    def _listed(self, disk: Disk, time_ns: int, grade: str) -> BackedUpDisk:
        for chunk in disk.zeroed:
            disk.put(chunk, ZERO_ID)
        listed = disk.listed(self._writer)
        # No timeline of ours has such a name, nor another disk: a copy in a second repository is told apart by this and the time.
        return BackedUpDisk(
            name=disk.name,
            timeline=f"{TIMELINE}{disk.name}",
            seq=time_ns,
            time_ns=time_ns,
            size=disk.size,
            grade=grade,
            pages=listed.pages,
            chunks=listed.chunks,
            patches=listed.patches,
            patched=listed.patched,
        )

    def give_up(self) -> None:
        """Nothing more is taken: requests are answered at once, with an error."""
        with self._lock:
            self._fail(RefusedError("the backup was given up", hint="make it again"))

    def _end(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def close(self) -> None:
        """Let go of everything; what was not published is none."""
        with self._lock:
            self._over = True
        self.give_up()
        self._end()
        self._pipeline.close()
        self._writer.__exit__()
        for disk in self.disks.values():
            disk.assembly.close()


def _no_file(error: OSError) -> CdpError:
    where = tempfile.gettempdir()
    if error.errno == errno.ENOSPC:
        return NoSpaceError(
            f"{where} is full: what the guest overwrites meanwhile waits there",
            hint="free space, or set TMPDIR",
        )
    return BrokenError(f"the temporary file in {where} failed: {error.strerror or error}")

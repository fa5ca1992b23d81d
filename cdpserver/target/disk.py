r"""A timeline that clients write to: first copy or journal, its connections and their sessions.

    connections --lock each--> FirstCopy   (until the switch)
                          \--> JournalWriter (from then on)

Invariants: the mode is decided by files. The switch holds every connection's lock for its few milliseconds, so that no
write is half in the base and half in the journal.
A session begins with a connection's first write, and again when a connection that wrote is lost. A fork that its guest writes
to itself has none, until it is said that a mirror does (`mirrored`).
Threads: one per connection (`-t 1`), the committer, the control thread.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from cdpserver import timeline as timeline_file
from cdpserver.errors import (
    BrokenError,
    CdpError,
    CorruptError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    RemovedError,
    UsageError,
)
from cdpserver.journal import control, firstcopy
from cdpserver.journal.begin import lock_timeline
from cdpserver.journal.breaks import put_gap
from cdpserver.journal.firstcopy import FirstCopy
from cdpserver.journal.log import Journal
from cdpserver.journal.observed import told
from cdpserver.journal.writer import JournalWriter
from cdpserver.names import MirrorExport, format_size
from cdpserver.target import leftover, said
from cdpserver.target.connection import Connection
from cdpserver.target.counts import Counts, total
from cdpserver.target.reads import LiveReads
from cdpserver.timeline import Timeline
from cdpserver.view.history import History

Emit: TypeAlias = Callable[..., None]


class TargetDisk:
    """One timeline, open for writing by this process."""

    def __init__(
        self, state_dir: Path, timeline: Timeline, *, clock_ns: Callable[[], int], boot_id: str, emit: Emit
    ) -> None:
        self.timeline = timeline
        self.size = 0
        self.directory = state_dir / "timelines" / timeline.id
        self._state_dir = state_dir
        self._clock_ns = clock_ns
        self._boot_id = boot_id
        self._emit = emit
        self._mode_lock = threading.Lock()
        self._session_lock = threading.Lock()
        self._base_lock = threading.Lock()
        self._base_durable = False
        self._connections: dict[int, Connection] = {}
        self.gone = False
        """Closed for good: what its clients still ask for is refused."""
        self.full = ""
        """Why writes are refused, by the policy of a disk at its cap; else nothing."""
        self._counts = Counts()
        """Of connections that are gone."""
        self.indexed = 0
        """How far the index had come when the committer looked last."""
        self.first_copy: FirstCopy | None = None
        self.journal: JournalWriter | None = None
        self.reads: LiveReads | None = None
        self._lock_fd = lock_timeline(self.directory)
        try:
            self._open()
        except BaseException:
            os.close(self._lock_fd)
            raise

    def _open(self) -> None:
        leftover.restart_lost_first_copy(self.directory, self.timeline, self._boot_id)
        if Journal(self.directory).empty:
            self.size = self.timeline.size
            self.first_copy = FirstCopy(self.directory, size=self.size, boot_id=self._boot_id)
            if self.first_copy.restarted:
                self._emit("target.first-copy-restarted", level="warning", disk=self.timeline.full_name)
        else:
            self._base_durable = True
            self._open_journal()

    def _open_journal(self) -> None:
        try:
            journal = JournalWriter(
                self.directory,
                uuid=self.timeline.uuid,
                size=self.timeline.size,
                clock_ns=self._clock_ns,
                boot_id=self._boot_id,
            )
            try:
                self.reads = LiveReads(History(self._state_dir, self.timeline, self._boot_id))
            except BaseException:
                journal.close()
                raise
        except CorruptError as error:
            self._emit("target.damaged", level="error", disk=self.timeline.full_name, reason=str(error))
            raise
        journal.reads = self.reads
        self.journal = journal
        self.size = journal.size
        if journal.recovered is not None:
            name = self.timeline.full_name
            self._emit("target.unclean-boot", level="warning", disk=name, **journal.recovered)
            if not self._is_direct:
                self._emit("disk.gap", level="warning", disk=name, reason="unclean host boot")

    # -- state -----------------------------------------------------------------------------------------------

    @property
    def broken(self) -> str:
        """Why the writer is poisoned, or nothing."""
        if self.journal is not None:
            return self.journal.broken
        return "" if self.first_copy is not None else "its history did not open"

    @property
    def clients(self) -> int:
        """Connections open now."""
        return len(self._connections)

    def status(self) -> dict[str, Any]:
        """What the service wants to know, as plain values."""
        with self._mode_lock:
            counts = [self._counts, *(held.counts for held in self._connections.values())]
            shared = {"clients": self.clients, "broken": self.broken, "counts": total(counts)}
            return shared | said.of(self.first_copy, self.journal, base_durable=self._base_durable)

    # -- connections -----------------------------------------------------------------------------------------

    def connect(self, mirror: MirrorExport | None = None) -> Connection:
        """A client opened the export; as the mirror of this very timeline it takes the place of one that connected before.

        NotFoundError for a mirror of another timeline: what it goes on with is not here.
        """
        if mirror is not None and mirror.uuid != self.timeline.uuid.hex():
            raise NotFoundError(
                f"{self.timeline.full_name} is another disk than the one that was mirrored",
                hint="its protection begins anew: cdp protect VM",
            )
        born_ns = mirror.born_ns if mirror is not None else None
        with self._mode_lock:
            if self.gone:
                raise RemovedError(f"{self.timeline.full_name} is being removed", hint="choose another disk")
            connection = Connection(self, born_ns)
            if born_ns is not None:
                self._replace(connection, born_ns)
            self._connections[id(connection)] = connection
        return connection

    def _replace(self, newest: Connection, born_ns: int) -> None:
        """Only the newest mirror writes: QEMU has given up the others, though their writes may still be on the way."""
        written = False
        for other in self._connections.values():
            if other.born_ns is None:
                continue
            if other.born_ns > born_ns:
                newest.replaced = True
                continue
            with other.lock:  # a write that is under way ends first
                other.replaced = True
            written, other.wrote = written or other.wrote, False
        if written and not self.broken:
            self._end_session("another mirror connected")

    def disconnect(self, connection: "Connection") -> None:
        """A client is gone. If it wrote, what comes next is a session of its own."""
        with self._mode_lock:
            if self._connections.pop(id(connection), None) is not None:
                self._counts.add(connection.counts)
            if connection.wrote and not self.gone and not self.broken:
                self._end_session("connection lost")

    def _end_session(self, reason: str) -> None:
        """A connection that wrote is gone."""
        try:
            self.begin_session(reason)
        except CdpError as error:
            # No room to say it now: whoever writes next says it first.
            for other in self._connections.values():
                other.wrote = False
            self._emit(
                "target.session-late", level="warning", disk=self.timeline.full_name, reason=str(error)
            )

    def refused(self) -> None:
        """A client has heard of an error, and goes on without what it wrote: its session is over, as with a lost connection.

        Nothing of it is in the journal, so the next write is the first of a session of its own, whoever's that is.
        """
        for other in list(self._connections.values()):
            other.wrote = False
        if self.journal is not None and self.journal.state.synced and not self.broken:
            # Until then, too, points count as in sync no more; without room for that the next write says it first.
            with contextlib.suppress(NoSpaceError, BrokenError):
                self.begin_session("a write was refused")

    def begin_session(self, reason: str) -> None:
        """Points are unordered from here on, until *synced*."""
        if self._is_direct:
            return
        self._begin_session(reason)

    @property
    def _is_direct(self) -> bool:
        return self.journal is not None and self.journal.state.fork

    def _begin_session(self, reason: str) -> None:
        with self._session_lock:
            if self.journal is not None:
                number = self.journal.begin_session(reason)
            else:
                assert self.first_copy is not None
                number = self.first_copy.begin_session()
        self._emit("target.session", disk=self.timeline.full_name, session=number, reason=reason)

    # -- the switch ------------------------------------------------------------------------------------------

    def open_history(self, reason: str) -> bool:
        """End the first copy, if it is still under way. True when this call did it.

        On return the base is durable too. The caller holds no connection's lock.
        """
        with self._mode_lock:
            if self.first_copy is None:
                return False
            held = list(self._connections.values())
            for connection in held:
                connection.lock.acquire()
            try:
                started = self._clock_ns()
                self.first_copy.switch(uuid=self.timeline.uuid, now_ns=started)
                old, self.first_copy = self.first_copy, None
                try:
                    self._open_journal()
                finally:
                    old.close()
            finally:
                for connection in held:
                    connection.lock.release()
        self._sync_base()
        self._emit("target.history-begins", disk=self.timeline.full_name, reason=reason)
        return True

    def _sync_base(self) -> None:
        """The base that the history stands on is durable on return."""
        if not self._base_durable:
            with self._base_lock:
                firstcopy.sync_base(self.directory)
                (self.directory / "first-copy.json").unlink(missing_ok=True)
                self._base_durable = True

    def synced(
        self,
        session: int | None,
        *,
        write_blocking: bool,
        bitmap: str = "",
        observed: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The first copy or a resync is complete. RefusedError for a session that is over.

        `bitmap` names the source's that marks what is written from here on (`journal.control.State.anchor`); `observed` is what
        this rests on, as `journal.observed.told` takes it.
        """
        if self._is_direct:
            raise UsageError(
                f"{self.timeline.full_name} is a fork: it has no mirror to be in sync with",
                hint="its points are crash-consistent from the start",
            )
        first_copy = self.first_copy
        if first_copy is not None:
            current = first_copy.session
            if session is not None and session != current:
                raise RefusedError(
                    f"session {session} is over; the current one is {current}",
                    hint="its connection was lost or another one wrote; start the mirror again",
                )
            self.open_history("synced")
        assert self.journal is not None
        number = self.journal.state.session if session is None else session
        again = self.journal.state.synced
        seen = told(observed, now_ns=self._clock_ns())
        message = control.synced(number, write_blocking=write_blocking, bitmap=bitmap, observed=seen)
        seq, time_ns = self.journal.synced(message)
        if not again:  # else it only anchors another bitmap
            self._emit(
                "target.synced",
                disk=self.timeline.full_name,
                session=number,
                write_blocking=write_blocking,
                seq=seq,
            )
        return {"session": number, "seq": seq, "time_ns": time_ns}

    def lost(self, session: int, reason: str, *, whole_ns: int | None, freed_ns: int | None) -> None:
        """Writes of the guest did not arrive, says who watches its mirror and saw session `session` in sync at `whole_ns`.

        A session that counts as in sync ends with this, and the gap is on record; it ends with the next first write.
        """
        journal = self.journal
        if journal is None or self._is_direct:
            return
        with self._session_lock:
            connected = any(connection.wrote for connection in self._connections.values())
            found = put_gap(
                journal, session, reason, whole_ns=whole_ns, freed_ns=freed_ns, connected=connected
            )
        if found is None:
            return
        from_ns, until_ns = found
        if not until_ns:
            for connection in list(self._connections.values()):
                connection.wrote = False
        name, times = self.timeline.full_name, {"from_ns": from_ns, "until_ns": until_ns or None}
        self._emit("disk.gap", level="warning", disk=name, reason=reason, **times)

    def mirrored(self) -> None:
        """A mirror writes to this fork from here on, as to a disk: points are unordered until *synced*."""
        with self._mode_lock:
            if self._is_direct:
                self._begin_session("a mirror writes to the fork")

    def direct(self) -> None:
        """The mirror is complete, and the guest of this fork writes to it itself from here on; durable on return."""
        with self._mode_lock:
            if self.timeline.is_fork and not self._is_direct:
                journal = self.writer("guest")
                journal.synced(control.synced(journal.state.session, write_blocking=True, direct=True))

    def tidy(self) -> None:
        """Keep nothing open to read from that nobody reads, or that is gone."""
        if self.reads is not None:
            self.reads.tidy()

    def grow(self, size: int) -> dict[str, Any]:
        """The disk has `size` bytes from here on, durably; clients see them when they connect anew. RefusedError for fewer.

        In its first copy the disk has no past, so what it is changes; later its history says when it grew.
        """
        with self._mode_lock:
            before = self.size
            if size < before:
                raise RefusedError(
                    f"{self.timeline.full_name} has {format_size(before)} and cannot shrink to {format_size(size)}: "
                    "its points hold what would be cut off",
                    hint="protect the smaller disk under a name of its own: cdp disk add",
                )
            if size > before and self.first_copy is not None:
                self.first_copy.grow(size)
                self.timeline = timeline_file.set_size(self.directory, self.timeline, size)
            elif size > before:
                self.writer("growth").grow(size)
            self.size = size
        if size > before:
            self._emit("disk.grown", disk=self.timeline.full_name, before=before, size=size)
        return {"before": before, "size": size}

    def marker(self, wish: str) -> JournalWriter:
        """The journal's writer for something that names this instant. RefusedError in a gap."""
        writer = self.writer(wish)
        if writer.state.gap_open:
            raise RefusedError(
                f"{self.timeline.full_name} misses writes of its guest now: no {wish} inside a gap",
                hint="when it is in sync again: cdp status",
            )
        return writer

    def writer(self, wish: str) -> JournalWriter:
        """The journal's writer, or a refusal that says what is missing."""
        if self.journal is None:
            raise RefusedError(
                f"{self.timeline.full_name} has no history yet, so no {wish}",
                hint=f"let the first copy end, then: cdp disk synced {self.timeline.full_name}",
            )
        self._sync_base()
        return self.journal

    def flush(self) -> None:
        """Everything acknowledged before, over all connections, is durable on return.

        A FLUSH after writes ends the first copy: QEMU sends one when a mirror is ready.
        """
        first_copy = self.first_copy
        if first_copy is not None and first_copy.wrote:
            self.open_history("flush")
        self._commit()

    def _commit(self) -> None:
        if self.journal is not None:
            self._sync_base()
            self.journal.commit()

    def sync(self) -> None:
        """As `flush`, for FUA: it says nothing of a mirror being ready, so a first copy goes on."""
        first_copy = self.first_copy
        if first_copy is not None:
            first_copy.sync()
        else:
            self._commit()

    def shut(self, *, removing: bool) -> None:
        """Close cleanly. When the disk is removed, requests of clients still connected are refused from here on.

        Else the process is about to be killed, and they wait for that: a mirror that reconnects must not see an error.
        """
        with self._mode_lock:
            if self.gone:
                return
            self.gone = True
            held = list(self._connections.values())
            for connection in held:
                connection.lock.acquire()
            try:
                self._close_files(removing=removing)
            finally:
                if removing:
                    for connection in held:
                        connection.lock.release()
        os.close(self._lock_fd)

    def _close_files(self, *, removing: bool) -> None:
        if self.reads is not None:
            self.reads.close()
        if self.first_copy is not None:
            self.first_copy.close()
        if self.journal is not None:
            try:
                self.journal.close()
            except BrokenError as error:
                if not removing:
                    self._emit(
                        "target.broken", level="error", disk=self.timeline.full_name, reason=str(error)
                    )

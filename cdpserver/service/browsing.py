"""Sessions: processes that each hold one point open for questions about its files (`cdpserver/files/session.py`).

One is kept loaded for the next point (`spare`), so that its first list comes in milliseconds. There are MOST at most; the one
that was unused for the longest time makes room, and after IDLE_S unused each ends, and with it its hold on the point.
A session that dies, hangs or answers nonsense is an error of whoever asked it, and the next question starts another.
"""

import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import trio

from cdpserver import messages, names
from cdpserver.catalog import Entry
from cdpserver.errors import BrokenError, CdpError, RefusedError
from cdpserver.service import processes
from cdpserver.service.core import Core

MOST = 8
"""A session and its worker take 45 MiB, and up to 100 more for the metadata that they keep."""

IDLE_S = 60.0
LOOK_S = 5.0

SPARE_AFTER_S = 10.0
"""A service that just started has better things to do than to be ready for this."""

SILENT_S = 90.0
"""Longest time without a word from a session: its worker may think for 60 s about one answer, and no longer."""

START_S = 60.0

Key: TypeAlias = tuple[str, int]
"""(timeline, seq) of the point; seq -1 for what is about a whole timeline."""

WHOLE = -1


@dataclass(eq=False)
class Session:
    """One process."""

    process: trio.Process
    stream: trio.SocketStream
    asking: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0
    used: float = 0.0
    ended: bool = False
    first: dict[str, Any] | None = None
    """What is asked before anything else: to open the point."""

    @property
    def is_there(self) -> bool:
        """Can it be asked?"""
        return not self.ended and self.process.returncode is None

    async def exchange(self, request: dict[str, Any] | None) -> dict[str, Any]:
        """One request and its answer; without a request, the first word of the process. What disturbs it ends it."""
        async with self.asking:
            try:
                if self.first is not None:
                    await self._begin(self.first)
                return await self._answer(request)
            except trio.TooSlowError:
                raise BrokenError(
                    f"the process that reads this point said nothing for {SILENT_S:g} s, and was ended",
                    hint="look at the store's disk, then try again",
                ) from None
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise BrokenError(
                    "the process that reads this point ended",
                    hint="try again; if it ends again, look at the log",
                ) from error

    async def _begin(self, first: dict[str, Any]) -> None:
        self.first = None
        try:
            await self._answer(first)
        except CdpError:
            self.end()
            raise

    async def _answer(self, request: dict[str, Any] | None) -> dict[str, Any]:
        answer: dict[str, Any] | None = None
        try:
            with trio.fail_after(SILENT_S):
                if request is not None:
                    await self.stream.send_all(messages.pack(request))
            message = await self._message()
            while "alive" in message:
                message = await self._message()
            answer = message.get("ok", {})
        finally:
            if answer is None:
                self.end()  # what it says from here on belongs to another question
        messages.raise_error(message)
        return answer

    async def _message(self) -> dict[str, Any]:
        with trio.fail_after(SILENT_S):
            prefix = await self._exactly(messages.LENGTH.size)
            return messages.unpack(await self._exactly(messages.check_length(prefix)))

    async def _exactly(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = await self.stream.receive_some(length - len(parts))
            if not part:
                raise trio.BrokenResourceError("it ended")
            parts += part
        return bytes(parts)

    def end(self) -> None:
        """Kill it; `Browsing` waits for it."""
        self.ended = True
        self.process.kill()


class Browsing:
    """The sessions of a service."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._open: dict[Key, Session] = {}
        self._spare: Session | None = None
        self._making = trio.Lock()
        self._wanted = trio.Event()

    async def keep_running(self) -> None:
        """Keep a session loaded, and end those that nobody uses; at the end all of them."""
        try:
            with trio.move_on_after(SPARE_AFTER_S):
                await self._wanted.wait()
            await self._make_spare()
            while True:
                with trio.move_on_after(LOOK_S):
                    await self._wanted.wait()
                await self._make_spare()  # a host under load takes its time for it
                await self._look()
        finally:
            for session in [*self._open.values(), *filter(None, [self._spare])]:
                await self._close(session)

    async def _look(self) -> None:
        now = trio.current_time()
        for key, session in list(self._open.items()):
            if not session.is_there or (not session.users and session.used + IDLE_S < now):
                await self._drop(key)

    async def _make_spare(self) -> None:
        """What keeps one from starting is said to who wants it."""
        self._wanted = trio.Event()
        if self._spare is None or not self._spare.is_there:
            with contextlib.suppress(CdpError):
                self._spare = await self._start()

    async def _start(self) -> Session:
        """BrokenError for a host that has no process, memory or file left, whatever of it."""
        try:
            process, ours = await self._spawn()
        except OSError as error:
            raise BrokenError(
                f"no process could be started to read the point: {error.strerror}",
                hint="the host is short of memory, processes or files",
            ) from error
        ours.setblocking(False)
        session = Session(process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        try:
            await session.exchange(None)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._close(session)
            raise
        return session

    async def _spawn(self) -> tuple[trio.Process, socket.socket]:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                number, path = str(theirs.fileno()), str(self._core.state.path)
                # Its standard output is nobody's business; what it says in despair is in our log.
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-m", "cdpserver.files.session", number, path],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=processes.environment(),
                )
        except BaseException:
            ours.close()
            raise
        return process, ours

    async def _close(self, session: Session) -> None:
        session.end()
        with trio.CancelScope(shield=True):
            await session.stream.aclose()
            await session.process.wait()

    async def _drop(self, key: Key) -> None:
        session = self._open.pop(key, None)
        if session is not None:
            await self._close(session)

    async def forget(self, timeline: str) -> None:
        """End what holds a timeline that is to be removed."""
        for key in [key for key in self._open if key[0] == timeline]:
            await self._drop(key)

    # -- asking

    @contextlib.asynccontextmanager
    async def session(self, entry: Entry, seq: int) -> AsyncIterator[Session]:
        """The session of a point (or of a disk, WHOLE), which stays as long as the context."""
        session = await self._of(entry, seq)
        session.users += 1
        try:
            yield session
        finally:
            session.users -= 1
            session.used = trio.current_time()

    async def _of(self, entry: Entry, seq: int) -> Session:
        key = (entry.id, seq)
        if (known := self._known(key)) is not None:
            return known
        async with self._making:
            if (known := self._known(key)) is not None:
                return known
            await self._drop(key)
            await self._make_room()
            session, self._spare = self._spare, None
            if session is None or not session.is_there:
                session = await self._start()
            self._wanted.set()
            if seq != WHOLE:
                session.first = {"op": "open", "disk": entry.name, "seq": seq}
            session.used = trio.current_time()
            self._open[key] = session
            return session

    def _known(self, key: Key) -> Session | None:
        found = self._open.get(key)
        if found is None or not found.is_there:
            return None
        found.used = trio.current_time()
        return found

    async def _make_room(self) -> None:
        unused = sorted(
            (session.used, key)
            for key, session in self._open.items()
            if not session.users or not session.is_there
        )
        while len(self._open) >= MOST:
            if not unused:
                raise RefusedError(
                    f"files of {MOST} points are being read", hint="wait until one of them is done"
                )
            await self._drop(unused.pop(0)[1])

    async def ask(self, entry: Entry, seq: int, request: dict[str, Any]) -> dict[str, Any]:
        """One answer about a point."""
        async with self.session(entry, seq) as session:
            return await session.exchange(request)

    async def place(self, point: str, *, at: int | None = None) -> tuple[Entry, int, str | None]:
        """(disk, seq, volume) that `DISK@WHEN[/VOLUME]` means, durable; `at` is the seq that it meant before."""
        text, volume = names.split_volume(point)
        disk, when = names.parse_point(text)
        core, entry = self._core, self._core.entry(disk)
        if at is not None:
            return entry, at, volume
        position, _ = await core.thread(core.resolve, entry, when)
        try:
            await core.make_durable(entry, position.seq)
        except CdpError as error:
            # Reading what is there must work above all when writing doesn't.
            core.log.emit("point.not-durable", level="warning", point=point, reason=str(error))
        return entry, position.seq, volume

"""QEMU's monitor: a QMP client for Trio.

One connection serves one client at a time (a second gets no greeting), commands are answered by id, events come in between
and are kept in a bounded queue: with `on-target-error=ignore` QEMU sends ten thousand a second, so what overflows is
dropped and said, and the reader asks for the state anew. Protocol: docs/interop/qmp-spec.rst of QEMU.

QEMU's main loop does what commands ask, and all of it waits where a reset of the guest, or a job that ends, waits for a request
that hangs. What frees such a request is therefore sent out of band: it is done by the monitor's own thread.
"""

import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio

from cdpserver.errors import CdpError, CorruptError, RefusedError, UnreachableError

COMMAND_S = 10.0
"""A monitor that answers later than this is taken for hung; commands of ours only start things."""

GREETING_S = 5.0

AT_ONCE = 6
"""Commands that QEMU has not answered; the ninth would keep it from reading one that is out of band."""

OUT_OF_BAND = frozenset({"yank"})
"""What goes past the main loop of a QEMU that does not answer within IN_BAND_S. Not before: the monitor's thread then works on
what the main loop may be working on too, and QEMU 7.2 has been seen to write to memory that it had freed, and to end of that."""

IN_BAND_S = 0.3
"""Most of the two seconds for which a guest may wait goes by until it is known that a target hangs."""

KEPT_EVENTS = 1000

MAX_LINE = 16 << 20
"""Bytes of one message: `query-named-block-nodes` of a hundred disks has about one MiB."""

_CHUNK = 1 << 16


class QmpRefusedError(RefusedError):
    """QEMU answered a command with an error; `qemu_class` is QMP's class of it."""

    def __init__(self, command: str, qemu_class: str, desc: str) -> None:
        super().__init__(f"QEMU refused {command}: {desc}", hint="the VM goes on as it was")
        self.command = command
        self.qemu_class = qemu_class
        self.desc = desc


class QmpClosedError(UnreachableError):
    """QEMU, or what stands between, closed the connection, or does not answer any more."""

    usual_hint = "look whether the VM runs"


class QmpGoneError(QmpClosedError):
    """Nobody listens at the monitor's socket: its QEMU does not run."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event; `time_ns` is of QEMU's wall clock."""

    name: str
    data: Mapping[str, Any]
    time_ns: int


class Monitor(Protocol):
    """A way to QEMU's monitor: its socket, or libvirt's passthrough."""

    version: tuple[int, int, int]
    """QEMU's."""

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What QEMU returns. QmpRefusedError for its refusal, QmpClosedError if it is gone or hung."""
        ...

    async def next_event(self) -> Event | None:
        """The next event, in order; None once after events were lost. QmpClosedError when there will be none."""
        ...


class Qmp:
    """A connection made by `connect`; any number of tasks may call."""

    def __init__(self, stream: trio.abc.Stream, name: str) -> None:
        self.name = name
        self.version: tuple[int, int, int] = (0, 0, 0)
        self._stream = stream
        self._buffer = bytearray()
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Answer] = {}
        self._sending = trio.Lock()
        self._at_once = trio.Semaphore(AT_ONCE)
        self._in_turn = trio.Lock()
        self._out_of_band = False
        self._hangs = False
        """Nothing was answered in its turn since something was not in time."""
        self._events, self._read_events = trio.open_memory_channel[Event](KEPT_EVENTS)
        self._lost = False
        self._closed: str | None = None

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """See Monitor."""
        if self._closed is not None:
            raise QmpClosedError(self._closed)
        try:
            with trio.fail_after(COMMAND_S):
                if self._out_of_band and command in OUT_OF_BAND:
                    return await self._ask_past_all(command, arguments)
                async with self._at_once:
                    return await self._ask("execute", command, arguments)
        except trio.TooSlowError:
            raise QmpClosedError(f"{self.name} did not answer {command} in {COMMAND_S:.0f} s") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise QmpClosedError(self._closed or f"{self.name} closed the connection") from None

    async def _ask_past_all(self, command: str, arguments: Mapping[str, Any] | None) -> Any:
        """In its turn, one at a time, unless QEMU does not come to it; then out of band. Done twice it does no more than once."""
        if not self._hangs:
            with trio.move_on_after(IN_BAND_S):
                async with self._in_turn, self._at_once:
                    return await self._ask("execute", command, arguments)
            self._hangs = True
        return await self._ask("exec-oob", command, arguments)

    async def _ask(self, way: str, command: str, arguments: Mapping[str, Any] | None) -> Any:
        number = next(self._ids)
        answer = self._waiting[number] = _Answer()
        message = {way: command, "id": number, **({"arguments": dict(arguments)} if arguments else {})}
        try:
            async with self._sending:
                await self._stream.send_all(json.dumps(message).encode() + b"\n")
            await answer.came.wait()
        finally:
            del self._waiting[number]
        if answer.value is None:
            raise QmpClosedError(self._closed or f"{self.name} closed the connection")
        self._hangs = self._hangs and way != "execute"
        if "error" in answer.value:
            error = answer.value["error"]
            raise QmpRefusedError(command, str(error.get("class")), str(error.get("desc")))
        return answer.value["return"]

    async def next_event(self) -> Event | None:
        """See Monitor."""
        if self._lost:
            self._lost = False
            return None
        try:
            return await self._read_events.receive()
        except trio.EndOfChannel:
            raise QmpClosedError(self._closed or f"{self.name} closed the connection") from None

    async def _greeted(self) -> None:
        with trio.move_on_after(GREETING_S):
            greeting = await self._receive()
            try:
                version = greeting["QMP"]["version"]["qemu"]
                self._out_of_band = "oob" in greeting["QMP"].get("capabilities", ())
                self.version = (int(version["major"]), int(version["minor"]), int(version["micro"]))
            except (KeyError, TypeError, ValueError):
                raise CorruptError(
                    f"what listens at {self.name} is no QMP monitor",
                    hint="give the path of -qmp unix:PATH,server=on,wait=off",
                ) from None
            return
        raise QmpClosedError(
            f"{self.name} sends no greeting",
            hint="another program holds this monitor: give QEMU one more -qmp",
        )

    async def _negotiate(self) -> None:
        """What QEMU takes first. It does nothing out of band before it is told that we will ask for that."""
        offered, self._out_of_band = self._out_of_band, False
        await self.execute("qmp_capabilities", {"enable": ["oob"]} if offered else None)
        self._out_of_band = offered

    async def _read(self) -> None:
        """Hand out what comes until the connection ends."""
        try:
            while True:
                self._take(await self._receive())
        except CdpError as error:
            self._closed = error.message
        finally:
            self._closed = self._closed or f"the connection to {self.name} was closed"
            self._events.close()
            for answer in self._waiting.values():
                answer.came.set()

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            stamp = message.get("timestamp", {})
            time_ns = int(stamp.get("seconds", 0)) * 10**9 + int(stamp.get("microseconds", 0)) * 1000
            try:
                self._events.send_nowait(Event(str(message["event"]), message.get("data", {}), time_ns))
            except trio.WouldBlock:
                self._lost = True
            return
        answer = self._waiting.get(message.get("id", 0))
        if answer is None:  # it came after its deadline
            self._hangs = False
            return
        answer.value = message
        answer.came.set()

    async def _receive(self) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE:
                raise CorruptError(f"{self.name} sends a message without end")
            try:
                part = await self._stream.receive_some(_CHUNK)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                part = b""
            if not part:
                raise QmpClosedError(f"{self.name} closed the connection")
            self._buffer += part
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise CorruptError(f"{self.name} sends what is no QMP message")
        return message


class _Answer:
    def __init__(self) -> None:
        self.came = trio.Event()
        self.value: dict[str, Any] | None = None


@contextlib.asynccontextmanager
async def connect(path: Path) -> AsyncIterator[Qmp]:
    """A negotiated connection to the monitor's socket, closed at the end of the block.

    QmpClosedError if nobody listens or it is taken, CorruptError if what listens is no monitor.
    """
    try:
        stream = await trio.open_unix_socket(str(path))
    except OSError as error:
        raise QmpGoneError(f"no QEMU listens at {path}: {error.strerror or error}") from None
    async with stream:
        qmp = Qmp(stream, str(path))
        await qmp._greeted()
        failed: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qmp._read)
            try:
                await qmp._negotiate()
                yield qmp
            except Exception as error:  # noqa: BLE001 - raised below, where no group wraps it
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed

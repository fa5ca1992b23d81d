"""QEMU's monitor by way of libvirt, where that owns its socket: raw QMP beside what libvirt does itself.

libvirt's own block copy cannot be given a reconnect delay, so mirrors are made by QMP; libvirt takes no notice of them, and keeps
them over a restart of its own. It marks the domain as tainted ("custom-monitor") for it.

Threads: libvirt's calls block, so each is in a thread, a few at a time for a connection; one thread for the process runs
libvirt's event loop, from which events come. A libvirtd that hangs costs its own VMs their controllers, and nobody else anything.
Needs Debian's python3-libvirt; imported when the first such VM is protected.
"""

import contextlib
import json
import threading
from collections.abc import AsyncIterator, Mapping
from functools import cache, partial
from typing import Any
from xml.etree import ElementTree

import trio

from cdpserver.errors import CorruptError, NotFoundError, UnreachableError
from cdpserver.names import show
from cdpserver.vm.disks import peripheral
from cdpserver.vm.qmp import COMMAND_S, KEPT_EVENTS, Event, QmpClosedError, QmpGoneError, QmpRefusedError

AT_ONCE = 4
"""Calls at once of one connection."""

ALIVE_S = 3
"""libvirtd is asked whether it lives so often; after so many questions without an answer the connection is closed."""
QUESTIONS = 3

_NAMED = frozenset({"query-block", "query-blockstats"})


class LibvirtMonitor:
    """A connection made by `connect` (`vm.qmp.Monitor`)."""

    def __init__(self, connection: Any, domain: Any, name: str) -> None:
        self.name = name
        self.version: tuple[int, int, int] = (0, 0, 0)
        self._connection = connection
        self._domain = domain
        self._calls = trio.CapacityLimiter(AT_ONCE)
        self._send, self._events = trio.open_memory_channel[Event](KEPT_EVENTS)
        self._lost = False
        self._closed = ""
        self._token = trio.lowlevel.current_trio_token()

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """See Monitor. A disk that libvirt gave no drive name is shown by its target's name, such as `vda`."""
        if self._closed:
            raise QmpClosedError(self._closed)
        message = {"execute": command, **({"arguments": dict(arguments)} if arguments else {})}
        qemu = module("libvirt_qemu")
        text = await self._call(qemu.qemuMonitorCommand, self._domain, json.dumps(message), 0)
        try:
            answer = json.loads(text)
        except ValueError:
            raise CorruptError(f"{self.name} answers what is no QMP message") from None
        if "error" in answer:
            error = answer["error"]
            raise QmpRefusedError(command, str(error.get("class")), str(error.get("desc")))
        value = answer["return"]
        if command in _NAMED:
            targets = targets_of(await self._call(self._domain.XMLDesc, 0))
            for block in value:
                block["device"] = block.get("device") or targets.get(peripheral(block) or "", "")
        return value

    async def user(self) -> int | None:
        """Who its QEMU runs as, by the domain's label; None where none is told."""
        return user_of(await self._call(self._domain.XMLDesc, 0))

    async def _call(self, function: Any, *arguments: Any) -> Any:
        error_class = module("libvirt").libvirtError
        try:
            with trio.fail_after(COMMAND_S):
                return await trio.to_thread.run_sync(
                    partial(function, *arguments), abandon_on_cancel=True, limiter=self._calls
                )
        except trio.TooSlowError:
            raise QmpClosedError(f"{self.name} did not answer in {COMMAND_S:.0f} s") from None
        except error_class as error:
            raise _translated(error, self.name) from None

    async def next_event(self) -> Event | None:
        """See Monitor."""
        if self._lost:
            self._lost = False
            return None
        try:
            return await self._events.receive()
        except trio.EndOfChannel:
            raise QmpClosedError(self._closed) from None

    def close(self, reason: str) -> None:
        """No more events, no more answers."""
        self._closed = self._closed or reason
        self._send.close()

    # -- in libvirt's thread ---------------------------------------------------------------------------------

    def heard(self, *said: Any) -> None:
        """An event: (connection, domain, name, seconds, microseconds, details, opaque)."""
        _, _, name, seconds, micros, details, _ = said
        data = json.loads(details) if details else {}
        self._tell(self._take, Event(str(name), data, int(seconds) * 10**9 + int(micros) * 1000))

    def ended(self, *_: Any) -> None:
        """The connection to libvirtd is gone."""
        self._tell(self.close, f"{self.name}: libvirtd closed the connection")

    def lived(self, *said: Any) -> None:
        """Something became of the domain: (connection, domain, what, detail, opaque). What is started next is another QEMU."""
        libvirt = module("libvirt")
        if said[2] in (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_CRASHED):
            self._tell(self.close, f"{self.name} has ended")

    def _tell(self, function: Any, *arguments: Any) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # the service has ended
            self._token.run_sync_soon(partial(function, *arguments))

    def _take(self, event: Event) -> None:
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self._lost = True
        except trio.ClosedResourceError:
            return  # it came after the end


def user_of(xml: str) -> int | None:
    """The user's number in the label of a running domain's description: `+64055:+64055`."""
    for label in ElementTree.fromstring(xml).iterfind("./seclabel[@model='dac']/label"):
        number = (label.text or "").partition(":")[0].removeprefix("+")
        if number.isascii() and number.isdecimal():
            return int(number)
    return None


def targets_of(xml: str) -> dict[str, str]:
    """{id of a guest's device: name of its target} of the disks in a domain's description."""
    found = {}
    for disk in ElementTree.fromstring(xml).iterfind("./devices/disk"):
        alias, target = disk.find("alias"), disk.find("target")
        if alias is not None and target is not None:
            found[alias.get("name", "")] = target.get("dev", "")
    return found


@contextlib.asynccontextmanager
async def connect(uri: str, domain: str) -> AsyncIterator[LibvirtMonitor]:
    """A connection to the monitor of a domain, closed at the end of the block.

    UnreachableError without python3-libvirt, QmpClosedError if libvirtd does not answer, QmpGoneError if the domain does not run,
    NotFoundError if there is none.
    """
    libvirt, qemu = module("libvirt"), module("libvirt_qemu")
    run_event_loop()
    name = f"{domain} of {uri}"
    connection = await _open(libvirt, uri, name)
    try:
        monitor = await _domain(libvirt, connection, domain, name)
        register = partial(
            qemu.qemuMonitorEventRegister, connection, monitor._domain, None, monitor.heard, None, 0
        )
        number = await monitor._call(register)
        lives = partial(
            connection.domainEventRegisterAny,
            monitor._domain,
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
            monitor.lived,
            None,
        )
        life = await monitor._call(lives)
        try:
            connection.registerCloseCallback(monitor.ended, None)
            said = (await monitor.execute("query-version"))["qemu"]
            monitor.version = (int(said["major"]), int(said["minor"]), int(said["micro"]))
            yield monitor
        finally:
            monitor.close(f"the connection to {name} was closed")
            await _quietly(libvirt, partial(qemu.qemuMonitorEventDeregister, connection, number))
            await _quietly(libvirt, partial(connection.domainEventDeregisterAny, life))
            await _quietly(libvirt, connection.unregisterCloseCallback)
    finally:
        await _quietly(libvirt, connection.close)


async def _open(libvirt: Any, uri: str, name: str) -> Any:
    try:
        with trio.fail_after(COMMAND_S):
            connection = await trio.to_thread.run_sync(
                partial(libvirt.open, uri), abandon_on_cancel=True, limiter=opening(uri)
            )
    except trio.TooSlowError:
        raise QmpClosedError(f"libvirtd at {uri} did not answer in {COMMAND_S:.0f} s") from None
    except libvirt.libvirtError as error:
        raise QmpClosedError(f"{name}: {error}", hint="look whether libvirtd runs: virsh list") from None
    with contextlib.suppress(libvirt.libvirtError):  # a connection that is no socket needs none
        connection.setKeepAlive(ALIVE_S, QUESTIONS)
    return connection


async def _domain(libvirt: Any, connection: Any, domain: str, name: str) -> LibvirtMonitor:
    opened = LibvirtMonitor(connection, None, name)
    try:
        opened._domain = await opened._call(connection.lookupByName, domain)
    except QmpGoneError:
        raise NotFoundError(
            f"libvirt has no domain {show(domain)}", hint="those that are: virsh list --all"
        ) from None
    return opened


async def _quietly(libvirt: Any, function: Any) -> None:
    """For what a libvirtd that is gone refuses, and which then is done already."""
    with trio.CancelScope(shield=True), contextlib.suppress(libvirt.libvirtError):
        await trio.to_thread.run_sync(function)


def _translated(error: Any, name: str) -> Exception:
    libvirt = module("libvirt")
    code = error.get_error_code()
    if code in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
        return QmpGoneError(f"{name} does not run", hint="it is waited for")
    return QmpClosedError(f"{name}: {error}", hint="look whether libvirtd runs: virsh list")


@cache
def opening(uri: str) -> trio.CapacityLimiter:
    """A libvirtd that hangs keeps the threads that ask it: so many, and those of no other."""
    return trio.CapacityLimiter(AT_ONCE)


@cache
def module(name: str) -> Any:
    """`libvirt` or `libvirt_qemu`. UnreachableError where it is not installed."""
    try:
        return __import__(name)
    except ImportError:
        raise UnreachableError(
            "this cdpserver cannot ask libvirt: its Python module is missing",
            hint="apt-get install python3-libvirt; or give QEMU a monitor of its own: --qmp",
        ) from None


@cache
def run_event_loop() -> None:
    """Once, before the first connection."""
    libvirt = module("libvirt")
    libvirt.registerErrorHandler(lambda *_: None, None)  # errors are raised; printed they would be said twice
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt", daemon=True).start()

"""A recovered VM as a domain of libvirt: created on its forks, defined when it is home.

While it runs on forks the domain is transient, so that nobody starts it again on what is stale by then. libvirt 9.0 gives an NBD
disk no reconnect delay, whatever its description says: the domain is created paused, each NBD node is replaced by one that has a
delay, and then the guest runs.

Threads: libvirt's calls block, so each group of them is in a thread, a few at a time for a connection.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import trio

from cdpserver.errors import RefusedError
from cdpserver.vm import virt
from cdpserver.vm.launch import parts
from cdpserver.vm.qmp import Monitor, QmpClosedError
from cdpserver.vm.record import LibvirtDomain
from cdpserver.vm.recovery.graph import read_graph

CALL_S = 60.0
"""To start a QEMU on a busy host."""

T = TypeVar("T")


class DomainError(RefusedError):
    """libvirt refused what was asked of it."""

    usual_hint = "mend the domain's description, then try again"


async def is_active(at: LibvirtDomain) -> bool:
    """Does it run?"""
    return await _on(at, lambda libvirt, connection: _is_active(_look_up(libvirt, connection, at.domain)))


async def create(at: LibvirtDomain, description: str, forks: Sequence[tuple[str, str]]) -> None:
    """Start a transient domain; `forks` are (node name, URI) of its NBD disks. DomainError, and then there is none."""
    await _on(
        at, lambda libvirt, connection: connection.createXML(description, libvirt.VIR_DOMAIN_START_PAUSED)
    )
    try:
        async with virt.connect(at.uri, at.domain) as monitor:
            for node, uri in forks:
                await _with_delay(monitor, node, uri)
        await _on(at, lambda _, connection: connection.lookupByName(at.domain).resume())
    except BaseException:
        with trio.CancelScope(shield=True):
            await end(at)
        raise


async def _with_delay(monitor: Monitor, node: str, uri: str) -> None:
    """Put a connection that waits for a server which is away in the place of libvirt's own."""
    server, export = parts.nbd_server(uri)
    graph = await read_graph(monitor)
    for old in graph.used_on_export(export):
        top = graph.top(old)
        if top == old:  # a later libvirt has no format node over it, and sets the delay itself
            continue
        arguments: dict[str, Any] = {"driver": "nbd", "node-name": node, "server": server, "export": export}
        arguments |= {"reconnect-delay": parts.RECONNECT_S}
        await monitor.execute("blockdev-add", arguments)
        over = {"driver": "raw", "node-name": top, "file": node, "discard": "unmap"}
        await monitor.execute("blockdev-reopen", {"options": [over]})
        await monitor.execute("blockdev-del", {"node-name": old})


async def describe(at: LibvirtDomain) -> str | None:
    """What it would be started with again, if it is there."""

    def call(libvirt: Any, connection: Any) -> str | None:
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        found = _look_up(libvirt, connection, at.domain)
        return None if found is None else str(found.XMLDesc(flags))

    return await _on(at, call)


async def define(at: LibvirtDomain, description: str) -> None:
    """From here on it can be started again. DomainError."""
    await _on(at, lambda _, connection: connection.defineXML(description))


async def undefine(at: LibvirtDomain) -> None:
    """It cannot be started any more; one that runs goes on."""

    def call(libvirt: Any, connection: Any) -> None:
        found = _look_up(libvirt, connection, at.domain)
        if found is not None and found.isPersistent():
            found.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)

    await _on(at, call)


async def end(at: LibvirtDomain) -> None:
    """Kill it, if it runs."""

    def call(libvirt: Any, connection: Any) -> None:
        found = _look_up(libvirt, connection, at.domain)
        if _is_active(found):
            found.destroy()

    await _on(at, call)


def _is_active(domain: Any) -> bool:
    return domain is not None and bool(domain.isActive())


def _look_up(libvirt: Any, connection: Any, name: str) -> Any:
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


async def _on(at: LibvirtDomain, function: Callable[[Any, Any], T]) -> T:
    """Call with the module and a new connection. QmpClosedError if libvirtd does not answer, DomainError for its refusal."""
    libvirt = virt.module("libvirt")
    virt.run_event_loop()

    def call() -> T:
        try:
            connection = libvirt.open(at.uri)
        except libvirt.libvirtError as error:
            raise QmpClosedError(
                f"{at.uri}: {error}", hint="look whether libvirtd runs: virsh list"
            ) from None
        try:
            return function(libvirt, connection)
        except libvirt.libvirtError as error:
            raise DomainError(f"libvirt refused {at.domain}: {error}") from None
        finally:
            connection.close()

    try:
        with trio.fail_after(CALL_S):
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=virt.opening(at.uri))
    except trio.TooSlowError:
        raise QmpClosedError(f"libvirtd at {at.uri} did not answer in {CALL_S:.0f} s") from None

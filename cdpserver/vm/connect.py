"""The way to a VM's monitor, whichever it is."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from cdpserver.errors import UsageError
from cdpserver.names import show
from cdpserver.vm import qmp, virt
from cdpserver.vm.qmp import Monitor
from cdpserver.vm.record import Connection, LibvirtDomain, QmpSocket

Connect: TypeAlias = Callable[[Connection], AbstractAsyncContextManager[Monitor]]

HERE = frozenset({"", "localhost", "127.0.0.1", "::1"})
"""Hosts of a libvirt's URI that are this one."""


def connect(connection: Connection) -> AbstractAsyncContextManager[Monitor]:
    """The monitor of a VM."""
    match connection:
        case QmpSocket(path):
            return qmp.connect(Path(path))
        case LibvirtDomain(uri, domain):
            return virt.connect(uri, domain)


def check_connection(connection: Connection) -> None:
    """UsageError for what cannot be one."""
    match connection:
        case QmpSocket(path) if not path.startswith("/"):
            raise UsageError(f"not an absolute path: {show(path)}", hint="give the path from the root")
        case LibvirtDomain(uri, _) if "://" not in uri:
            raise UsageError(f"not the URI of a libvirt: {show(uri)}", hint="give one such as qemu:///system")


def check_here(connection: Connection, vm: str) -> None:
    """UsageError for what cannot be one, or is of another host: QEMU there is told the paths of sockets, which are here."""
    check_connection(connection)
    match connection:
        case LibvirtDomain(uri, _) if _host(uri) not in HERE:
            raise UsageError(
                f"the libvirt of another host: {show(uri)}",
                hint=f"there, run cdp agent NAME and cdp protect {vm} --libvirt qemu:///system --by NAME",
            )


def _host(uri: str) -> str:
    try:
        return urlsplit(uri).hostname or ""
    except ValueError as error:
        raise UsageError(
            f"not the URI of a libvirt: {show(uri)}", hint="give one such as qemu:///system"
        ) from error

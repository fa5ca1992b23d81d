"""The way to a VM's monitor, whichever it is."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from cdpserver.errors import UsageError
from cdpserver.names import show
from cdpserver.vm import qmp, virt
from cdpserver.vm.qmp import Monitor
from cdpserver.vm.record import Connection, LibvirtDomain, QmpSocket


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

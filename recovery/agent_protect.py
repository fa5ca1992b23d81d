"""`cdp protect --by`: the disks of a VM are found where it runs, for the agent there and the service elsewhere."""

from argparse import Namespace
from typing import Any

import trio

from cdpserver.state import StateDir, default_state_dir
from cdpserver.vm import arrival, disks
from cdpserver.vm.connect import check_connection, connect
from cdpserver.vm.record import Connection, LibvirtDomain, QmpSocket
from recovery.agent_client import AgentClient


def protect_here(options: Namespace, monitor: dict[str, str]) -> dict[str, Any]:
    """Find the disks of a VM of this host, and let the agent `options.by` protect it."""
    connection: Connection = (
        QmpSocket(monitor["qmp"])
        if "qmp" in monitor
        else LibvirtDomain(monitor["libvirt"], monitor.get("domain", options.vm))
    )
    check_connection(connection)
    found, waits = trio.run(_find, connection, options.disk)
    body = {
        **monitor,
        "disks": [{"name": disk.name, "device": disk.device, "size": disk.size} for disk in found],
        "wait": options.wait,
        "drive_mirror": options.drive_mirror,
        "waits": waits,
    }
    client = AgentClient(StateDir(default_state_dir(options.state_dir)))
    return client.protect_agent_vm(options.by, options.vm, body)


async def _find(connection: Connection, wanted: list[str]) -> tuple[list[disks.FoundDisk], bool]:
    """Its disks, and whether it is still to move into that QEMU."""
    async with connect(connection) as monitor:
        found = disks.choose(
            await monitor.execute("query-block"), await monitor.execute("query-named-block-nodes"), wanted
        )
        return found, await arrival.run_state(monitor) in arrival.AWAY

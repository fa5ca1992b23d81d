"""Going back to an older image of a stopped VM's disk: the device gets a new overlay on it, and the VM is reset.

The guest's memory belongs to the disk that it had, so a VM that runs cannot be given another one. What the VM wrote
since then stays as a file beside the new chain: the tree shows it as a branch.
"""

import contextlib
import secrets
from pathlib import Path
from typing import Any

import trio

from cdpserver import qemu
from cdpserver.errors import BrokenError, NotFoundError, RefusedError
from cdpserver.vm.chain import files, plan
from cdpserver.vm.chain.graph import LiveChain
from cdpserver.vm.chain.snapshots import look, make_overlay
from cdpserver.vm.qmp import Monitor, QmpRefusedError

STOPPED = ("paused", "prelaunch", "shutdown", "guest-panicked")


async def revert(monitor: Monitor, vm: str, disk: str, node: str, *, name: str) -> dict[str, Any]:
    """Put the VM's device onto a new overlay over an image of its chain or beside it. NotFoundError, RefusedError, BrokenError.

    The VM stays stopped. If QEMU refuses, the disk is as it was.
    """
    chain = await look(monitor, disk)
    plan.check_overlay(chain)
    if chain.qdev is None:
        raise RefusedError(
            f"{disk} is an export: what lies under it cannot be exchanged",
            hint="end who serves it, and start it with an overlay of qemu-img create",
        )
    status = (await monitor.execute("query-status"))["status"]
    if status not in STOPPED:
        raise RefusedError(
            f"{vm} is {status}, and its memory belongs to the disk that it has",
            hint="stop the VM first (QMP: stop); it is reset, so save in the guest what is needed",
        )
    below, format, size = await trio.to_thread.run_sync(_chosen, chain, node)
    path = await trio.to_thread.run_sync(
        lambda: make_overlay(chain, name, None, below=below, format=format, size=size)
    )
    new = f"cdp-{secrets.token_hex(6)}"
    try:
        file = {"driver": "file", "filename": str(path), "discard": "unmap"}
        added = {"driver": "qcow2", "node-name": new, "file": file, "discard": "unmap"}
        await monitor.execute("blockdev-add", added)
        try:
            await monitor.execute("qom-set", {"path": chain.qdev, "property": "drive", "value": new})
        except QmpRefusedError:
            await monitor.execute("blockdev-del", {"node-name": new})
            raise
    except QmpRefusedError:
        path.unlink(missing_ok=True)
        raise
    await monitor.execute("system_reset")
    for layer in chain.layers:
        with contextlib.suppress(QmpRefusedError):  # QEMU has closed it by itself, or something else uses it
            await monitor.execute("blockdev-del", {"node-name": layer.node})
    after = await look(monitor, chain.handle)
    if after.layers[1:2] == () or after.layers[1].path != below:
        raise BrokenError(f"{disk} does not stand on {below} now", hint="look: cdp snapshot live tree")
    return {
        "vm": vm,
        "disk": disk,
        "snapshot": below.name,
        "active": path.name,
        "path": str(path),
        "left": chain.active.name,
        "snapshots": after.snapshots,
    }


def _chosen(chain: LiveChain, node: str) -> tuple[Path, str, int]:
    """The file to go back to, its format and size."""
    try:
        layer = chain.layers[chain.position(node)]
    except NotFoundError:
        beside = [path for paths in files.standing(chain).values() for path in paths]
        found = [path for path in beside if node in (path.name, str(path))]
        if len(found) != 1:
            raise
        return found[0], "qcow2", qemu.info(found[0], "qcow2").virtual_size
    files.check_there(chain)
    if layer is chain.active:
        raise RefusedError(f"the VM writes to {node}: it is no snapshot", hint="name an older image")
    if layer.path is None:
        raise RefusedError(f"{node} is no file of this host", hint="name an image that is")
    return layer.path, layer.driver, layer.size

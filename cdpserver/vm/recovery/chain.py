"""Bringing one disk of a running VM home as a chain: an image of the point, on a base image that is at home already.

    guest ──► DISK.qcow2 ──backing──► nbd: the point               until the image of the point is whole
    guest ──► DISK.qcow2 ──backing──► DISK.point.qcow2 ──► base    from then on

The image is written beside the VM, by stock qemu-img, which compares what the point holds with the base and keeps what differs: a
base that is not what it should be costs room, never truth. Then QEMU is told to read from it, and the file's header names it.
"""

from cdpserver.vm.qmp import Monitor
from cdpserver.vm.recovery.graph import Graph
from cdpserver.vm.recovery.jobs import Progress
from cdpserver.vm.recovery.record import RecoveredDisk
from cdpserver.vm.recovery.stream import StreamMove


class ChainMove(StreamMove):
    """One disk in one QEMU. Its image of the point is made before `begin_home`."""

    async def begin_home(self) -> None:
        """Nothing: QEMU copies nothing."""

    async def is_under_way(self) -> bool:
        """No job of QEMU's."""
        return False

    async def progress(self) -> Progress:
        """All of it is there."""
        return Progress(self.disk.size, self.disk.size, ready=True)

    async def pivot(self) -> None:
        """Let the VM's disk stand on the image of the point."""
        graph = await self._graph()
        home = await self.home_node()
        if graph.used_on_export(self._point):
            await stand_on_image(self._monitor, graph, home, self._job, self.disk)
        await name_image(self._monitor, home, self.disk)


async def stand_on_image(monitor: Monitor, graph: Graph, home: str, job: str, disk: RecoveredDisk) -> None:
    """Let the node `home` of the file at home stand on the image of the point; also done again."""
    node = f"{job}-point"
    if node not in graph.names:
        image = {"driver": "file", "filename": disk.point_image}
        await monitor.execute(
            "blockdev-add", {"driver": "qcow2", "node-name": node, "read-only": True, "file": image}
        )
    options = {
        "driver": "qcow2",
        "node-name": home,
        "file": graph.child(home, disk.target),
        "backing": node,
        "discard": "unmap",
    }
    await monitor.execute("blockdev-reopen", {"options": [options]})


async def name_image(monitor: Monitor, home: str, disk: RecoveredDisk) -> None:
    """The header of the file at home names the image, which is beside it."""
    named = {"device": home, "image-node-name": home, "backing-file": disk.point_image.rpartition("/")[2]}
    await monitor.execute("change-backing-file", named)

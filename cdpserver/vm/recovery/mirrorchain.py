"""Bringing one disk of a running VM home as a chain, while its writes are journalled in its fork until it is there.

    guest ──► raw ──► nbd: the fork                        mirror, of what is written from now on
                                └──────────────────────────► DISK.qcow2 ──backing──► nbd: the fork, read-only
    then                                                     DISK.qcow2 ──backing──► DISK.point.qcow2 ──► base ; pivot

The mirror copies nothing of what is there already (`sync=none`). What was there when it had begun, at any instant since, is
written beside it by stock qemu-img, which keeps what the base has not. Until then a cluster that is written in part is completed
from the fork, whose other part is as new.
"""

from cdpserver.vm.recovery import jobs
from cdpserver.vm.recovery.chain import name_image, stand_on_image
from cdpserver.vm.recovery.graph import Graph
from cdpserver.vm.recovery.jobs import Progress
from cdpserver.vm.recovery.move import Move


class MirrorChainMove(Move):
    """One disk in one QEMU. The file at home is made before `begin_home`, the image after it."""

    sync = "none"

    async def _make_home(self) -> None:
        file = {"driver": "file", "node-name": self._file, "filename": self.disk.target, "discard": "unmap"}
        await self._monitor.execute("blockdev-add", file)
        over = {"driver": "qcow2", "file": self._file, "node-name": self._home, "discard": "unmap"}
        await self._monitor.execute("blockdev-add", over)

    def _on_fork(self, graph: Graph) -> list[str]:
        """Without the file at home, which stands on the fork as well for a while."""
        home = self._at_home(graph)
        return [node for node in super()._on_fork(graph) if home not in list(graph.way_up(node))]

    async def is_home(self) -> bool:
        """The VM's disk stands on what is at home, and that on the fork no more."""
        if not await super().is_home():
            return False
        return not (await self._graph()).used_on_export(self.disk.fork)

    async def progress(self) -> Progress:
        """QEMU is ready at once; the image is counted by whoever makes it."""
        found = await super().progress()
        return Progress(self.disk.size, self.disk.size, found.ready)

    async def hold(self) -> None:
        """The file at home stands on the image before the VM's disk stands on that.

        Not while the guest writes: a mirror's target takes writes while it is opened again (seen in QEMU 7.2), and then the
        clusters that they allocate are lost.
        """
        await super().hold()
        if await jobs.is_pending(self._monitor, self._job):
            await stand_on_image(self._monitor, await self._graph(), self._home, self._job, self.disk)

    async def pivot(self) -> None:
        """See Move. QEMU changes no header of a mirror's target: until here it names the fork, which is there."""
        await super().pivot()
        home, graph = await self.home_node(), await self._graph()
        if graph.used_on_export(self.disk.fork):  # as a QEMU that was started anew has opened it
            await stand_on_image(self._monitor, graph, home, self._job, self.disk)
        await name_image(self._monitor, home, self.disk)

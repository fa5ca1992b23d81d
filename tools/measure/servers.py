"""The servers that are compared, each with a disk of its own that nothing was written to yet."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from cdpserver.clock import boot_id
from cdpserver.errors import RefusedError
from cdpserver.index.store import CLOSED_NAME, find_index, open_index, release
from cdpserver.journal.log import interval_path
from cdpserver.state import StateDir
from tools.kit.processes import FailedError, Process, listens, run, start, stop, until
from tools.kit.server import Server
from tools.measure import fio
from tools.measure.endless import Worker
from tools.measure.fio import Job

INDEX_S = 300.0
"""How long the indexer may take for what a bench has written."""

_numbers = count(1)


@dataclass(frozen=True, slots=True)
class Fresh:
    """A disk to write to: where, whether anything has arrived, and what must be said then."""

    uri: str
    wrote: Callable[[], bool]
    declare: Callable[[], object] | None
    """None of servers that know no sessions."""
    verify: Callable[[int], None]
    """Is what was measured what was meant, after this many bytes? FailedError."""


class Ours:
    """One `cdpserver` for the whole bench; a new disk for every round."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.client = server.client
        self._worker = Worker(StateDir.open(server.path), 0)

    @contextlib.contextmanager
    def disk(self, size: int, *, declared: bool = True) -> Iterator[str]:
        """A disk whose history is open, or (not `declared`) before its first copy; its name. Removed at the end."""
        name = f"bench{next(_numbers)}"
        self.client.add_disk(name, size=size, vm=None, base=None)
        if declared:
            self.declare(name)
        try:
            yield name
        finally:
            until(lambda: self.client.disk(name)["clients"] == 0, "end of the clients")
            until(lambda: self._removed(name), "end of who reads the disk")

    def _removed(self, name: str) -> bool:
        """Remove the disk, unless a base point that fell due is still being made of it."""
        try:
            self.client.remove_disk(name)
        except RefusedError:
            return False
        return True

    def uri(self, name: str) -> str:
        """Where the disk is written."""
        return str(self.client.disk(name)["uri"])

    def session(self, name: str) -> int:
        """The number of the disk's session; 0 before the first write. Asked of the worker, since fio does not wait."""
        status = self._worker.ask("status", disks=[name])
        return int(status[name]["session"]) if name in status else 0

    def declare(self, name: str) -> dict[str, Any]:
        """The current session is in sync and write-blocking: from here on nothing is compared. The disk then."""
        return self.client.synced(name, session=None, write_blocking=True)

    def fill(self, name: str, job: Job, directory: Path) -> None:
        """Write to a disk, protected from the first write on; indexed on return."""
        before = self.session(name)
        fio.fill(
            self.uri(name),
            job,
            directory,
            wrote=lambda: self.session(name) > before,
            declare=lambda: self.declare(name),
        )
        self.wait_indexed(name)

    @contextlib.contextmanager
    def fresh(self, size: int) -> Iterator[Fresh]:
        """A disk of ours for a write bench."""
        with self.disk(size) as name:
            declared: dict[str, Any] = {}
            yield Fresh(
                self.uri(name),
                lambda: self.session(name) > 0,
                lambda: declared.update(self.declare(name)),
                lambda written: self._verify(name, declared, written),
            )

    def _verify(self, name: str, declared: dict[str, Any], written: int) -> None:
        """One session was declared, and most of what was written was journalled in it; its end began the next."""
        disk = self.client.disk(name)
        grown = disk["journal_bytes"] - declared["journal_bytes"]
        if declared["grade"] != "crash" or disk["session"] > declared["session"] + 1 or grown < written // 4:
            raise FailedError(f"the disk was not protected while it was measured: {declared}, then {disk}")

    def directory(self, name: str) -> Path:
        """The files of the disk's timeline."""
        return self.server.path / "timelines" / str(self.client.disk(name)["id"])

    def wait_indexed(self, name: str) -> None:
        """Return when the indexer has caught up with what is in the journal now."""
        last = int(self.client.disk(name)["last_seq"])
        directory = self.directory(name)
        until(lambda: _indexed(directory) >= last, "index of all records", seconds=INDEX_S, every_s=0.05)

    def cut(self, name: str) -> Path:
        """Cut a base point, and wait until the index of the interval before it is in its final form; the QCOW2 file."""
        intervals = self.directory(name) / "intervals"
        newest = max(path.name for path in intervals.iterdir())
        path = Path(self.client.cut(name)["path"])
        until((intervals / newest / CLOSED_NAME).exists, "closed index", seconds=INDEX_S)
        self.wait_indexed(name)
        return path

    def index_bytes(self, name: str) -> int:
        """What the disk's indexes take up on the store."""
        files = (self.directory(name) / "intervals").glob("*/*.mdb")
        return sum(os.stat(file).st_blocks * 512 for file in files)

    def journal_bytes(self, name: str) -> int:
        """Payload and headers of the disk's journal."""
        return int(self.client.disk(name)["journal_bytes"])


def _indexed(timeline: Path) -> int:
    newest = max(int(path.name) for path in (timeline / "intervals").iterdir())
    path = find_index(interval_path(timeline, newest), boot_id())
    file = open_index(path) if path is not None else None
    if file is None:
        return 0
    indexed = file.indexed()
    release(file)
    return indexed


def _peer(uri: str) -> Fresh:
    return Fresh(uri, lambda: True, None, lambda _: None)


@contextlib.contextmanager
def qemu_nbd(image: Path, socket: Path, *options: str) -> Iterator[str]:
    """A QCOW2 image behind qemu-nbd; the URI."""
    socket.unlink(missing_ok=True)
    log = socket.with_suffix(".log")
    process = start(["qemu-nbd", "-f", "qcow2", "-t", "-e", "4", "-k", socket, *options, image], log)
    try:
        listens(process, socket, log)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        stop(process)
        socket.unlink(missing_ok=True)


@contextlib.contextmanager
def qemu_nbds(images: Sequence[Path]) -> Iterator[list[tuple[str, int]]]:
    """A qemu-nbd for each QCOW2 image; the URI and the pid of each. They start together."""
    sockets = [image.with_suffix(".sock") for image in images]
    processes: list[Process] = []
    try:
        for image, socket in zip(images, sockets, strict=True):
            command: list[str | Path] = ["qemu-nbd", "-f", "qcow2", "-t", "-e", "4", "-k", socket, image]
            processes.append(start(command, image.with_suffix(".log")))
        for process, socket in zip(processes, sockets, strict=True):
            listens(process, socket, socket.with_suffix(".log"))
        uris = [f"nbd+unix:///?socket={socket}" for socket in sockets]
        yield [(uri, process.pid) for uri, process in zip(uris, processes, strict=True)]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            stop(process)
        for socket in sockets:
            socket.unlink(missing_ok=True)


@contextlib.contextmanager
def overlay(backing: Path, directory: Path, *options: str) -> Iterator[Fresh]:
    """An empty QCOW2 overlay over a full backing file, behind qemu-nbd: what a snapshot is. `options` as of `create -o`."""
    image = directory / "overlay.qcow2"
    chosen = [word for option in options for word in ("-o", option)]
    run("qemu-img", "create", "-q", "-f", "qcow2", *chosen, "-F", "raw", "-b", backing, image)
    try:
        with qemu_nbd(image, directory / "qemu-nbd.sock") as uri:
            yield _peer(uri)
    finally:
        image.unlink()


@contextlib.contextmanager
def nbdkit_file(size: int, directory: Path) -> Iterator[Fresh]:
    """A sparse raw file behind `nbdkit file`: what the machine gives without a journal."""
    image, socket, log = directory / "file.raw", directory / "nbdkit.sock", directory / "nbdkit.log"
    with open(image, "wb") as file:
        file.truncate(size)
    socket.unlink(missing_ok=True)
    process = start(["nbdkit", "-f", "-t", "1", "-U", socket, "file", image], log)
    try:
        listens(process, socket, log)
        yield _peer(f"nbd+unix:///?socket={socket}")
    finally:
        stop(process)
        socket.unlink(missing_ok=True)
        image.unlink()

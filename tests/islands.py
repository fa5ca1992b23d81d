"""Published base points for timelines of `core.World`, without a service: QCOW2 files by stock tools, notes by ours."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd

from cdpserver import basepoint, qemu
from cdpserver.cuts import find_cut
from cdpserver.nodes import base_point_path, newest_at, write_note
from cdpserver.view.chain import write_map
from cdpserver.view.history import History
from tests.core import Line, remove
from tests.model import BLOCK


@contextmanager
def writable(image: Path) -> Iterator[nbd.NBD]:
    """An image, served for writing by qemu-nbd."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as room:
        socket = f"{room}/s"
        server = subprocess.Popen(
            ["qemu-nbd", "-f", "qcow2", "-t", "-k", socket, "--discard=unmap", str(image)]
        )
        try:
            while True:
                client = nbd.NBD()
                try:
                    client.connect_unix(socket)
                    break
                except nbd.Error:
                    assert server.poll() is None
                    time.sleep(0.005)
            yield client
            client.flush()
            client.shutdown()
        finally:
            server.terminate()
            server.wait()


def publish(line: Line, number: int) -> Path:
    """Write base point `number` of a line as the service would: what differs from the node below, and a note."""
    history = History(line.world.state.path, line.timeline, line.world.boot)
    try:
        cut = find_cut(history.journal, number)
        assert cut is not None
        under = basepoint.backing(history, cut)
        size = line.model.size_at(cut.seq)
        path = base_point_path(line.directory, number)
        backing = os.path.relpath(under.path, line.directory)
        subprocess.run(
            [
                *("qemu-img", "create", "-q", "-f", "qcow2", "-o", qemu.OPTIONS, "-F", under.format),
                *("-b", backing, str(path), str(size)),
            ],
            check=True,
        )
        below, seq, at = line.model, under.seq, history
        while at.timeline.id != under.history.timeline.id:
            assert at.parent is not None
            assert below.parent is not None
            at, below = at.parent, below.parent
        with writable(path) as image:
            for offset in range(0, size, BLOCK):
                length = min(BLOCK, size - offset)
                new = line.model.read(cut.seq, offset, length)
                if new != below.read(seq, offset, length):
                    if new.strip(b"\0"):
                        image.pwrite(new, offset)
                    else:
                        image.zero(length, offset)
        path.chmod(0o444)
        write_note(line.directory, basepoint.note(history, cut))
        write_map(path)
        return path
    finally:
        history.close()  # with its parents, which the file may stand on


def drop(line: Line, interval: int) -> None:
    """Take an interval away, as retention does."""
    remove(line.directory / "intervals" / f"{interval:06d}")


def newest(line: Line, seq: int) -> int:
    """Number of the newest node at or before a seq; -1 without one."""
    node = newest_at(line.directory, seq)
    return node.number if node is not None else -1

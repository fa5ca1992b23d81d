"""A state directory that has some of everything, made by a real service; and every instant of it as digests.

web/root   a mirrored disk: first copy, two base points, a bookmark, an unfinished interval
image      a disk on a base image
trial      a fork of web/root at its bookmark, with a base point
copying    a disk whose first copy is under way
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbd

from cdpserver import timeline
from cdpserver.clock import boot_id
from cdpserver.errors import CdpError
from cdpserver.journal.log import Journal
from cdpserver.state import StateDir
from cdpserver.view.history import History
from cdpserver.view.view import View
from tests.core import forget_indexes
from tools.kit.processes import until
from tools.kit.server import Server

SIZE = 1 << 20
BLOCK = 4096
IDS = {"web/root": "t1", "image": "t2", "trial": "t3", "copying": "t4"}
"""Names and timelines, in the order in which they are made."""


class Writer:
    """A client of one disk; no two writes of it are alike."""

    def __init__(self, uri: str, salt: int) -> None:
        self._client = nbd.NBD()
        self._client.connect_uri(uri)
        self._salt = salt
        self._count = 0

    def blocks(self, *numbers: int) -> None:
        """Write blocks; a record each."""
        for number in numbers:
            self._count += 1
            text = f"{self._salt}/{self._count}".encode()
            self._client.pwrite(hashlib.blake2b(text).digest() * (BLOCK // 64), number * BLOCK)

    def zero(self, number: int, count: int) -> None:
        """Zero a run of blocks."""
        self._client.zero(count * BLOCK, number * BLOCK)

    def close(self) -> None:
        """Disconnect."""
        self._client.shutdown()


def build(path: Path) -> StateDir:
    """Make it at `path`, which must be short; nothing runs when this returns."""
    image = path.with_name("image.raw")
    image.write_bytes(b"".join(bytes([n]) * BLOCK for n in range(1, 9)))
    with Server(path) as server:
        _build_all(server, image)
        until(lambda: _is_indexed(path), "index of everything")
        until((path / "timelines" / IDS["web/root"] / "rpo").exists, "a sample of what could have been lost")
    image.unlink()
    return StateDir.open(path)


def _build_all(server: Server, image: Path) -> None:
    client = server.client
    size = SIZE
    root = Writer(client.add_disk("root", size=size, vm="web", base=None)["uri"], 1)
    root.blocks(*range(16))
    client.synced("web/root", session=None, write_blocking=True)
    root.blocks(0, 1, 20)
    root.zero(4, 4)
    client.mark("web/root", "before")
    root.blocks(2, 3, 4)
    client.cut("web/root")
    root.blocks(0, 30)
    other = Writer(client.add_disk("image", size=size, vm=None, base=str(image))["uri"], 2)
    other.blocks(3, 11, 12)
    client.synced("image", session=None, write_blocking=True)
    other.blocks(3)
    guest = Writer(client.add_fork("web/root@before", "trial")["uri"], 3)
    guest.blocks(0, 40)
    client.cut("trial")
    guest.blocks(41)
    copy = Writer(client.add_disk("copying", size=size, vm=None, base=None)["uri"], 4)
    copy.blocks(1, 2, 3)
    for writer in (root, other, guest, copy):
        writer.close()


def _is_indexed(path: Path) -> bool:
    """Has the indexer done everything? Then the files change no more."""
    from cdpserver.index.store import find_index, open_index, release
    from cdpserver.journal.log import interval_path

    for id in IDS.values():
        journal = Journal(path / "timelines" / id)
        for interval in journal.intervals:
            index = find_index(interval_path(journal.timeline, interval), boot_id())
            file = open_index(index) if index is not None else None
            if file is None:
                return False
            indexed = file.indexed()
            release(file)
            if indexed < journal.reader(interval, journal.segments(interval)[-1]).last_seq:
                return False
        journal.close()
    forget_indexes(path)
    return True


@dataclass(frozen=True, slots=True)
class Instants:
    """Digests of instants by seq as text; of those that cannot be read, the error."""

    digests: dict[str, str]
    errors: dict[str, str]


def read_all(state: StateDir, wanted: dict[str, list[int]] | None = None) -> dict[str, Instants]:
    """Every instant (or those wanted) of every timeline: what reads, and what says no. Nothing but a CdpError may come out
    of it.
    """
    found = {}
    for id in IDS.values():
        digests: dict[str, str] = {}
        errors: dict[str, str] = {}
        try:
            history = History(state.path, timeline.load(state.timeline(id)))
        except CdpError as error:
            found[id] = Instants({}, {"all": str(error)})
            continue
        try:
            for seq in _seqs(history) if wanted is None else wanted[id]:
                _read_one(history, seq, digests, errors)
        finally:
            history.close()
        found[id] = Instants(digests, errors)
    forget_indexes(state.path)
    return found


def _seqs(history: History) -> list[int]:
    """Every seq of the journal, from the index-free reading of its header logs."""
    if history.journal.empty:
        return []
    runs = history.journal.runs(0, history.journal.last().seq)
    return [int(seq) for run in runs for seq in run.records["seq"]]


def _read_one(history: History, seq: int, digests: dict[str, str], errors: dict[str, str]) -> None:
    try:
        if history.journal.empty or history.journal.at_seq(seq).seq != seq:
            errors[str(seq)] = "there is no such instant"
            return
        view = View(history, seq)
        try:
            data = view.read(0, view.size)
        finally:
            view.close()
        digests[str(seq)] = hashlib.blake2b(data, digest_size=16).hexdigest()
    except CdpError as error:
        errors[str(seq)] = str(error)


def digests_of(found: dict[str, Instants]) -> dict[str, Any]:
    """As JSON keeps it; all of it must be readable."""
    assert not any(instants.errors for instants in found.values()), found
    return {id: instants.digests for id, instants in found.items()}


def main() -> None:
    """`python -m tests.whole PATH`: make one, and say its digests as JSON. So are tests/fixtures made."""
    state = build(Path(sys.argv[1]))
    print(json.dumps(digests_of(read_all(state)), indent=1))


if __name__ == "__main__":
    main()

"""COW snapshots in the tree of a running disk: those that QEMU keeps, whether they can be read, and files that were left."""

from pathlib import Path
from typing import Any

import trio

from cdpserver import durable
from cdpserver.copying.nbdend import Connection
from cdpserver.errors import CdpError
from cdpserver.vm.chain import cownodes
from cdpserver.vm.chain.cownodes import uri
from cdpserver.vm.chain.graph import LiveChain, chain_of
from cdpserver.vm.chain.snapshots import ask
from cdpserver.vm.qmp import Monitor


async def add_to_tree(monitor: Monitor, disk: str, value: dict[str, Any], *, socket: Path) -> dict[str, Any]:
    """The tree of a disk with its COW snapshots.

    Kinds: `cow`; `broken`, of which every read is refused; `left`, a file of a QEMU that has ended.
    """
    answers = await ask(monitor)
    chain = chain_of(answers, disk)
    there = cownodes.cows(chain, answers.nodes)
    items = []
    for cow in there:
        broken = await trio.to_thread.run_sync(is_broken, uri(cow, socket))
        items.append(_item("broken" if broken else "cow", cow.name, cow.time_ns, cow.path))
    known = {cow.path for cow in there}
    items += [
        _item("left", cownodes.name_of(path), path.stat().st_mtime_ns, path)
        for path in left_files(chain)
        if path not in known
    ]
    value["children"][0]["children"] += items
    value["size_bytes"] += sum(item["size_bytes"] for item in items)
    return value


def _item(kind: str, name: str, time_ns: int, path: Path | None) -> dict[str, Any]:
    size = 0 if path is None else durable.used_bytes(path)
    return {
        "kind": kind,
        "name": name,
        "time_ns": time_ns,
        "size_bytes": size,
        "locked": False,
        "children": [],
    }


def left_files(chain: LiveChain) -> list[Path]:
    """Files of COW snapshots beside the disk, also of those that QEMU keeps."""
    path = chain.active.path
    if path is None or chain.active.protocol != "file":
        return []
    return sorted(path.parent.glob(cownodes.file_of(_glob(path.stem), "*")))


def _glob(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def is_broken(at: str) -> bool:
    """Are reads refused? One that cannot be asked, such as of a server elsewhere, is not called so."""
    try:
        connection = Connection(at)
    except CdpError:
        return False
    try:
        connection.read_into(bytearray(512), 0, 512)
    except CdpError:
        return True
    finally:
        connection.close()
    return False

"""COW snapshots of a running disk as nodes of QEMU's graph: which there are, where one more is put, what it is made of; pure.

    device, export                    device, export
      |                                 |
    raw      "the door"               raw
      |file                             |file          what is overwritten
    disk                              cdp-cbw-TOKEN ----target----> cdp-tmp-TOKEN (QCOW2)
                                        |file    \\
                                      cdp-low-TOKEN  cdp-snap-TOKEN --> NBD export
                                        |file
                                      disk

Every write then first copies what it is about to overwrite. A raw node's file can be exchanged under a running device
(blockdev-reopen), so the door is the disk's own raw node. A device that lies directly on its protocol node is given the filter
itself (`qom-set drive=`); later ones go in by the `low` of that. QEMU 7.2 has nothing else for it: blockdev-replace came later,
and a copy-before-write node cannot be reopened. The token is the snapshot's time and a random part, within 31 characters.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpserver.errors import RefusedError
from cdpserver.vm.chain.graph import LOCAL, LiveChain
from cdpserver.vm.chain.plan import MANY

MAX_COW = 32
"""COW snapshots of one disk: each of them copies what a write overwrites, so the write waits for every one."""

TIMEOUT_S = 15
"""Longer than this no guest waits for a copy: the snapshot breaks instead. A guest's own patience is 30 s."""

_MARK, _SUFFIX = ".cow-", ".qcow2"

_CBW = re.compile(r"cdp-cbw-([0-9a-f]{16})([0-9a-f]{4})")

_PROTOCOLS = LOCAL | {"rbd", "nbd", "iscsi", "nvme", "gluster", "nfs", "ssh", "null-co"}


@dataclass(frozen=True, slots=True)
class Cow:
    """One COW snapshot: its token, and the file that takes what is overwritten (None if QEMU has closed it)."""

    token: str
    path: Path | None

    def node(self, part: str) -> str:
        """Its node of QEMU: cbw, low, tmp or snap."""
        return f"cdp-{part}-{self.token}"

    @property
    def time_ns(self) -> int:
        """When it was taken, by the host's wall clock."""
        return int(self.token[:16], 16)

    @property
    def name(self) -> str:
        """As the operator called it: the last part of its file's name."""
        return self.token if self.path is None else name_of(self.path)

    @property
    def export(self) -> str:
        """Its NBD export, by name and by QEMU's id."""
        return f"cdp-cow-{self.token}"


def name_of(path: Path) -> str:
    """The name of a COW snapshot by its file's."""
    return path.name.removesuffix(_SUFFIX).rpartition(_MARK)[2]


def file_of(stem: str, name: str) -> str:
    """The name of a COW snapshot's file."""
    return f"{stem}{_MARK}{name}{_SUFFIX}"


def uri(cow: Cow, socket: Path) -> str:
    """Where a snapshot is read."""
    return f"nbd+unix:///{cow.export}?socket={socket}"


def new_token(time_ns: int) -> str:
    """A token that no other snapshot has."""
    return f"{time_ns:016x}{secrets.token_hex(2)}"


def cows(chain: LiveChain, nodes: Mapping[str, Mapping[str, Any]]) -> list[Cow]:
    """The COW snapshots of a disk, the newest first."""
    found = []
    for node, _ in chain.line:
        if match := _CBW.fullmatch(node):
            token = match[1] + match[2]
            file = str(nodes.get(f"cdp-tmp-{token}", {}).get("file", ""))
            found.append(Cow(token, Path(file) if file.startswith("/") else None))
    return sorted(found, key=lambda cow: cow.token, reverse=True)


def half_made(path: Path, nodes: Mapping[str, Mapping[str, Any]]) -> Cow | None:
    """What a killed command has left in QEMU around a file, without a filter in the disk's line."""
    for node, said in nodes.items():
        if node.startswith("cdp-tmp-") and said.get("file") == str(path):
            return Cow(node.removeprefix("cdp-tmp-"), path)
    return None


@dataclass(frozen=True, slots=True)
class Door:
    """Where a filter is put: what lies under it (`below`), and who is made to stand on it: a raw node, or else the device."""

    below: str
    raw: str | None
    device: str | None


def door(chain: LiveChain) -> Door:
    """Where one more filter has its place. RefusedError with the reason."""
    if len(chain.layers) > 1 or chain.active.driver == "qcow2":
        raise RefusedError(
            f"{chain.disk} is QCOW2, which has snapshots of its own",
            hint="leave --cow out: cdp snapshot live create",
        )
    driver, node = chain.active.driver, chain.active.node
    if driver not in _PROTOCOLS and driver != "raw":
        raise RefusedError(
            f"{chain.disk} is {driver}, under which no filter can be put while it runs",
            hint="COW snapshots are of raw disks: files, LVM, Ceph",
        )
    # A node that QEMU has named itself (`-drive`) cannot be reopened.
    if driver == "raw" and not node.startswith("#"):
        return Door(_under(chain, node), node, None)
    lies = f"{chain.disk} has no raw node with a name of its own (its {driver} node is {node})"
    between = "start QEMU with one: -blockdev driver=raw,node-name=N,file=..."
    if chain.qdev is None:
        raise RefusedError(f"{lies}, and QEMU cannot exchange what lies under an export", hint=between)
    if chain.filters or chain.jobs_on({chain.root}):
        raise RefusedError(
            f"{lies}, and a job or filter works on it",
            hint=f"end that first (a mirror: start it again after), or {between}",
        )
    return Door(chain.root, None, chain.qdev)


def door_of(chain: LiveChain, cow: Cow) -> Door:
    """Who stands on a filter that is there, and what lies under it."""
    below = _under(chain, cow.node("low"))
    above = [node for node, _ in chain.line]
    at = above.index(cow.node("cbw"))
    return Door(below, above[at - 1], None) if at else Door(below, None, chain.qdev)


def check_room(chain: LiveChain, all_cows: Sequence[Cow]) -> str | None:
    """Whether one more has its place; a warning if it is one of many. RefusedError."""
    if len(all_cows) >= MAX_COW:
        raise RefusedError(
            f"{chain.disk} has {len(all_cows)} COW snapshots, of {MAX_COW} at most",
            hint="make room: cdp snapshot live delete",
        )
    if len(all_cows) + 1 > MANY:
        return f"{chain.disk} now has {len(all_cows) + 1} COW snapshots: each copies what a write overwrites"
    return None


def reopened(raw: str, file: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a raw node for `blockdev-reopen`: as QEMU says that they are, on another file.

    It does not say whether a node lets discards through; they are, and the node below decides. RefusedError.
    """
    if '"offset"' in str(said.get("file", "")) or '"size"' in str(said.get("file", "")):
        raise RefusedError(
            f"the raw node {raw} shows a part of its file only", hint="give QEMU the whole file or device"
        )
    cache = said.get("cache", {})
    return {
        "driver": "raw",
        "node-name": raw,
        "read-only": bool(said.get("ro", False)),
        "detect-zeroes": said.get("detect_zeroes", "off"),
        "discard": "unmap",
        "cache": {"direct": bool(cache.get("direct")), "no-flush": bool(cache.get("no-flush"))},
        "file": file,
    }


def parts(cow: Cow, below: str, said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is added to QEMU before the filter is put in: target, what lies under it, filter."""
    cache = said.get("cache", {})
    direct = {"direct": bool(cache.get("direct")), "no-flush": bool(cache.get("no-flush"))}
    file = {"driver": "file", "filename": str(cow.path), "discard": "unmap"}
    return [
        {"driver": "qcow2", "node-name": cow.node("tmp"), "file": file, "discard": "unmap"},
        {"driver": "raw", "node-name": cow.node("low"), "file": below, "discard": "unmap", "cache": direct},
        {
            "driver": "copy-before-write",
            "node-name": cow.node("cbw"),
            "file": cow.node("low"),
            "target": cow.node("tmp"),
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": TIMEOUT_S,
            "discard": "unmap",
        },
    ]


def _under(chain: LiveChain, node: str) -> str:
    line = [name for name, _ in chain.line]
    return line[line.index(node) + 1]

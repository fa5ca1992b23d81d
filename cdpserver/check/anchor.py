"""An anchor: the heads of hash chains in a file that lies somewhere else, where who rewrites history cannot reach it.

It is of the disks of one state directory. A disk that has another uuid than the one anchored under its name, or that is gone, is
no less wrong than a chain that is not what it was: whoever can rewrite history can also make the timeline anew.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdpserver import durable, timeline
from cdpserver.check.links import Head
from cdpserver.errors import CdpError, CorruptError, NotFoundError
from cdpserver.journal.links import head_digest, read
from cdpserver.state import StateDir

FORMAT = 1


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Heads by the timeline's uuid; {} where there is no file yet. CorruptError."""
    try:
        value = durable.read_json(path)
    except FileNotFoundError:
        return {}
    disks = value.get("disks")
    if value.get("format") != FORMAT or not isinstance(disks, dict):
        raise CorruptError(f"{path} is no anchor", hint="name the file that cdp check --chain --anchor wrote")
    for row in disks.values():
        if (
            not isinstance(row, dict)
            or type(row.get("links")) is not int
            or not isinstance(row.get("head"), str)
            or not isinstance(row.get("disk"), str)
        ):
            raise CorruptError(f"{path} is damaged", hint="use an older copy of it")
    return disks


def compare(directory: Path, head: Head, anchored: Mapping[str, Any]) -> str:
    """What is wrong with a chain that was anchored; nothing if all that was there then is there as it was."""
    links = int(anchored["links"])
    if head.links < links:
        return f"the chain has {head.links} links, and had {links} when it was anchored"
    uuid, found = read(directory)
    if head_digest(uuid, found[:links]).hex() != anchored["head"]:
        return f"the first {links} links of the chain are not those that were anchored"
    return ""


class Anchor:
    """The heads in an anchor, and those that are to replace them when all agree. `wrong` says what does not."""

    def __init__(self, path: Path, *, forget: Sequence[str] = ()) -> None:
        """`forget` names disks whose heads in the file mean nothing any more. NotFoundError for one that has none."""
        self._path = path
        held = load(path)
        for disk in forget:
            if all(row["disk"] != disk for row in held.values()):
                raise NotFoundError(f"{path} has no head of {disk}", hint="leave out --forget")
        self._held = {uuid: row for uuid, row in held.items() if row["disk"] not in forget}
        self._now: dict[str, dict[str, Any]] = {}
        self.wrong: list[str] = []

    def take(self, disk: str, directory: Path, head: Head | None) -> None:
        """Compare a disk's chain with what was kept of it, and take its head."""
        uuid = (timeline.load(directory).uuid if head is None else head.uuid).hex()
        others = [other for other, row in self._held.items() if row["disk"] == disk and other != uuid]
        held = self._held.get(uuid)
        if others:
            self.wrong.append(
                f"{disk} is not the timeline that was anchored: its uuid is {uuid}, and was {others[0]}"
            )
        elif held is not None and head is None:
            self.wrong.append(f"{disk} has no hash chain, and had one when it was anchored")
        elif held is not None and head is not None and (wrong := compare(directory, head, held)):
            self.wrong.append(f"{disk}: {wrong}")
        if head is not None:
            self._now[uuid] = {"disk": disk, "links": head.links, "head": head.digest.hex()}

    def miss(self, state: StateDir, disks: Mapping[str, str]) -> None:
        """Note which anchored disks are gone: of `disks`, ids by name, none has that name, and none is that timeline."""
        gone = {uuid: row["disk"] for uuid, row in self._held.items() if row["disk"] not in disks}
        for id in disks.values() if gone else ():
            with contextlib.suppress(CdpError):  # one that cannot be read is none of these
                gone.pop(timeline.load(state.timeline(id)).uuid.hex(), None)  # it has another name now
        self.wrong += [f"{disk} was anchored, and is gone" for disk in gone.values()]

    def save(self) -> None:
        """Keep the new heads, durably. CorruptError if anything is not what it was; the file stays as it is then."""
        if self.wrong:
            raise CorruptError(
                "; ".join(self.wrong),
                hint="history was rewritten: compare it with a copy or a backup. "
                "Only if you removed that disk, made it anew or began another chain: --forget DISK",
            )
        durable.write_json(self._path, {"format": FORMAT, "disks": self._held | self._now})

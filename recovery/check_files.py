"""The files of the guest that damaged bytes belong to, for `cdp check --files`."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdpserver.errors import CdpError
from cdpserver.state import StateDir
from recovery.output import say

if TYPE_CHECKING:
    from cdpserver.check import Damage
    from cdpserver.check.damage import Extents
    from cdpserver.files.browser import Browser

NAMED = 20
"""Files of one damaged place that are named; nobody reads more."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one damaged place, at the last instant that shows it. `more`: there are others.

    Without `known` it may be in files all the same: which bytes are damaged is not known, or what file system they are in.
    """

    names: tuple[str, ...]
    known: bool
    more: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"files": list(self.names), "files_known": self.known, "files_more": self.more}

    def lines(self) -> Iterator[str]:
        """For people."""
        for name in self.names:
            yield f"  file     {name}"
        if self.more:
            yield "  file     ... and more"
        if not self.known:
            yield "  file     which ones it is in cannot be told" + (", but for these" if self.names else "")


def files_of(state: StateDir, disk: str, damage: "Damage") -> Files:
    """The files that a damage is in."""
    from cdpserver.files.browser import Browser
    from cdpserver.held import HeldPoint
    from cdpserver.names import Seq

    extents = damage.finding.extents
    if not extents:
        return Files((), known=extents is not None)
    found: list[str] = []
    known = True
    try:
        with (
            contextlib.closing(HeldPoint(state, disk, Seq(damage.to_seq))) as held,
            Browser(held.view) as browser,
        ):
            for volume in browser.volumes():
                try:
                    browser.open(volume.name)
                    for name in _inside(browser, volume.name, extents):
                        if len(found) == NAMED:
                            return Files(tuple(found), known, more=True)
                        found.append(name)
                except CdpError:
                    known = known and not _touches(browser, volume.name, extents)
    except (CdpError, OSError) as error:
        say(f"which files of {disk}@seq:{damage.to_seq} it is in cannot be told: {error}")
        known = False
    return Files(tuple(found), known)


def _touches(browser: "Browser", volume: str, extents: "Extents") -> bool:
    """Does a volume whose files cannot be read lie where the damage is? One that nobody can place may."""
    try:
        return any(_overlaps(part, extents) for part in browser.parts(volume))
    except CdpError:
        return True


def _inside(browser: "Browser", volume: str, extents: "Extents") -> Iterator[str]:
    for file in browser.walk(volume, b"/"):
        if file.type == "file" and any(_overlaps(part, extents) for part in browser.extents(file)):
            path = "/" + b"/".join(file.path).decode(errors="replace")
            yield f"{volume}:{path}" if volume else path


def _overlaps(part: tuple[int, int, int], extents: "Extents") -> bool:
    """Is any of [start, end), which lies at a place on the disk, among these bytes? A hole is nowhere."""
    start, end, place = part
    return place >= 0 and any(place < high and low < place + end - start for low, high in extents)

"""Verifies the catalog, as far as one disk or all depend on it: does it read back as it was written, does its copy say the
same, and is there what its rows name?

    catalog/ -> rows, digest -> catalog.json -> timelines -> points that locks hold

Reads only, and lets a process of its own read LMDB's pages, which may end who trusts them. The service may go on changing the
catalog: what does not agree is looked at again before it is said.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpserver import groups, locks, timeline
from cdpserver.catalog import Catalog, Row, Table
from cdpserver.catalog.content import Content, read_copy
from cdpserver.catalog.recovery import read_apart
from cdpserver.catalog.rows import TABLES
from cdpserver.chain.holds import now_ns
from cdpserver.check import Damage
from cdpserver.check.damage import Finding
from cdpserver.errors import CdpError, CorruptError
from cdpserver.names import Seq
from cdpserver.points import Timeline as Points
from cdpserver.retention import policies
from cdpserver.state import StateDir
from cdpserver.view.history import History
from cdpserver.vm import record as vms
from cdpserver.vm.recovery import record as recoveries
from cdpserver.vm.trial import record as trials

LOOKS = 3
"""The copy is replaced just before a change is committed: it may be one change ahead for a moment."""

SETTLED_S = 60
"""A timeline's directory is there before its name is."""

RESTART = "restart cdpserver: it makes the catalog anew from catalog.json, or catalog.json from the catalog"

ELSEWHERE = ""
"""A protected VM, a recovery or a group of which a row cannot be read, history without a name: no disk is damaged by it."""

READS: Mapping[Table, Callable[[Row], Any]] = {
    "locks": locks.read_lock,
    "policies": policies.texts_of,
    "vms": vms.read,
    "groups": groups.read,
    "recoveries": recoveries.read,
    "trials": trials.read,
}
"""Who understands the rows of a table."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """A finding, and the id of the timeline that it is about; none where it is about all, ELSEWHERE where about no disk."""

    finding: Finding
    id: str | None = None

    @property
    def damage(self) -> Damage:
        """As part of a disk's report: it hides no instant, and touches no point but those that it names."""
        found = self.finding
        return Damage(found, found.from_seq, found.from_time_ns, len(found.named), found.named, None, None)


class CatalogCheck:
    """What is wrong with the catalog of a state directory; `content` is all that is known of it, if anything is."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self.content: Content | None = None
        self.wrong: list[Wrong] = []
        self.readable = True
        directories = _settled(state)
        self._read()
        if self.content is not None:
            self.wrong += [*self._entries(self.content, directories), *self._rows(self.content)]

    def names(self) -> Catalog:
        """The catalog for looking names up: its copy where LMDB's pages are not to be trusted. The caller closes it."""
        return Catalog.open(self._state, writable=False) if self.readable else Catalog(self._state, None)

    def of(self, id: str) -> tuple[Damage, ...]:
        """What is wrong for one disk."""
        return tuple(wrong.damage for wrong in self.wrong if wrong.id in (None, id))

    def elsewhere(self) -> list[dict[str, str]]:
        """What is wrong and damages no disk, as programs are told."""
        found = [wrong.finding for wrong in self.wrong if wrong.id == ELSEWHERE]
        return [{"what": one.what, "hint": one.hint} for one in found]

    def _say(self, what: str, path: Path, hint: str) -> None:
        self.wrong.append(Wrong(Finding(what, path, 0, 0, hint=hint)))

    def _read(self) -> None:
        state = self._state
        for look in range(LOOKS):
            held, why = _held(lambda: read_apart(state.catalog))
            copy, copy_why = _held(lambda: read_copy(state.catalog_copy))
            if held is not None and held == copy:
                break
            last = look == LOOKS - 1
            if last and held is None:
                self._say(f"the catalog cannot be read: {why}", state.catalog, RESTART)
            if last and copy is None:
                self._say(f"the catalog's copy is of no use: {copy_why}", state.catalog_copy, RESTART)
            if last and held is not None and copy is not None:
                self._say(
                    f"the catalog's copy does not say what the catalog says: {_unlike(held, copy)}",
                    state.catalog_copy,
                    RESTART,
                )
        self.readable = held is not None
        self.content = held if held is not None else copy

    def _entries(self, content: Content, directories: set[str]) -> Iterator[Wrong]:
        path, ids = self._state.catalog, [entry.id for entry in content.entries.values()]
        for name, entry in sorted(content.entries.items()):
            if ids.count(entry.id) > 1:
                what = f"the disk {name} and another one are both of timeline {entry.id}"
                yield Wrong(
                    Finding(what, path, 0, 0, hint=f"restore catalog.json from a backup; {RESTART}"), entry.id
                )
            if entry.state == "live" and not self._state.timeline(entry.id).is_dir():
                what = f"the disk {name} is of timeline {entry.id}, which is not there"
                hint = f"restore timelines/{entry.id} from a backup of the state directory, or: cdp disk remove {name}"
                yield Wrong(Finding(what, path, 0, 0, hint=hint), entry.id)
            if int(entry.id[1:]) >= content.next_id:
                what = f"the id {entry.id} of {name} would be given again: the counter of ids is behind"
                yield Wrong(Finding(what, path, 0, 0, hint=RESTART), entry.id)
        for id in sorted(directories - set(ids)):
            if self._state.timeline(id).is_dir():
                what = f"the timeline {id} is there, but no disk has it"
                hint = "stop cdpserver, move catalog/ aside, leave catalog.json, and start it: it names what it finds"
                yield Wrong(Finding(what, self._state.timeline(id), 0, 0, hint=hint), ELSEWHERE)

    def _rows(self, content: Content) -> Iterator[Wrong]:
        path, live = self._state.catalog, {entry.id: entry.name for entry in content.entries.values()}
        for table in TABLES:
            for row in content.rows[table].values():
                try:
                    READS[table](row)
                except CorruptError as error:
                    yield Wrong(Finding(error.message, path, 0, 0, hint=error.hint), _about(table, row, live))
        held = []
        for row in content.rows["locks"].values():
            with contextlib.suppress(CorruptError):  # said already
                held.append(locks.read_lock(row))
        for lock in held:
            if not lock.holds(now_ns(self._state)):
                continue
            if lock.timeline not in live:
                what = f"the lock {lock.id} is on timeline {lock.timeline}, which no disk has"
                hint = "restore the disk's history from a backup; else the lock can be taken back: cdp point unlock"
                yield Wrong(Finding(what, path, 0, 0, hint=hint))
            elif why := self._lost(lock):
                what = f"the lock {lock.id} holds seq:{lock.seq} of {live[lock.timeline]}, which cannot be had: {why}"
                hint = f"cdp check {live[lock.timeline]} says what is damaged; lock the nearest whole point instead"
                named = (f"seq:{lock.seq}",)
                yield Wrong(
                    Finding(what, path, lock.seq, lock.time_ns, named=named, hint=hint), lock.timeline
                )

    def _lost(self, lock: locks.Lock) -> str:
        """Why an instant is not there; empty if it is, or if its history cannot be read, which is said elsewhere."""
        try:
            found = timeline.load(self._state.timeline(lock.timeline))
            with contextlib.closing(History(self._state.path, found)) as history:
                Points(history).resolve(Seq(lock.seq), now_ns=now_ns(self._state))
        except (CorruptError, OSError):
            return ""
        except CdpError as error:
            return error.message
        return ""


def _about(table: Table, row: Row, live: Mapping[str, str]) -> str | None:
    """What a row that cannot be read is about. A lock may be anybody's, so it keeps history from being dropped everywhere."""
    if table == "locks":
        return None
    return next((id for id in live if table == "policies" and row.id == policies.disk_row(id)), ELSEWHERE)


def _held(read: Callable[[], Content]) -> tuple[Content | None, str]:
    try:
        return read(), ""
    except CorruptError as error:
        return None, error.message
    except OSError as error:
        return None, error.strerror or str(error)


def _settled(state: StateDir) -> set[str]:
    """The timelines that have been there for a while."""
    found = set()
    for path in state.timelines.glob("t[1-9]*"):
        with contextlib.suppress(OSError):
            if path.name[1:].isdigit() and time.time() - (path / timeline.FILE).stat().st_ctime > SETTLED_S:
                found.add(path.name)
    return found


def _unlike(held: Content, copy: Content) -> str:
    """What two contents do not have in common, in short."""
    mine, other = held.to_json(), copy.to_json()
    parts = []
    for key in mine:
        if mine[key] != other[key]:
            names = (
                set(mine[key]) ^ set(other[key]) or {k for k in mine[key] if mine[key][k] != other[key][k]}
                if isinstance(mine[key], dict)
                else set()
            )
            parts.append(f"{key} ({', '.join(sorted(names)[:5])})" if names else key)
    return ", ".join(parts)

"""What the service says of a disk: from the target while it has the disk open, else from its files."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from cdpserver import durable, timeline
from cdpserver.catalog import Entry, Row
from cdpserver.errors import CdpError
from cdpserver.journal import recovery
from cdpserver.journal.control import Grade
from cdpserver.journal.log import Journal, interval_path
from cdpserver.journal.record import RECORD_SIZE
from cdpserver.journal.segment import PAGE, SEALED
from cdpserver.names import BACKUP, format_time
from cdpserver.points import Timeline as Points
from cdpserver.service.core import Core
from cdpserver.timeline import BackupBase, PointBase, Timeline
from cdpserver.view.history import History

UNSEALED = 2
"""Segments at the end of a journal whose logs may be allocated further than they are filled."""


def describe(
    core: Core, entry: Entry, open_disks: dict[str, Any], policies: Mapping[str, Row] | None = None
) -> dict[str, Any]:
    """One disk or fork as the API shows it; `open_disks` is what the target says of those. For threads.

    `policies` are the rows of that table, for who asks of many disks.
    """
    try:
        found = timeline.load(core.state.timeline(entry.id))
    except CdpError as error:
        if entry.state == "removing":
            return _head(core, entry, None) | {"state": "removing"}
        return _head(core, entry, None) | {"state": "damaged", "error": error.message}
    facts = _head(core, entry, found)
    if entry.state == "removing":
        return facts | {"state": "removing"}
    try:
        history = History(core.state.path, found, core.clock.boot_id)
        try:
            every_ns = core.rp_every_ns(entry, policies)
            status = open_disks.get(found.full_name)
            facts |= history.journal.settled(partial(_seen, core, history, status, every_ns))
        finally:
            history.close()
    except (CdpError, OSError) as error:
        return facts | {"state": "damaged", "error": getattr(error, "message", str(error))}
    return facts | {"state": state_of(found, facts)}


def _seen(core: Core, history: History, status: dict[str, Any] | None, every_ns: int) -> dict[str, Any]:
    """What its history says."""
    return (status or closed_status(history)) | {
        "size": history.size,
        "journal_bytes": journal_bytes(history.journal),
        "points": Points(history).count(now_ns=core.clock.now_ns(), every_ns=every_ns),
    }


def _head(core: Core, entry: Entry, found: Timeline | None) -> dict[str, Any]:
    vm = entry.name.rpartition("/")[0] or None
    facts: dict[str, Any] = {
        "name": entry.name,
        "vm": vm,
        "size": found.size if found is not None else None,
        "state": "",
        **core.disk_uris(entry),
        "id": entry.id,
        "created": format_time(entry.created_ns),
        "created_ns": entry.created_ns,
        "session": 0,
        "synced": False,
        "write_blocking": False,
        "grade": Grade.UNORDERED.label,
        "lag_ns": 0,
        "durable_seq": 0,
        "last_seq": 0,
        "journal_bytes": 0,
        "points": 0,
        "clients": 0,
        "broken": "",
    }
    if found is not None and isinstance(found.base, PointBase):
        facts["base"] = base_name(core, found.base)
    if found is not None and isinstance(found.base, BackupBase):
        facts["base"] = f"{BACKUP}{found.base.backup}/{found.base.disk}"
    return facts


def base_name(core: Core, base: PointBase) -> str:
    """`DISK@seq:N`: what a fork stands on."""
    parent = core.catalog.by_id(base.timeline)
    return f"{parent.name if parent is not None else base.timeline}@seq:{base.seq}"


def state_of(found: Timeline, facts: dict[str, Any]) -> str:
    """The word for what a disk is doing, by what the target or its files say of it."""
    if found.is_fork:
        return "fork"
    if facts["mode"] == "first-copy":
        return "first-copy" if facts["wrote"] else "empty"
    if facts["session"] == 0:
        return "empty"
    return "synced" if facts["synced"] else "unordered"


def closed_status(history: History) -> dict[str, Any]:
    """As the target's status, for a disk that it has not opened: from files."""
    journal = history.journal
    if journal.empty:
        return {"mode": "first-copy", **_first_copy(history)}
    last = journal.last()
    state = journal.state_at(last.seq)
    durable_seq = recovery.survey(journal, history.boot_id).durable_seq
    return {
        "mode": "journal",
        "session": state.session,
        "synced": state.synced,
        "write_blocking": state.write_blocking,
        "grade": state.grade.label,
        "last_seq": last.seq,
        "durable_seq": min(durable_seq, last.seq),
    }


def _first_copy(history: History) -> dict[str, Any]:
    try:
        noted = durable.read_json(history.directory / "first-copy.json")
    except FileNotFoundError:
        return {"session": 0, "wrote": False}
    return {"session": noted.get("session", 0), "wrote": bool(noted.get("wrote"))}


def journal_bytes(journal: Journal) -> int:
    """Payload and headers of every segment, without what is only allocated for later records."""
    total = 0
    for number, (interval, segment) in enumerate(journal.newest_places()):
        if number == UNSEALED:
            break
        reader = journal.reader(interval, segment)
        if reader.state == SEALED:
            break
        total += PAGE + reader.count * RECORD_SIZE - reader.path.stat().st_size
    for interval in journal.intervals:
        with os.scandir(interval_path(journal.timeline, interval)) as files:
            total += sum(file.stat().st_size for file in files if file.name.endswith((".log", ".data")))
    return total

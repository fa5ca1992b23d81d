"""Questions to the service, answered from the state directory where it does not run: also of a copy, or on read-only media.

The parts of the service answer, without its processes, and nothing is changed. What only a running service knows (who is
connected, what is under way) is not among the questions. Values of policies that the configuration sets are not known here.
"""

import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import trio

from cdpserver.catalog import Catalog
from cdpserver.clock import Clock
from cdpserver.config import Config
from cdpserver.errors import CdpError, NotFoundError
from cdpserver.events import EventLog
from cdpserver.journal.log import Journal
from cdpserver.repository import registered
from cdpserver.service import facts, feed
from cdpserver.service.basepoints import BasePoints
from cdpserver.service.control import Targets
from cdpserver.service.core import Core
from cdpserver.service.groups import Groups
from cdpserver.service.instants import Instants
from cdpserver.service.locks import Locks
from cdpserver.service.policies import Policies
from cdpserver.service.sampler import on_record
from cdpserver.service.sources import Sources
from cdpserver.state import StateDir
from cdpserver.vm.trial import record as trials

Query: TypeAlias = Mapping[str, Any]
Answer: TypeAlias = Callable[[Core, str, Query], Awaitable[Any]]

SECOND_NS = 1_000_000_000


async def _disks(core: Core, _name: str, _query: Query) -> Any:
    rows = core.catalog.rows("policies")
    return [facts.describe(core, entry, {}, rows) for entry in core.catalog.names().values()]


async def _disk(core: Core, name: str, _query: Query) -> Any:
    return facts.describe(core, core.entry(name), {})


async def _forks(core: Core, name: str, query: Query) -> Any:
    return [one for one in await _disks(core, name, query) if "base" in one]


async def _points(core: Core, name: str, query: Query) -> Any:
    span = {key: query.get(key) for key in ("since", "until", "kind", "limit")}
    return await Instants(core).points(name, **span)


async def _rpo(core: Core, name: str, query: Query) -> Any:
    span = {key: query.get(key) for key in ("at", "since", "until", "limit")}
    return on_record(core, name, **span)


async def _group(core: Core, name: str, _query: Query) -> Any:
    return await Groups(core).show(name)


async def _events(core: Core, _name: str, query: Query) -> Any:
    wanted = feed.Filter(
        query.get("level"), query.get("event"), query.get("disk"), feed.since_text(query.get("since"))
    )
    return feed.Feed(core.state.events).newest(wanted, int(query["limit"])).events


async def _drills(core: Core, _name: str, query: Query) -> Any:
    wanted = (None, query.get("name"))
    found = [one for one in trials.all_of(core.catalog) if one.kind == "drill"]
    return [one.describe() for one in found if query.get("name") is None or one.subject in wanted]


async def _repositories(core: Core, _name: str, _query: Query) -> Any:
    known = sorted(registered.load(core.state.path).values(), key=lambda one: one.path)
    return [{"id": one.id, "path": one.path, "encrypted": bool(one.key_file)} for one in known]


ANSWERS: tuple[tuple[str, Answer], ...] = (
    ("disks", _disks),
    ("disks/(.+):points", _points),
    ("vms/(.+):points", _points),
    ("disks/(.+):basepoints", lambda core, name, _: BasePoints(core).list_published(name)),
    ("disks/([^:]+)", _disk),
    ("forks", _forks),
    ("points/(.+)", lambda core, point, _: Instants(core).show(point)),
    ("locks", lambda core, _, query: Locks(core).list_locks(query.get("disk"))),
    ("policies/(.+)", lambda core, name, _: Policies(core, lambda: None).show(name)),
    ("groups", lambda core, _, __: Groups(core).list_groups()),
    ("groups/(.+)", _group),
    ("rpo/(.+)", _rpo),
    ("events", _events),
    ("drills", _drills),
    ("backup-sources", lambda core, _, __: Sources(core).list_sources()),
    ("repositories", _repositories),
)
"""What is answered, by the path of the API."""


def can(path: str) -> bool:
    """Is this answered from files?"""
    return any(re.fullmatch(pattern, path) for pattern, _ in ANSWERS)


def answer(state: StateDir, path: str, query: Query) -> Any:
    """What the service would answer to GET. CdpError, as it would; NotFoundError for what is not answered here."""
    for pattern, found in ANSWERS:
        if (match := re.fullmatch(pattern, path)) is not None:
            name = match[1] if match.re.groups else ""
            with Catalog.open(state, writable=False) as catalog:
                return trio.run(_answer, found, state, catalog, name, query)
    raise NotFoundError(f"{path} is not answered without the service", hint="start cdpserver")


async def _answer(found: Answer, state: StateDir, catalog: Catalog, name: str, query: Query) -> Any:
    clock = _clock(state, catalog)
    core = Core(state, Config(), clock, catalog, EventLog(state.events), Targets(state, 0))
    return await found(core, name, query)


def _clock(state: StateDir, catalog: Catalog) -> Clock:
    """Now, and never before the newest record: the clock of who wrote it may have been ahead of this host's."""
    clock, newest_ns = Clock.for_reading(state.clock), 0
    for entry in catalog.names().values():
        # What is damaged is said where it is asked for.
        with (
            contextlib.suppress(CdpError, OSError),
            contextlib.closing(Journal(state.timeline(entry.id))) as journal,
        ):
            newest_ns = max(newest_ns, 0 if journal.empty else journal.last().time_ns)
    return replace(clock, offset_ns=clock.offset_ns + max(0, newest_ns + SECOND_NS - clock.now_ns()))

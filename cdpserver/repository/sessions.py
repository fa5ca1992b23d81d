"""Backups that are under way, so that `gc` takes nothing from them; and packs that are doomed.

A session is an object that its process holds. Why nothing is lost beside running backups:

    gc:      list packs  ->  list sessions, then backups  ->  doom packs that are not used  ->  note which sessions run now
             ->  (perhaps in a later run) these have all ended?  ->  used by now?  ->  delete
    backup:  begin session  ->  read which packs are doomed  ->  store what is not there, or is in a doomed one
             ->  write the backup  ->  end session

A session's own packs are left alone while it runs. A backup that began after a pack was doomed does not build on it. One that
began before may have: `gc` waits for its end, looks at the backups again, and moves what they name by then.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from cdpserver.repository.place import HeldCheck, Place

GC = "gc"
"""The session of `gc`: one at a time."""

RANDOM = 8
"""Hexadecimal digits at the end of an id."""

ID_LENGTH = 32
"""`20261122T201805.250000Z-0badcafe`"""


def new_id(time_ns: int) -> str:
    """An id for a backup and its session: sorts by time, and is nobody else's."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
    return f"{stamp}.{rest // 1000:06}Z-{secrets.token_hex(RANDOM // 2)}"


def time_of(id_: str) -> int:
    """When such an id was made, in ns; 0 if it is none."""
    try:
        made = datetime.strptime(id_.partition("-")[0], "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC)
    except ValueError:
        return 0
    return int(made.timestamp() * 1e6) * 1000


@contextlib.contextmanager
def session(place: Place, id_: str) -> Iterator[HeldCheck]:
    """Held while a backup is written. RefusedError if that session runs."""
    with place.hold(f"sessions/{id_}") as check:
        yield check


def running(place: Place) -> set[str]:
    """Ids of the sessions whose process lives. What the dead left is deleted."""
    return {name.removeprefix("sessions/") for name in place.holds("sessions")}


def pack_name(session: str, number: int) -> str:
    """Of a session's pack; spread over 256 folders."""
    return f"packs/{session[-2:]}/{session}-{number:06}"


def session_of(pack: str) -> str:
    """Who wrote it."""
    return pack.rpartition("/")[2].rpartition("-")[0]


# -- doomed packs


def _doom_name(pack: str) -> str:
    return "doomed/" + pack.removeprefix("packs/").replace("/", ".")


def doomed(place: Place) -> list[str]:
    """The packs that no new backup may build on."""
    return ["packs/" + name.removeprefix("doomed/").replace(".", "/", 1) for name, _ in place.names("doomed")]


def doom(place: Place, packs: list[str]) -> None:
    """From here on no new backup builds on these; those that run now may, and are noted."""
    for pack in packs:
        place.put(_doom_name(pack), b"{}\n")
    noted = json.dumps({"sessions": sorted(running(place) - {GC})}).encode() + b"\n"
    for pack in packs:
        place.put(_doom_name(pack), noted)


def waits_for(place: Place, pack: str) -> set[str] | None:
    """The sessions that had begun when a pack was doomed; None if that was not noted: doom it again."""
    try:
        noted = json.loads(place.get(_doom_name(pack)))
        return set(noted["sessions"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def spare(place: Place, pack: str) -> None:
    """It is doomed no more, or is gone."""
    place.delete(_doom_name(pack))

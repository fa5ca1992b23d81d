"""Chunks that no backup names any more go, pack by pack; safe beside running backups (sessions.py says why)."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from cdpserver.errors import CorruptError, NotFoundError
from cdpserver.progress import Progress, nobody
from cdpserver.repository import sessions
from cdpserver.repository.content import ChunkList
from cdpserver.repository.format import HEAD, ROW, TAIL_SIZE, Entry
from cdpserver.repository.packs import PackWriter
from cdpserver.repository.place import HeldCheck
from cdpserver.repository.record import Backup
from cdpserver.repository.repository import Repository

WASTE = 0.25
"""Share of a pack that may be unused before the rest of it is written anew."""


@dataclass(frozen=True, slots=True)
class Unused:
    """A pack that is to go, and how much of it is still used and is written anew before."""

    pack: str
    bytes: int
    kept_bytes: int


@dataclass(frozen=True, slots=True)
class Swept:
    """What a run did. `waiting` packs go when the backups that run now have ended."""

    doomed: tuple[Unused, ...]
    deleted: int
    waiting: int
    freed_bytes: int
    damaged: tuple[str, ...] = ()
    """Packs that stay, since something in them is used and cannot be read."""


def live_ids(repository: Repository) -> set[bytes]:
    """Every chunk that a backup names. CorruptError if a backup or page is lost: then nothing is known to be unused."""
    for id_ in repository.missed():
        raise CorruptError(
            f"backup {id_} is gone and nobody removed it, so what it needs is kept",
            hint=f"put backups/{id_} back from a copy; cdp backup remove {id_} gives it up",
        )
    ids: set[bytes] = set()
    read: set[bytes] = set()
    for id_ in repository.backup_ids():
        try:
            _add_ids(repository, repository.backup(id_), ids, read)
        except NotFoundError:
            continue  # removed meanwhile
        except CorruptError as error:
            raise CorruptError(
                f"backup {id_} cannot be read, so nobody knows what is unused: {error.message}",
                hint=f"cdp repo check says what is lost; cdp backup remove {id_} gives it up",
            ) from None
    return ids


def _add_ids(repository: Repository, backup: Backup, ids: set[bytes], read: set[bytes]) -> None:
    for disk in backup.disks:
        chunks = ChunkList(repository, disk)
        for number in range(len(disk.pages)):
            ids |= chunks.named(number, read)


def unused(repository: Repository) -> list[Unused]:
    """Packs worth deleting now; nothing is changed. Those of running sessions are left alone.

    One in which something was found damaged is worth it as soon as that is stored elsewhere too, or used by nobody.
    """
    packs = dict(repository.place.names("packs"))
    running = sessions.running(repository.place)
    repository.refresh()
    live = live_ids(repository)
    found = []
    for pack, length in sorted(packs.items()):
        if sessions.session_of(pack) in running:
            continue
        entries = repository.entries(pack, length)
        here = list(_read_here(repository, pack, entries, live))
        kept = sum(entry.stored for entry in here)
        overhead = HEAD.size + TAIL_SIZE + len(entries) * ROW.size
        wasted = not kept or length - overhead - kept > WASTE * length
        damaged = repository.damaged.of(pack)
        healed = bool(damaged) and damaged.isdisjoint(entry.id for entry in here)
        if (wasted or healed) and not _is_retained(repository, pack):
            found.append(Unused(pack, length, kept))
    return found


def _is_retained(repository: Repository, pack: str) -> bool:
    """Would the place refuse to delete it? Then nothing is written anew for its sake."""
    if not repository.place.locks:
        return False
    try:
        return repository.place.retained_until_ns(pack) > repository.now_ns()
    except FileNotFoundError:
        return False


def _read_here(repository: Repository, pack: str, entries: list[Entry], live: set[bytes]) -> Iterator[Entry]:
    """The used entries of a pack that count as this one's: a chunk in several packs counts for the first."""
    for entry in entries:
        places = repository.places(entry.id) if entry.id in live else []
        if places and places[0][0] == pack:
            yield entry


def sweep(repository: Repository, *, progress: Progress = nobody) -> Swept:
    """Doom, move what is still used, delete. Killed anywhere, the next run goes on. RefusedError while another one runs."""
    place = repository.place
    with sessions.session(place, sessions.GC) as check_held:
        found = unused(repository)
        # What was noted is not noted again: backups that began since have nothing to do with it.
        notes = {pack: sessions.waits_for(place, pack) for pack in sessions.doomed(place)}
        noted = {pack for pack, waits_for in notes.items() if waits_for is not None}
        sessions.doom(place, sorted(({item.pack for item in found} | notes.keys()) - noted))
        repository.refresh()
        packs = dict(place.names("packs"))
        for pack, id_ in repository.damaged.places:
            if pack not in packs:
                repository.damaged.forget(pack, id_)
        running = sessions.running(place)
        going, waiting = [], 0
        for pack in sorted(repository.doomed):
            before = sessions.waits_for(place, pack)
            if pack not in packs:
                sessions.spare(place, pack)
            elif before is None or before & running:
                waiting += 1
            else:
                going.append(pack)
        deleted, freed = _delete(repository, going, packs, check_held, progress) if going else ([], 0)
    damaged = tuple(pack for pack in going if pack not in deleted)
    return Swept(tuple(found), len(deleted), waiting, freed, damaged)


def _delete(
    repository: Repository,
    going: list[str],
    lengths: dict[str, int],
    check_held: HeldCheck,
    progress: Progress,
) -> tuple[list[str], int]:
    """The packs that went, and the bytes that came back. One of which something is used and damaged stays."""
    live = live_ids(repository)  # once more: who began before the packs were doomed may name what is in them
    leaving = set(going)
    moved: set[bytes] = set()
    gone: list[str] = []
    with PackWriter(repository, sessions.new_id(time.time_ns())) as writer:
        for number, pack in enumerate(going):
            progress(number / len(going))
            try:
                for entry in repository.entries(pack, lengths[pack]):
                    elsewhere = set(repository.whole(entry.id)) - leaving
                    if entry.id in live and not elsewhere and entry.id not in moved:
                        content = repository.load(entry.id, entry.raw)
                        moved.add(entry.id)
                        sealed = repository.seal(entry.id, entry.kind, content)
                        writer.add(entry.id, entry.kind, entry.raw, sealed)
            except CorruptError:
                continue
            gone.append(pack)
        writer.flush()
    for pack in gone:
        check_held()  # another run could have begun to move things otherwise
        repository.place.delete(pack)
        repository.index.forget({pack})
        for id_ in repository.damaged.of(pack):
            repository.damaged.forget(pack, id_)
        sessions.spare(repository.place, pack)
    progress(1.0)
    repository.refresh()
    return gone, sum(lengths[pack] for pack in gone) - writer.stored_bytes

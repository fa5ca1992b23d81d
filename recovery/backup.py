"""`cdp backup`: points into a repository, and back."""

import contextlib
import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from cdpserver.errors import CorruptError, RefusedError, UsageError
from cdpserver.names import format_bytes, parse_point
from cdpserver.repository import prune, sessions
from cdpserver.repository.check import check_backup
from cdpserver.repository.record import FULL, BackedUpDisk, Backup
from cdpserver.repository.repository import Repository
from cdpserver.repository.source import held_points
from cdpserver.repository.take import MAX_INCREMENTS, back_up
from cdpserver.state import default_state_dir
from recovery.bar import moving
from recovery.export import write_out
from recovery.opened import Opened, alone
from recovery.output import Column, answer, answer_fields, answer_json, answer_table, say
from recovery.repo import DAMAGED, locks
from recovery.repositories import find_backup, find_id, opened_repository, read_key


def run(options: Namespace) -> None:
    """Make one. Killed, there is none, and the next one is right."""
    name, when = parse_point(options.point)
    most = MAX_INCREMENTS if options.max_increments is None else options.max_increments
    state_dir = default_state_dir(options.state_dir)
    with (
        opened_repository(options) as repository,
        held_points(state_dir, [(name, when)]) as sources,
        moving(f"backing up {options.point}", 1000) as bar,
    ):
        made = back_up(
            repository,
            sources,
            f"{name}@seq:{sources[0].seq}",
            full=options.full,
            max_increments=most,
            progress=lambda done: bar(int(done * 1000), 1000),
        )
    if options.json:
        answer_json(made.show())
        return
    rate = format_bytes(int(made.read_bytes / max(made.seconds, 0.001)))
    answer(
        f"backup:{made.id}  {made.kind}: {format_bytes(made.read_bytes)} read ({rate}/s), {format_bytes(made.new_bytes)} new,"
        f" {format_bytes(made.stored_bytes)} stored"
    )
    say(f"{made.kind}, since {made.reason}" if made.kind == "full" else made.reason)


def list_(options: Namespace) -> None:
    """All, oldest first."""
    with opened_repository(options) as repository:
        held = locks(repository)
        rows = [
            {**backup.show(), "locked": backup.id in held}
            for backup in repository.backups()
            if options.name in (None, backup.name.partition("@")[0], *(disk.name for disk in backup.disks))
        ]
    if options.json:
        answer_json(rows)
        return
    columns = (
        Column("id"), Column("name"), Column("kind"), Column("size", right=True),
        Column("stored", right=True), Column("locked"),
    )  # fmt: skip
    shown = [{**row, "stored": format_bytes(int(row["stored_bytes"]))} for row in rows]
    answer_table(columns, shown, nothing="there is no backup")


def show(options: Namespace) -> None:
    """One, with its disks."""
    with opened_repository(options) as repository:
        backup = find_backup(repository, options.id)
        shown = {**backup.show(), "locked": backup.id in locks(repository)}
    if options.json:
        answer_json(shown)
    else:
        answer_fields(shown)


def verify(options: Namespace) -> int:
    """Exit code 4 for damage."""
    with opened_repository(options) as repository:
        backup = find_backup(repository, options.id)
        with moving(f"verifying {backup.id}", 1000) as bar:
            found = check_backup(repository, backup, progress=lambda done: bar(int(done * 1000), 1000))
    result = {
        "id": backup.id,
        "chunks": found.chunks,
        "read_bytes": found.read_bytes,
        "sound": found.sound,
        "damage": [
            {"disk": d.disk, "start": d.start, "end": d.end, "reason": d.reason} for d in found.damage
        ],
    }
    if options.json:
        answer_json(result)
    elif found.sound:
        answer(f"backup:{backup.id} is whole: {found.chunks} chunks, {format_bytes(found.read_bytes)} read")
    else:
        for damage in found.damage:
            answer(f"{damage.disk} [{damage.start}, {damage.end}): {damage.reason}")
    return 0 if found.sound else DAMAGED


def remove(options: Namespace) -> None:
    """RefusedError for one that is locked or immutable."""
    with opened_repository(options) as repository:
        backup = _even_damaged(repository, find_id(repository, options.id))
        immutable = repository.config.immutable_ns
        if held := prune.hold(backup, repository.now_ns(), locked=locks(repository), immutable_ns=immutable):
            raise RefusedError(f"backup {backup.id} is {held}", hint="cdp backup unlock ends a lock")
        if not options.yes:
            raise UsageError(f"this removes backup {backup.id} of {backup.name}", hint="add --yes")
        repository.place.delete(f"backups/{backup.id}")
    _done(options, backup, "removed")


def _even_damaged(repository: Repository, id_: str) -> Backup:
    """One that cannot be read is as old as its id says: to give it up is what lets `gc` go on."""
    try:
        return repository.backup(id_)
    except CorruptError:
        return Backup(id_, FULL, "damaged", sessions.time_of(id_), "what cannot be read", ())


def lock(options: Namespace) -> None:
    """Until it is unlocked."""
    with opened_repository(options) as repository:
        backup = find_backup(repository, options.id)
        repository.place.put(f"locks/{backup.id}", json.dumps({"reason": options.reason}).encode())
    _done(options, backup, "locked")


def unlock(options: Namespace) -> None:
    """No error for one that is not locked."""
    with opened_repository(options) as repository:
        backup = find_backup(repository, options.id)
        repository.place.delete(f"locks/{backup.id}")
    _done(options, backup, "unlocked")


def _done(options: Namespace, backup: Backup, what: str) -> None:
    if options.json:
        answer_json({"id": backup.id, what: True})
    else:
        answer(f"{what} backup:{backup.id}")


def restore(options: Namespace) -> None:
    """As `cdp export` does: sparse, with progress, resumed by the same command, verified."""
    with opened_repository(options) as repository:
        backup = find_backup(repository, options.id)
        disk = _disk(backup, options.disk)
        where = repository.place.where

    @contextlib.contextmanager
    def origin(_: object) -> Iterator[Opened]:
        name = f"{backup.id}/{disk.name}"
        with _served(options, where, name) as uri:
            yield Opened(disk.name, f"backup:{backup.id}", disk.seq, disk.time_ns, uri)

    options.point = f"backup:{backup.id}/{disk.name}"
    write_out(options, origin)


def _disk(backup: Backup, name: str | None) -> BackedUpDisk:
    found = backup.disk(name)
    if found is None:
        there = ", ".join(disk.name for disk in backup.disks)
        raise UsageError(f"backup {backup.id} is of {there}", hint=f"--disk {backup.disks[0].name}")
    return found


@contextlib.contextmanager
def _served(options: Namespace, repo: str, name: str) -> Iterator[str]:
    """An export of our own of one disk of a backup. The key goes by a file that only we can read, never by argv."""
    with tempfile.TemporaryDirectory(prefix="cdp-") as directory:
        room = Path(directory)
        parameters = [f"repo={repo}"]
        if (secret := read_key(options)) is not None:
            path = room / "key"
            path.touch(mode=0o600)
            path.write_bytes(secret)
            parameters.append(f"key_file={path}")
        with alone("backup", parameters, room / "nbd"):
            yield f"nbd+unix:///{name}?socket={room / 'nbd'}"

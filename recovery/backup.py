"""`cdp backup`: points into a repository, and back."""

import json
from argparse import Namespace

from cdpserver.errors import CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.names import When, format_bytes, parse_point
from cdpserver.repository import prune, sessions
from cdpserver.repository.check import check_backup
from cdpserver.repository.locks import locks
from cdpserver.repository.record import FULL, Backup
from cdpserver.repository.repository import Repository
from cdpserver.repository.source import held_points
from cdpserver.repository.take import MAX_INCREMENTS, back_up
from cdpserver.state import default_state_dir
from recovery.backup_text import tell_made
from recovery.bar import moving
from recovery.output import Column, answer, answer_fields, answer_json, answer_table
from recovery.repositories import DAMAGED, find_backup, find_id, opened_repository
from recovery.together import several


def run(options: Namespace) -> None:
    """Make one. Killed, there is none, and the next one is right."""
    if options.qmp is not None or options.libvirt is not None:
        from recovery.backup_vm import run_vm

        run_vm(options)
        return
    _check_point(options)
    points, name = _points(options)
    most = MAX_INCREMENTS if options.max_increments is None else options.max_increments
    state_dir = default_state_dir(options.state_dir)
    with (
        opened_repository(options) as repository,
        held_points(state_dir, points) as sources,
        moving(f"backing up {options.point}", 1000) as bar,
    ):
        made = back_up(
            repository,
            sources,
            name or f"{sources[0].name}@seq:{sources[0].seq}",
            full=options.full,
            max_increments=most,
            progress=lambda done: bar(int(done * 1000), 1000),
        )
    tell_made(options, made.show())


def _check_point(options: Namespace) -> None:
    """What a running VM's backup takes does not go with a point."""
    given = {
        "--domain": options.domain,
        "--disk": options.disk,
        "--freeze": options.freeze,
        "--or-crash": options.or_crash,
        "--agent": options.agent,
        "--sshfs": options.sshfs,
        "--staging": options.staging,
        "--ssh": options.ssh,
    }
    if wrong := [name for name, value in given.items() if value]:
        raise UsageError(
            f"{wrong[0]} goes with --qmp or --libvirt",
            hint="a point was taken already: cdp point mark VM --name N --freeze, then VM@N",
        )
    parse_point(options.point)


def _points(options: Namespace) -> tuple[list[tuple[str, When]], str]:
    """The disks of the point, all at one instant; and what a backup of several is called."""
    found = several(options, options.point)
    if found is None:
        return [parse_point(options.point)], ""
    return [parse_point(str(disk["point"])) for disk in found["disks"]], str(found["point"])


def detach(options: Namespace) -> None:
    """The service reads it no more."""
    from recovery.remote import client

    client(options).detach(options.id)
    if options.json:
        answer_json({"id": options.id, "detached": True})
    else:
        answer(f"detached backup:{options.id}")


def list_(options: Namespace) -> None:
    """All, oldest first."""
    with opened_repository(options) as repository:
        held = locks(repository)
        rows = [
            {**backup.show(), "locked": backup.id in held}
            for backup in repository.backups()
            if options.name in (None, backup.subject, *(disk.name for disk in backup.disks))
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
            answer(f"{damage.where}: {damage.reason}")
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
        repository.remove(backup.id)
    _done(options, backup, "removed")


def _even_damaged(repository: Repository, id_: str) -> Backup:
    """One that cannot be read, or is gone, is as old as its id says: to give it up is what lets `gc` go on."""
    try:
        return repository.backup(id_)
    except (CorruptError, NotFoundError) as error:
        if isinstance(error, NotFoundError) and id_ not in repository.missed():
            raise
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

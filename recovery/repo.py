"""`cdp repo`: repositories made, shown, verified, pruned and swept."""

import re
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from cdpserver.errors import CdpError, UsageError
from cdpserver.names import format_bytes
from cdpserver.repository import gc as collecting
from cdpserver.repository import prune as pruning
from cdpserver.repository.check import check as verify
from cdpserver.repository.copy import copy as copying
from cdpserver.repository.locks import locks
from cdpserver.repository.places import open_place
from cdpserver.repository.repository import DEFAULT_CHUNK, create, load_config
from cdpserver.retention.slots import parse_slots
from recovery.bar import moving
from recovery.output import Column, answer, answer_fields, answer_json, answer_table, say
from recovery.remote import answer_one, client
from recovery.repositories import DAMAGED, key_of, known, location_of, note, opened_repository, read_key


def init(options: Namespace) -> None:
    """Make one."""
    place = open_place(location_of(options))
    config = create(
        place,
        chunk_size=options.chunk_size or DEFAULT_CHUNK,
        secret=read_key(options),
        immutable_ns=options.immutable or 0,
    )
    note(place.where, config.id.hex())
    shown = {"path": place.where, **config.show()}
    del shown["salt"], shown["proof"]
    if options.json:
        answer_json(shown)
        return
    answer(
        f"{place.where}: repository {config.id.hex()}, chunks of {format_bytes(config.chunk_size)}, cipher {config.cipher}"
    )
    if config.cipher != "none":
        say("keep a copy of the key elsewhere: without it nothing can be restored")


def add(options: Namespace) -> None:
    """Register one with the service."""
    service, where = client(options), open_place(location_of(options)).where
    answer_one(options, service.add_repository(where, *key_of(options)))


def forget(options: Namespace) -> None:
    """The service knows it no more."""
    which = options.path if re.fullmatch("[0-9a-f]{32}", options.path) else open_place(options.path).where
    answer_one(options, client(options).remove_repository(which))


def list_(options: Namespace) -> None:
    """Those that the service knows and those that were used here, and whether they are there."""
    registered = _registered(options)
    rows = []
    for path, id_ in sorted({**known(), **registered}.items()):
        row: dict[str, Any] = {"path": path, "id": id_, "state": "there", "registered": path in registered}
        try:
            config = load_config(open_place(path))
            row |= {"chunk_size": config.chunk_size, "cipher": config.cipher}
            if config.id.hex() != id_:
                row["state"] = "another repository"
        except CdpError as error:
            row["state"] = error.kind
        rows.append(row)
    if options.json:
        answer_json(rows)
        return
    answer_table(
        (Column("path"), Column("state"), Column("registered"), Column("cipher"), Column("id")),
        rows,
        nothing="no repository was used here; cdp repo init makes one",
    )


def _registered(options: Namespace) -> dict[str, str]:
    """Path -> id of those that the service knows; none while it does not run."""
    try:
        return {str(one["path"]): str(one["id"]) for one in client(options).repositories()}
    except CdpError as error:
        say(f"without those that the server knows: {error.message}")
        return {}


def show(options: Namespace) -> None:
    """What it is, and what it holds."""
    with opened_repository(options) as repository:
        ids = repository.backup_ids()
        packs = dict(repository.place.names("packs"))
        shown = {
            "path": repository.place.where,
            "id": repository.config.id.hex(),
            "chunk_size": repository.chunk_size,
            "cipher": repository.config.cipher,
            "immutable_ns": repository.config.immutable_ns,
            "created_ns": repository.config.created_ns,
            "backups": len(ids),
            "packs": len(packs),
            "stored_bytes": sum(packs.values()),
        }
    if options.json:
        answer_json(shown)
    else:
        answer_fields({**shown, "stored_bytes": format_bytes(int(str(shown["stored_bytes"])))})


def check(options: Namespace) -> int:
    """Exit code 4 for damage."""
    with opened_repository(options) as repository, moving(f"checking {repository.place.where}", 1000) as bar:
        found = verify(
            repository, read_data=not options.quick, progress=lambda done: bar(int(done * 1000), 1000)
        )
    if options.json:
        answer_json({**asdict(found), "sound": found.sound})
        return 0 if found.sound else DAMAGED
    for pack in found.packs_damaged:
        answer(f"{pack} cannot be read")
    for damage in found.damage:
        answer(f"backup {damage.backup}: {damage.where}: {damage.reason}")
    said = f"{found.backups} backups, {found.packs} packs, {found.chunks} chunks"
    say(f"{said}: {'sound' if found.sound else 'damaged'}")
    return 0 if found.sound else DAMAGED


def prune(options: Namespace) -> None:
    """Remove what no rule keeps."""
    rules = parse_slots(options.keep)
    with opened_repository(options) as repository:
        verdicts = pruning.plan(
            list(repository.backups()),
            rules,
            locked=locks(repository),
            immutable_ns=repository.config.immutable_ns,
            lived_ns=repository.now_ns(),
            keep_last=options.keep_last,
        )
        rows = [
            {
                "what": "keep" if verdict.keep else "drop",
                "id": verdict.backup.id,
                "name": verdict.backup.name,
                "created_ns": verdict.backup.created_ns,
                "reason": verdict.reason,
            }
            for verdict in verdicts
        ]
        if not options.dry_run:
            for verdict in verdicts:
                if not verdict.keep:
                    repository.remove(verdict.backup.id)
    if options.json:
        answer_json(rows)
        return
    columns = (Column("what"), Column("id"), Column("name"), Column("reason"))
    answer_table(columns, rows, nothing="there is no backup")
    if not options.dry_run and any(row["what"] == "drop" for row in rows):
        say(f"space comes back with: cdp repo gc {repository.place.where}")


def gc(options: Namespace) -> None:
    """Delete what no backup names."""
    with opened_repository(options) as repository:
        if options.dry_run:
            found = collecting.unused(repository)
            result: dict[str, Any] = {
                "packs": len(found),
                "deleted": 0,
                "waiting": 0,
                "freed_bytes": sum(item.bytes - item.kept_bytes for item in found),
                "damaged": [],
            }
        else:
            with moving(f"sweeping {repository.place.where}", 1000) as bar:
                swept = collecting.sweep(repository, progress=lambda done: bar(int(done * 1000), 1000))
            result = {
                "packs": len(swept.doomed),
                "deleted": swept.deleted,
                "waiting": swept.waiting,
                "freed_bytes": swept.freed_bytes,
                "damaged": list(swept.damaged),
            }
    if options.json:
        answer_json(result)
        return
    would = "would come back" if options.dry_run else "came back"
    answer(f"{format_bytes(result['freed_bytes'])} {would}; {result['deleted']} packs deleted")
    for pack in result["damaged"]:
        say(f"{pack} stays: something in it is used and damaged; cdp repo check says what that touches")
    if result["waiting"]:
        say(f"{result['waiting']} packs wait for backups that are under way: run it again later")


def copy(options: Namespace) -> int:
    """Exit code 4 if a backup could not be copied for damage."""
    name = options.name
    with opened_repository(options) as source:
        to = Namespace(path=options.to, key_file=options.to_key_file, key_command=options.to_key_command)
        with opened_repository(to) as target, moving(f"copying to {target.place.where}", 1000) as bar:
            if source.config.id == target.config.id:
                raise UsageError("both are the same repository", hint="name another one")
            done = copying(
                source,
                target,
                wanted=lambda backup: name in (None, backup.subject),
                progress=lambda part: bar(int(part * 1000), 1000),
            )
    result = {
        "copied": [backup.id for backup in done.copied],
        "there": done.there,
        "stored_bytes": sum(backup.stored_bytes for backup in done.copied),
        "damaged": [{"id": id_, "reason": reason} for id_, reason in done.damaged],
    }
    if options.json:
        answer_json(result)
    else:
        stored = format_bytes(sum(backup.stored_bytes for backup in done.copied))
        answer(f"{len(done.copied)} backups copied, {stored} stored; {done.there} were there")
        for id_, reason in done.damaged:
            say(f"backup {id_} is damaged: {reason}")
    return DAMAGED if done.damaged else 0

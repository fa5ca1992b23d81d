"""`cdp repo export` and `cdp repo import`: a repository as one stream through stdout and stdin."""

import json
import os
import sys
import time
from argparse import Namespace
from dataclasses import asdict

from cdpserver.errors import NotFoundError, RefusedError
from cdpserver.names import format_bytes
from cdpserver.repository import tape, untape
from cdpserver.repository.places import open_place
from recovery.bar import moving
from recovery.output import answer, answer_json, say
from recovery.repositories import find_backup, location_of, opened_repository, read_key

DAMAGED = 4


def export(options: Namespace) -> None:
    """All backups, or some. RefusedError to a terminal."""
    if sys.stdout.isatty():
        raise RefusedError(
            "the stream would go to this terminal", hint="write it to a file, a tape, or a pipe"
        )
    with opened_repository(options) as repository:
        wanted = options.backup or [brief.id for brief in repository.briefs()]
        backups = [find_backup(repository, id_) for id_ in wanted]
        if not backups:
            raise NotFoundError(
                f"there is no backup in {repository.place.where}", hint="cdp backup run makes one"
            )
        sys.stdout.flush()
        with moving(f"exporting {repository.place.where}", 1000) as bar:
            done = tape.export(
                repository, backups, _write, created_ns=time.time_ns(),
                progress=lambda part: bar(int(part * 1000), 1000),
            )  # fmt: skip
    if options.json:
        say(json.dumps(asdict(done)))
    else:
        say(f"{done.backups} backups, {done.chunks} chunks, {format_bytes(done.bytes)}; digest {done.digest}")


def _write(block: bytes) -> None:
    """One block to stdout by one request, as a tape drive must have it; a pipe may take it in parts."""
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(sys.stdout.fileno(), rest) :]


def import_(options: Namespace) -> int:
    """What is whole. Exit code 4 if something is not."""
    place = open_place(location_of(options))
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as source:
        found = untape.import_(place, source, secret=read_key(options))
    if options.json:
        answer_json({**asdict(found), "sound": found.sound})
        return 0 if found.sound else DAMAGED
    for id_ in found.backups:
        answer(f"backup {id_}: whole")
    for damage in found.damage:
        answer(f"backup {damage.backup}: not imported: {damage.where}: {damage.reason}")
    if not found.ended:
        say("the stream ends before its end: there were more backups, or this was cut")
    elif not found.intact:
        say(
            f"the stream is damaged: {found.lost_chunks} chunks and {format_bytes(found.lost_bytes)} are lost"
        )
    return 0 if found.sound else DAMAGED

"""Repositories as commands open them: by location, with a key; and those that were used on this machine."""

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cdpserver import durable
from cdpserver.errors import CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.names import show
from cdpserver.repository import keys
from cdpserver.repository.places import open_place
from cdpserver.repository.record import Backup
from cdpserver.repository.repository import Repository, default_cache
from recovery.repo_tree import REPO_VARIABLE

DAMAGED = 4
"""The exit code of what looked at a repository, and found damage."""


def read_key(options: Namespace) -> bytes | None:
    """The key's bytes; None if none is named. UsageError, RefusedError."""
    if options.key_file is not None:
        try:
            return keys.of_file(options.key_file)
        except RefusedError as error:
            raise UsageError(error.message, hint=error.hint) from None
    return None if options.key_command is None else keys.of_command(options.key_command)


def key_of(options: Namespace) -> tuple[str, str]:
    """Key file and key command as the service takes them; empty where there is none."""
    file, command = getattr(options, "key_file", None), getattr(options, "key_command", None)
    return str(Path(file).absolute()) if file else "", command or ""


def location_of(options: Namespace) -> str:
    """The repository that the command is about."""
    path = getattr(options, "path", None) or getattr(options, "repo", None) or os.environ.get(REPO_VARIABLE)
    if not path:
        raise UsageError("which repository?", hint=f"give --repo PATH, or set {REPO_VARIABLE}")
    return str(path)


@contextlib.contextmanager
def opened_repository(options: Namespace) -> Iterator[Repository]:
    """NotFoundError, RefusedError for a wrong key, CorruptError."""
    with opened_with_key(options) as (repository, _):
        yield repository


@contextlib.contextmanager
def opened_with_key(options: Namespace) -> Iterator[tuple[Repository, bytes | None]]:
    """The same with its key, for a process that opens it too."""
    secret = read_key(options)
    with Repository(open_place(location_of(options)), secret=secret) as repository:
        note(repository.place.where, repository.config.id.hex())
        yield repository, secret


def find_backup(repository: Repository, text: str) -> Backup:
    """By id, the beginning of one, or `latest`."""
    return repository.backup(find_id(repository, text))


def find_id(repository: Repository, text: str) -> str:
    """The same, whether it can be read or not."""
    if text == "latest":
        briefs = repository.briefs()
        if not briefs:
            raise NotFoundError(
                f"there is no backup in {repository.place.where}", hint="cdp backup run makes one"
            )
        return briefs[-1].id
    ids = repository.backup_ids()
    found = [id_ for id_ in ids if id_.startswith(text)]
    if len(found) > 1 and text not in found:
        raise UsageError(f"{len(found)} backups begin with {show(text)}", hint="write more of the id")
    return text if text in found or not found else found[0]


# -- those that were used here


def _list_path() -> Path:
    return default_cache() / "repositories.json"


def known() -> dict[str, Any]:
    """Location -> id of the repositories that were used on this machine."""
    try:
        return durable.read_json(_list_path())
    except (FileNotFoundError, CorruptError):
        return {}


def note(where: str, id_: str) -> None:
    """This one was used."""
    there = known()
    if there.get(where) != id_:
        _list_path().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        durable.write_json(_list_path(), {**there, where: id_})

"""`backup:ID` where a command takes `DISK@WHEN`: the service attaches the backup, and the command goes on with that point.

--repo or $CDP_REPO, else those that the service knows, else those that were used on this machine
"""

import os
from argparse import Namespace
from typing import Any

from cdpserver import names
from cdpserver.errors import CdpError, NotFoundError
from cdpserver.repository.places import open_place
from recovery.client import Client
from recovery.remote import client
from recovery.repo_tree import REPO_VARIABLE
from recovery.repositories import key_of, known

POINTS = ("point", "other")
"""What the options are called that take a point."""


def attach(options: Namespace) -> None:
    """Options that are backups are points on return. NotFoundError, and what registering a repository meets."""
    for option in POINTS:
        wanted = str(getattr(options, option, ""))
        if wanted.startswith(names.BACKUP):
            setattr(options, option, point_of(client(options), options, wanted))


def point_of(service: Client, options: Namespace, wanted: str) -> str:
    """The point that `backup:ID` is. NotFoundError, and what registering a repository meets."""
    path = _named(service, options)
    try:
        return str(service.attach(wanted, path)["point"])
    except NotFoundError:
        used = _used_here(names.parse_backup(wanted)[0]) if path is None else None
        if used is None:
            raise
        register(service, options, used)
        return str(service.attach(wanted, used)["point"])


def backups_of(service: Client, options: Namespace, name: str, wanted: list[str]) -> list[dict[str, Any]]:
    """The backups of a disk, VM or group, oldest first, where those that are `wanted` are: `latest`, or the beginnings of ids."""
    path = _named(service, options)
    held = service.backups(name, path)
    if path is not None:
        return held
    for text in wanted:
        if not any(text == "latest" or one["id"].startswith(text) for one in held):
            used = _used_here(text)
            if used is not None:
                register(service, options, used)
                held = service.backups(name, None)
    return held


def _named(service: Client, options: Namespace) -> str | None:
    """The repository that --repo or the environment says, which the service knows on return."""
    named = getattr(options, "repo", None) or os.environ.get(REPO_VARIABLE)
    if not named:
        return None
    path = open_place(named).where
    register(service, options, path)
    return path


def register(service: Client, options: Namespace, path: str) -> None:
    """The service knows the repository on return, and reads the key itself."""
    key = key_of(options) if hasattr(options, "repo") else ("", "")
    if not any(key) and any(one["path"] == path for one in service.repositories()):
        return
    service.add_repository(path, *key)


def _used_here(wanted: str) -> str | None:
    """The repository with the backup among those that were used on this machine; None for none or several."""
    found = []
    for path in known():
        try:
            ids = [name for name, _ in open_place(path).names("backups")]
        except CdpError:
            continue
        if any(name.startswith(f"backups/{wanted}") for name in ids):
            found.append(path)
    return found[0] if len(found) == 1 else None

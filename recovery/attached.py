"""`backup:ID` where a command takes `DISK@WHEN`: the service attaches the backup, and the command goes on with that point.

--repo or $CDP_REPO, else those that the service knows, else those that were used on this machine
"""

import os
from argparse import Namespace
from pathlib import Path

from cdpserver import names
from cdpserver.errors import CdpError, NotFoundError, UsageError
from cdpserver.repository.places import open_place
from recovery.client import Client
from recovery.remote import client
from recovery.repo_tree import REPO_VARIABLE
from recovery.repositories import known


def attach(options: Namespace) -> None:
    """`options.point` is the point that the backup is, on return. NotFoundError, and what registering a repository meets."""
    service, wanted = client(options), str(options.point)
    named = getattr(options, "repo", None) or os.environ.get(REPO_VARIABLE)
    if named:
        path = open_place(named).where
        register(service, options, path)
        options.point = service.attach(wanted, path)["point"]
        return
    try:
        options.point = service.attach(wanted, None)["point"]
    except NotFoundError:
        used = _used_here(names.parse_backup(wanted)[0])
        if used is None:
            raise
        register(service, options, used)
        options.point = service.attach(wanted, used)["point"]


def register(service: Client, options: Namespace, path: str) -> None:
    """The service knows the repository on return. A key comes from a file that it can read."""
    key_file = getattr(options, "key_file", None) if hasattr(options, "repo") else None
    if key_file is None and any(one["path"] == path for one in service.repositories()):
        return
    if getattr(options, "key_command", None):
        raise UsageError(
            "the service reads keys from files", hint=f"cdp repo add {path} --key-file FILE registers it"
        )
    service.add_repository(path, str(Path(key_file).absolute()) if key_file else "")


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

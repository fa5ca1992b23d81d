"""The repositories that a state directory knows, and disks of backups in them as something to stand on.

    repositories.json    id of a repository -> where it is, and the file that holds its key, or the command that prints it

A timeline that stands on a backup names the repository by its id, so a repository may move: it is registered anew where it is.
Keys stay in their files, and what a command prints is kept nowhere: each process that opens the repository runs it. Without this
file nothing is lost but what it says; `cdp repo add` says it again.
"""

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cdpserver import durable
from cdpserver.durable import take_str
from cdpserver.errors import CorruptError, NotFoundError, RefusedError
from cdpserver.repository import keys
from cdpserver.repository.content import Content
from cdpserver.repository.places import open_place
from cdpserver.repository.repository import Repository
from cdpserver.timeline import BackupBase

FILE = "repositories.json"


@dataclass(frozen=True, slots=True)
class Registered:
    """One repository; `key_file` and `key_command` are empty for one that is not encrypted."""

    id: str
    path: str
    key_file: str = ""
    key_command: str = ""

    @property
    def encrypted(self) -> bool:
        """Is it opened with a key?"""
        return bool(self.key_file or self.key_command)

    def read_key(self) -> bytes | None:
        """The key; None for one that is not encrypted. RefusedError if it cannot be had."""
        if self.key_command:
            return keys.of_command(self.key_command)
        return keys.of_file(self.key_file) if self.key_file else None


def load(state_dir: Path) -> dict[str, Registered]:
    """By id. CorruptError for a file that says something else."""
    path = state_dir / FILE
    return {
        id_: Registered(
            id_,
            take_str(held, "path", path),
            take_str(held, "key_file", path),
            take_str(held, "key_command", path) if "key_command" in held else "",
        )
        for id_, held in durable.read_objects(path, {"path", "key_file"}, optional={"key_command"}).items()
    }


def save(state_dir: Path, known: Mapping[str, Registered]) -> None:
    """Durable on return."""
    rows = {id_: asdict(one) for id_, one in sorted(known.items())}
    for row in rows.values():
        del row["id"]
        if not row["key_command"]:
            del row["key_command"]
    durable.write_json(state_dir / FILE, rows)


def open_registered(state_dir: Path, one: Registered) -> Repository:
    """NotFoundError, RefusedError for a wrong key or another repository in its place, CorruptError."""
    repository = Repository(open_place(one.path), secret=one.read_key(), cache=state_dir / "run")
    if repository.config.id.hex() != one.id:
        repository.close()
        raise RefusedError(
            f"{one.path} is another repository than the one that was registered",
            hint=f"cdp repo add {one.path} registers this one",
        )
    return repository


# -- standing on a backup

_open: dict[Registered, Repository] = {}
_opening: dict[str, threading.Lock] = {}
"""Of each repository one: who waits for one that hangs keeps nobody from another."""


def _kept_open(state_dir: Path, id_: str) -> Repository:
    """The repository, open for as long as this process lives: every view of a disk that stands on it reads through it."""
    one = load(state_dir).get(id_)
    if one is None:
        raise NotFoundError(
            f"the repository {id_} is not registered here", hint="cdp repo add PATH registers it"
        )
    with _opening.setdefault(id_, threading.Lock()):
        if one not in _open:
            _open[one] = open_registered(state_dir, one)
        return _open[one]


def content_of(state_dir: Path, base: BackupBase) -> Content:
    """A disk of a backup. CorruptError that names the next step, whatever keeps it from being read."""
    try:
        repository = _kept_open(state_dir, base.repository)
        disk = repository.backup(base.backup).disk(base.disk)
    except (NotFoundError, RefusedError) as error:
        raise CorruptError(f"backup {base.backup} cannot be read: {error.message}", hint=error.hint) from None
    if disk is None:
        raise CorruptError(f"backup {base.backup} has no {base.disk}", hint="cdp backup show lists its disks")
    return Content(repository, disk)

"""Which backups are locked: by an operator, or by a server that has one attached."""

import json

from cdpserver.repository.repository import Repository
from cdpserver.repository.sessions import ID_LENGTH


def locks(repository: Repository) -> dict[str, str]:
    """Id of each locked backup, and the reason. A lock that cannot be read holds."""
    found: dict[str, str] = {}
    for name, _ in repository.place.names("locks"):
        try:
            reason = str(json.loads(repository.place.get(name)).get("reason", ""))
        except (FileNotFoundError, ValueError, AttributeError):
            reason = "the lock cannot be read"
        # An operator's lock is called as the backup is; that of a server which has it attached has more behind that.
        id_ = name.removeprefix("locks/")[:ID_LENGTH]
        found[id_] = found.get(id_, "") or reason
    return found

"""The part of `client.Client` that is about repositories, and backups in them."""

from abc import ABC, abstractmethod
from typing import Any
from urllib.parse import quote


class BackupCalls(ABC):
    """What is asked; the client says how."""

    @abstractmethod
    def _object(self, method: str, path: str, **rest: Any) -> dict[str, Any]: ...

    @abstractmethod
    def _list(self, method: str, path: str, **rest: Any) -> list[dict[str, Any]]: ...

    @abstractmethod
    def _long(self, method: str, path: str, **rest: Any) -> dict[str, Any]: ...

    def repositories(self) -> list[dict[str, Any]]:
        """Those that the service knows."""
        return self._list("GET", "repositories")

    def add_repository(self, path: str, key_file: str, key_command: str) -> dict[str, Any]:
        """Register a repository; empty is no key."""
        body = {"path": path, "key_file": key_file}
        if key_command:
            body["key_command"] = key_command
        return self._object("PUT", "repositories", body=body)

    def remove_repository(self, which: str) -> dict[str, Any]:
        """Forget one, by its id or path."""
        return self._object("DELETE", f"repositories/{quote(which, safe='')}")

    def backups(self, name: str, repository: str | None) -> list[dict[str, Any]]:
        """Those of a disk, VM or group in the repositories that the service knows, or in one of them."""
        return self._list("GET", "backups", query={"name": name, "repository": repository})

    def add_source(self, vm: str, body: dict[str, Any]) -> dict[str, Any]:
        """Name a running VM that has no points here."""
        return self._object("PUT", f"backup-sources/{quote(vm, safe='')}", body=body)

    def sources(self) -> list[dict[str, Any]]:
        """Those that were named."""
        return self._list("GET", "backup-sources")

    def remove_source(self, vm: str) -> dict[str, Any]:
        """Forget one."""
        return self._object("DELETE", f"backup-sources/{quote(vm, safe='')}")

    def run_backup(self, name: str) -> dict[str, Any]:
        """The backup that a policy asks for, now."""
        return self._long("POST", "backups:run", body={"name": name})

    def attach(self, backup: str, repository: str | None) -> dict[str, Any]:
        """A backup as a point."""
        return self._object("POST", "backups:attach", body={"backup": backup, "repository": repository})

    def detach(self, backup: str) -> dict[str, Any]:
        """An attached backup is let go."""
        return self._object("POST", f"backups/{quote(backup, safe='')}:detach")

"""How QEMU comes by what it needs for NBD over TLS: a URI says where that is on QEMU's host, and QMP hands it over.

    nbds://HOST:PORT/EXPORT?tls-certificates=DIR         ca-cert.pem, client-cert.pem, client-key.pem
    nbds://NAME@HOST:PORT/EXPORT?tls-psk-file=DIR/keys.psk

as nbd_connect_uri(3) has them. QEMU reads the files itself, when the object is made; what it calls a node says nothing of them.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from cdpserver.errors import UsageError
from cdpserver.vm.qmp import Monitor, QmpRefusedError

KEYS = "keys.psk"
"""What QEMU calls the file in its directory, and no other name."""

CERTIFICATES = ("ca-cert.pem", "client-cert.pem", "client-key.pem")

PORT = 10809

USER = "qemu"
"""Whose key QEMU takes if it is not told."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A directory on QEMU's host; with `user` the key of that name in its `keys.psk`, else its certificates."""

    directory: str
    user: str | None = None

    @classmethod
    def found(cls, directory: Path, user: str | None) -> "Credential":
        """What is in a directory of this host. UsageError if that is neither."""
        if not directory.is_absolute():
            raise UsageError(f"--tls: not an absolute path: {directory}", hint="QEMU reads it as well")
        if (directory / KEYS).is_file():
            return cls(str(directory), user or USER)
        missing = [name for name in CERTIFICATES if not (directory / name).is_file()]
        if missing or user is not None:
            raise UsageError(
                f"--tls: {directory} has no {missing[0] if user is None else KEYS}",
                hint=f"it needs {KEYS}, or {', '.join(CERTIFICATES)}; docs/security.md has the commands",
            )
        return cls(str(directory))

    @classmethod
    def of(cls, uri: str) -> "Credential | None":
        """What a URI says; None of one without TLS. UsageError for TLS with nothing to show."""
        parts = urlsplit(uri)
        if parts.scheme != "nbds":
            return None
        query = parse_qs(parts.query)
        if "tls-psk-file" in query:
            file = Path(query["tls-psk-file"][0])
            return cls(str(file.parent), unquote(parts.username or USER))
        if "tls-certificates" in query:
            return cls(query["tls-certificates"][0])
        raise UsageError(
            f"NBD at {parts.hostname} takes TLS",
            hint="say where this host's certificate or key is: cdp agent NAME --tls DIR",
        )

    def added_to(self, uri: str) -> str:
        """A URI of `nbds` with this in it."""
        if self.user is None:
            return f"{uri}?tls-certificates={quote(self.directory)}"
        return uri.replace("://", f"://{quote(self.user)}@", 1) + f"?tls-psk-file={quote(self.psk_file)}"

    @property
    def psk_file(self) -> str:
        """Where the keys are."""
        return f"{self.directory}/{KEYS}"

    def as_object(self, name: str) -> dict[str, Any]:
        """The arguments of `object-add`."""
        said = {"id": name, "dir": self.directory, "endpoint": "client"}
        if self.user is not None:
            return {"qom-type": "tls-creds-psk", "username": self.user, **said}
        return {"qom-type": "tls-creds-x509", "verify-peer": True, **said}


def name_in_node(uri: str) -> str:
    """What QEMU shows as the `file` of a node that is at a URI, whether it goes by TLS or not."""
    parts = urlsplit(uri)
    if parts.scheme not in ("nbd", "nbds"):
        return unquote(uri)
    return unquote(f"nbd://{parts.hostname}:{parts.port or PORT}{parts.path}")  # of IPv6 without brackets


async def hand_over(monitor: Monitor, name: str, credential: Credential) -> None:
    """QEMU has an object of this name on return, of the files as they are now; what uses one keeps that. QmpRefusedError."""
    await take_back(monitor, name)
    await monitor.execute("object-add", credential.as_object(name))


async def take_back(monitor: Monitor, name: str) -> None:
    """QEMU has no such object on return; a node that uses it goes on."""
    with contextlib.suppress(QmpRefusedError):  # there is none
        await monitor.execute("object-del", {"id": name})

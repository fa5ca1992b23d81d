"""Where `cdp` finds the control API: the socket of the state directory, or another host's, by TLS and with a token.

    CDP_API          https://HOST:PORT; without it the socket
    CDP_API_CA       the file with the certificate of its CA; without it those that the system trusts
    CDP_TOKEN_FILE   the file with the token; without it ~/.config/cdp/token

A token is never an argument or in the environment: other users of the host could see it there.
"""

import http.client
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cdpserver.errors import NotFoundError, UnreachableError, UsageError
from cdpserver.names import show
from cdpserver.state import StateDir

MAX_TOKEN_BYTES = 200


class UnixConnection(http.client.HTTPConnection):
    """HTTP to a Unix socket."""

    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost")
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(self._path)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place. `host` is "" for the socket."""

    socket: Path
    host: str = ""
    port: int = 0
    ca: str | None = None

    @classmethod
    def chosen(cls, state: StateDir) -> "Endpoint":
        """What the environment says, else the state directory's socket. UsageError."""
        text = os.environ.get("CDP_API", "")
        if not text:
            return cls(state.api_socket)
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or port is None or parts.scheme != "https" or parts.path.strip("/") or parts.username:
            raise UsageError(f"CDP_API: {show(text)} is no API", hint="it is https://HOST:PORT")
        return cls(state.api_socket, host, port, os.environ.get("CDP_API_CA") or None)

    def __str__(self) -> str:
        return f"https://{self.host}:{self.port}" if self.host else str(self.socket)

    def connection(self, timeout_s: float | None) -> http.client.HTTPConnection:
        """A connection that is made when it is used."""
        if not self.host:
            return UnixConnection(os.fspath(self.socket), timeout_s)
        import ssl  # 15 ms, which no other command pays

        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:
            raise UsageError(
                f"CDP_API_CA: cannot read {self.ca}: {error.strerror or error}", hint="name a file in PEM"
            ) from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return http.client.HTTPSConnection(self.host, self.port, timeout=timeout_s, context=context)

    def unreachable(self, error: Exception, start: str) -> UnreachableError:
        """There was no answer; `start` says how the service of this host is started."""
        message = f"cdpserver does not answer at {self}"
        if self.host:
            hint = "check CDP_API, and that cdpserver runs there with listen_api"
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                hint = "CDP_API_CA names the CA's certificate, CDP_API the host as its own certificate does"
            return UnreachableError(f"{message}: {error}", hint=hint)
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return UnreachableError(message, hint=start)
        if isinstance(error, PermissionError):
            return UnreachableError(
                f"{message}: {error.strerror}",
                hint="run cdp as the user that cdpserver runs as, or have [roles] set up",
            )
        if isinstance(error, ConnectionError | http.client.HTTPException):
            return UnreachableError(
                f"{message}: it closed the connection", hint="look at its log, then try again"
            )
        return UnreachableError(f"{message}: {error}", hint=start)

    def headers(self) -> dict[str, str]:
        """What every request says of who asks. NotFoundError, UsageError for a file that has no token."""
        if not self.host:
            return {}
        path = Path(os.environ.get("CDP_TOKEN_FILE") or Path.home() / ".config/cdp/token")
        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read(MAX_TOKEN_BYTES + 1).strip()
        except FileNotFoundError:
            raise NotFoundError(
                f"there is no token at {path}", hint="name its file: CDP_TOKEN_FILE"
            ) from None
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}", hint="check CDP_TOKEN_FILE") from None
        if mode & 0o077:
            raise UsageError(f"{path} is open to others", hint=f"chmod 600 {path}")
        if not data or len(data) > MAX_TOKEN_BYTES or not data.isascii() or len(data.split()) != 1:
            raise UsageError(
                f"{path} has no token", hint="it holds what cdp token add printed, and nothing else"
            )
        return {"Authorization": f"Bearer {data.decode()}"}

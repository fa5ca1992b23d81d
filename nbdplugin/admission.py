"""Who may open an export: over TCP with `[tls]`, a client that came by TLS and says the secret of the disk, and nobody else.

nbdkit offers TLS to all sockets of a process alike, and its Python API tells `open` neither the socket nor whether TLS is on;
the library's own functions do, for the connection that calls.
"""

import contextlib
import ctypes
import hmac
import math
import socket
import threading
from collections import Counter
from collections.abc import Iterator

from cdpserver import sealed, timeline
from cdpserver.catalog import Catalog
from cdpserver.errors import CdpError, ForbiddenError, RefusedError
from cdpserver.names import parse_export
from cdpserver.state import StateDir

_LIBRARY = ctypes.CDLL(None)
_ADDRESS_BYTES = 128
"""Of a sockaddr_storage."""

REFUSED = "no such export, or not with this secret"
"""One answer for both: nobody learns by trying which disks there are."""


SAY_EVERY_S = 1.0
"""Between two events that say that somebody was refused: who tries many must not push all others out of the event file."""


class Admission:
    """What a process asks of its clients. `tls`: over TCP nobody is let in without."""

    def __init__(self, state: StateDir, catalog: Catalog, *, tls: bool) -> None:
        self._state = state
        self._catalog = catalog
        self._tls = tls
        self._said_at = -math.inf

    def lists(self, *, is_tls: bool) -> bool:
        """Is a client told which exports there are? Over TCP with TLS their names are of no use."""
        return not (self._tls and (is_tls or _over_tcp()))

    def is_news(self, error: CdpError, now_s: float) -> bool:
        """Is it worth an event, at this time of a clock? A refusal so soon after another is not."""
        if not isinstance(error, ForbiddenError):
            return True
        if now_s < self._said_at + SAY_EVERY_S:
            return False
        self._said_at = now_s
        return True

    def admit(self, text: str) -> str:
        """The export name that a client asked for, without its secret. ForbiddenError."""
        secret, export = sealed.unseal(text)
        strict = self._tls and _over_tcp()
        if strict and _LIBRARY.nbdkit_is_tls() != 1:
            raise ForbiddenError("a client on TCP came without TLS", hint="docs/security.md: TLS for NBD")
        if (strict or secret) and not hmac.compare_digest(secret, self._secret_of(export)):
            raise ForbiddenError(REFUSED, hint="cdp disk uri NAME and cdp uri DISK@WHEN print it")
        return export

    def _secret_of(self, export: str) -> str:
        """Of the disk that an export is of. ForbiddenError if there is none."""
        try:
            entry = self._catalog.get(parse_export(export).name)
            if entry is not None:
                uuid = timeline.load(self._state.timeline(entry.id)).uuid
                return sealed.secret_of(sealed.load_key(self._state), uuid)
        except CdpError as error:
            raise ForbiddenError(f"{REFUSED}: {error.message}", hint=error.hint) from None
        raise ForbiddenError(REFUSED, hint="cdp disk list shows the disks")


class Clients:
    """How many clients each disk has in this process: one that is opened too often takes no memory that is the others'."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()
        self._disks: dict[int, str] = {}

    @contextlib.contextmanager
    def entering(self, disk: str) -> Iterator[None]:
        """One more, if it can be opened (see `came`). RefusedError if there are so many already."""
        with self._lock:
            if self._open[disk] >= self._most:
                raise RefusedError(
                    f"{disk} has {self._most} clients already", hint="nbd_clients in the configuration"
                )
            self._open[disk] += 1
        try:
            yield
        except BaseException:
            self._less(disk)
            raise

    def came(self, handle: object, disk: str) -> None:
        """The handle that it has now."""
        self._disks[id(handle)] = disk

    def left(self, handle: object) -> None:
        """It is gone."""
        self._less(self._disks.pop(id(handle)))

    def _less(self, disk: str) -> None:
        with self._lock:
            self._open[disk] -= 1
            if not self._open[disk]:
                del self._open[disk]


def _over_tcp() -> bool:
    """Did the client of this call come over TCP? What is not known to be a Unix socket is taken for that."""
    address = ctypes.create_string_buffer(_ADDRESS_BYTES)
    length = ctypes.c_uint(_ADDRESS_BYTES)
    if _LIBRARY.nbdkit_peer_name(address, ctypes.byref(length)) != 0:
        return True
    return int.from_bytes(address.raw[:2], "little") != socket.AF_UNIX

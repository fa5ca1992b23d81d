"""The service as a controller on another host sees it: its API, by way of a socket that may be ssh's."""

import collections
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import trio

from cdpserver.errors import CdpError, UsageError
from cdpserver.vm.mirror import disk_uri
from cdpserver.vm.probe import Probe
from cdpserver.vm.target import Ago, At, SeenJob, TargetState
from cdpserver.vm.tls import Credential
from recovery.agent_client import AgentClient

MOST_EVENTS = 1000
"""So many wait for a service that does not answer; older ones are dropped."""

AT_ONCE = 16

AGAIN_S = 1.0
"""Between two attempts to learn where a disk's NBD is."""

Answer = TypeVar("Answer")


class ApiTarget:
    """Our side of the mirrors, over the API (`vm.target.Target`). `nbd` is HOST:PORT where its NBD is reached from here.

    `credential` is what it is shown, if it takes TLS.
    """

    def __init__(self, client: AgentClient, nbd: str | None, credential: Credential | None = None) -> None:
        self._client = client
        self._nbd = nbd
        self._credential = credential
        self._probes: dict[str, Probe] = {}
        self._calls = trio.CapacityLimiter(AT_ONCE)
        self._ahead_ns = 0
        """How far the server's clock is ahead of ours, by its last answer; rather too little."""
        self.events: collections.deque[dict[str, Any]] = collections.deque(maxlen=MOST_EVENTS)

    async def call(self, function: Callable[..., Answer], *arguments: Any, **more: Any) -> Answer:
        """Ask the service in a thread."""
        asked = partial(function, *arguments, **more)
        return await trio.to_thread.run_sync(asked, abandon_on_cancel=True, limiter=self._calls)

    async def identity(self, disk: str) -> tuple[str, str]:
        """See Target. The URI is of TCP, unless the service has none: then of its socket, which is on this host only."""
        found = await self.call(self._client.mirror, disk)
        return str(found["uuid"]), uri_here(found["uris"], self._nbd, self._credential)

    async def check_size(self, disk: str, size: int) -> None:
        """See Target."""
        await self.call(self._client.tell_mirror, "size", {"disk": disk, "size": size})

    async def state(self, disk: str) -> TargetState:
        """See Target."""
        found = await self.call(self._client.mirror, disk)
        self._ahead_ns = int(found["time_ns"]) - now_ns()  # it has been on its way since
        return TargetState.read(found["said"])

    async def holds(self, disk: str, place: str) -> bool:
        """See Target."""
        return bool(
            (await self.call(self._client.tell_mirror, "holds", {"disk": disk, "place": place}))["holds"]
        )

    async def synced(self, disk: str, session: int, bitmap: str = "", *, seen: SeenJob | None = None) -> None:
        """See Target."""
        said = {"disk": disk, "session": session, "bitmap": bitmap}
        # Whoever tells it by this way is an agent.
        shown = {} if seen is None else {k: v for k, v in seen.as_dict().items() if k != "by"}
        observed = {"seen": shown} if shown else {}
        await self.call(self._client.tell_mirror, "synced", said | observed)

    async def lost(self, disk: str, session: int, reason: str, *, ago: Ago) -> None:
        """See Target."""
        at = At.of(ago, now_ns=now_ns() + self._ahead_ns)
        said = {
            "disk": disk,
            "session": session,
            "reason": reason,
            "whole_ns": at.whole_ns,
            "freed_ns": at.freed_ns,
        }
        await self.call(self._client.tell_mirror, "lost", said)

    def hung_s(self, disk: str) -> float:
        """See Target: for how long its NBD has not answered here. An API that hangs holds no guest up."""
        probe = self._probes.get(disk)
        return 0.0 if probe is None else probe.hung_s()

    async def watch(self, disk: str) -> None:
        """Until cancelled: know whether its NBD answers."""
        probe = self._probes[disk] = Probe(await self._disk_uri(disk))
        try:
            await probe.run()
        finally:
            if self._probes.get(disk) is probe:  # else it is watched anew already
                del self._probes[disk]

    async def _disk_uri(self, disk: str) -> str:
        while True:
            try:
                uuid, uri = await self.identity(disk)
            except CdpError:
                await trio.sleep(AGAIN_S)  # its controller says why
            else:
                return disk_uri(uri, uuid)

    def emit(self, event: str, **fields: Any) -> None:
        """See Target: told with the next report."""
        self.events.append({"event": event, "fields": fields})


def now_ns() -> int:
    """The clock by which a controller tells what it saw when."""
    return int(trio.current_time() * 1e9)


def uri_here(uris: dict[str, str], nbd: str | None, credential: Credential | None = None) -> str:
    """Where a mirror on this host writes to. UsageError for a place that is none, and for TLS without a credential."""
    uri = uris["uri"]
    parts = urlsplit(uri)
    if nbd is not None:
        host, _, port = nbd.rpartition(":")
        if not host or not port.isdecimal():
            raise UsageError(f"not a place of NBD: {nbd}", hint="give it as HOST:PORT")
        uri = f"{'nbds' if parts.scheme == 'nbds' else 'nbd'}://{nbd}{parts.path}"
    if parts.scheme == "nbds" and credential is not None:
        uri = credential.added_to(uri)
    Credential.of(uri)  # refuses TLS with nothing to show
    return uri

"""The control API as the command line uses it: HTTP with JSON over the Unix socket `api.sock`, or by TLS (see `endpoint`).

Standard library only: every `cdp` pays for what is imported here before it does anything.
An error of the service comes back as the error that it was there: its class, its message, its hint, its exit code.
No time limit for commands: cutting a base point takes minutes, and the operator can always interrupt.
"""

import http.client
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias
from urllib.parse import quote, unquote, urlencode

from cdpserver.errors import RefusedError, UnreachableError
from cdpserver.state import StateDir
from recovery.client_backups import BackupCalls
from recovery.endpoint import Endpoint
from recovery.wire import ask, error_of

MAX_REPLY_BYTES = 1 << 30
"""Largest reply that is read: a year of points, a second each, is well below."""

MAX_LINE_BYTES = 1 << 20
"""Longest line of a stream; an event is far below."""

PIECE_BYTES = 1 << 20
"""A body is read in pieces of this size."""

Object: TypeAlias = dict[str, Any]


class Client(BackupCalls):
    """Asks the service of one state directory. A connection per call; nothing is kept open."""

    def __init__(
        self,
        state: StateDir,
        *,
        timeout_s: float | None = None,
        watch: "Watch | None" = None,
        without: "Without | None" = None,
    ) -> None:
        """`timeout_s` is for the shell's completion, which rather has nothing than waits; `watch` shows long work;
        `without` answers what is only asked for, where the service does not.
        """
        self._without = without
        self._state = state
        self._endpoint = Endpoint.chosen(state)
        self._watch = watch
        self._timeout_s = timeout_s

    # -- disks ---------------------------------------------------------------------------------------------------

    def status(self) -> Object:
        """What the service says of itself."""
        return self._object("GET", "status")

    def overview(self) -> Object:
        """The service and every disk at a glance."""
        return self._object("GET", "overview")

    def metrics(self) -> str:
        """The same for Prometheus, in its text format."""
        status, raw = self._ask("GET", "metrics")
        if status >= 300:
            try:
                raise error_of(status, json.loads(raw))
            except ValueError:
                raise self._strange(f"status {status} without JSON") from None
        return raw.decode(errors="replace")

    def add_disk(self, name: str, *, size: int, vm: str | None, base: str | None) -> Object:
        """Protect a disk of `size` bytes; `base` is the absolute path of an image."""
        body = {"name": name, "size": size, "vm": vm, "base": base}
        return self._long("POST", "disks", body={k: v for k, v in body.items() if v is not None})

    def disks(self) -> list[Object]:
        """Every disk."""
        return self._list("GET", "disks")

    def disk(self, name: str) -> Object:
        """One disk."""
        return self._object("GET", _disk(name))

    def disk_uris(self, name: str) -> Object:
        """Where a disk is written to, as it opens: `uri`, and `uri_unix` when that is not it."""
        return self._object("GET", _disk(name, "uri"))

    def resize_disk(self, name: str, *, size: int) -> Object:
        """Let a disk grow to `size` bytes."""
        return self._object("POST", _disk(name, "resize"), body={"size": size})

    def remove_disk(self, name: str) -> Object:
        """Remove a disk with its history."""
        return self._long("DELETE", _disk(name))

    def synced(self, name: str, *, session: int | None, write_blocking: bool) -> Object:
        """Say that the first copy, or a resync, is complete."""
        body: Object = {} if session is None else {"session": session}
        return self._long("POST", _disk(name, "synced"), body=body | {"write_blocking": write_blocking})

    # -- points and base points ----------------------------------------------------------------------------------

    def points(
        self, name: str, *, since: str | None, until: str | None, kind: str | None, limit: int | None
    ) -> list[Object]:
        """Points of a disk, oldest first."""
        query = {"since": since, "until": until, "kind": kind, "limit": limit}
        return self._list("GET", _disk(name, "points"), query=query)

    def vm_points(self, vm: str, **query: Any) -> list[Object]:
        """Instants at which every disk of a VM or group is good, oldest first; `since`, `until`, `kind`, `limit`."""
        return self._list("GET", f"vms/{quote(vm)}:points", query=query)

    def mark(self, name: str, bookmark: str, **how: bool) -> Object:
        """A bookmark at the newest record; `freeze` and `or_crash` for guests."""
        return self._object("POST", _disk(name, "mark"), body={"name": bookmark, **how})

    def cut(self, name: str) -> Object:
        """Cut a base point; it is published when this returns."""
        return self._long("POST", _disk(name, "cut"), body={})

    def base_points(self, name: str) -> list[Object]:
        """Published base points of a disk, oldest first."""
        return self._list("GET", _disk(name, "basepoints"))

    def place(self, point: str) -> Object:
        """Where a point is: its URIs, timeline, seq and time."""
        return self._object("GET", "uri", query={"point": point})

    def point(self, point: str) -> Object:
        """One instant of a disk, VM or group, and what its grade rests on."""
        return self._object("GET", f"points/{quote(point)}")

    def rebuild(self, name: str, number: int) -> Object:
        """Make the file of a base point anew."""
        return self._long("POST", _disk(name, "rebuild"), body={"number": number})

    def tree(self, name: str) -> Object:
        """What follows on what."""
        return self._object("GET", _disk(name, "tree"))

    def merge(self, name: str, *, verb: str, point: str, base: str | None) -> Object:
        """Delete, pull or commit a base point."""
        body = {"verb": verb, "point": point} | ({} if base is None else {"base": base})
        return self._long("POST", _disk(name, "merge"), body=body)

    # -- locks ---------------------------------------------------------------------------------------------------

    def add_lock(self, point: str, *, until: str | None, reason: str | None, immutable: bool) -> Object:
        """Lock a point."""
        body = {"point": point, "until": until, "reason": reason, "immutable": immutable}
        return self._object("POST", "locks", body={k: v for k, v in body.items() if v is not None})

    def locks(self, disk: str | None) -> list[Object]:
        """Every lock, or those of one disk."""
        return self._list("GET", "locks", query={"disk": disk})

    def remove_lock(self, which: str) -> Object:
        """Take a lock back, by its id or by DISK@WHEN."""
        return self._object("DELETE", f"locks/{quote(which)}")

    def rpo(self, name: str, query: Mapping[str, Any]) -> list[Object]:
        """What could have been lost, and when."""
        return self._list("GET", f"rpo/{quote(name)}", query=query)

    # -- groups --------------------------------------------------------------------------------------------------

    def groups(self) -> list[Object]:
        """Every group."""
        return self._list("GET", "groups")

    def group(self, name: str) -> Object:
        """One group."""
        return self._object("GET", f"groups/{quote(name)}")

    def add_group(self, name: str, members: list[str]) -> Object:
        """Make a group, or add members."""
        return self._object("PUT", f"groups/{quote(name)}", body={"members": members})

    def remove_group(self, name: str, members: list[str]) -> Object:
        """Take members out, or the group away."""
        return self._object("DELETE", f"groups/{quote(name)}", body={"members": members})

    # -- running VMs ---------------------------------------------------------------------------------------------

    def protect_vm(self, vm: str, body: Object) -> Object:
        """Protect a VM: `qmp`, or `libvirt` and `domain`; `disks` as QEMU names them, `wait`, `drive_mirror`, `agent`."""
        return self._object("PUT", f"vms/{quote(vm)}", body=body)

    def vm(self, name: str) -> Object:
        """One protected VM."""
        return self._object("GET", f"vms/{quote(name)}")

    def unprotect_vm(self, name: str) -> Object:
        """End the protection of a VM."""
        return self._object("DELETE", f"vms/{quote(name)}")

    # -- pruning -------------------------------------------------------------------------------------------------

    def prune(self, disk: str | None, *, dry_run: bool) -> list[Object]:
        """Drop what no policy keeps, or say what that would be."""
        if dry_run:
            return self._list("GET", "prune", query={"disk": disk})
        return self._list("POST", "prune", body={} if disk is None else {"disk": disk})

    # -- policies ------------------------------------------------------------------------------------------------

    def policy(self, name: str) -> Object:
        """The policy of a disk or VM."""
        return self._object("GET", f"policies/{quote(name)}")

    def set_policy(self, name: str, values: Mapping[str, str]) -> Object:
        """Change values of it."""
        return self._object("PATCH", f"policies/{quote(name)}", body=dict(values))

    def clear_policy(self, name: str) -> Object:
        """Take back what was said of the disk or VM."""
        return self._object("DELETE", f"policies/{quote(name)}")

    # -- jobs ----------------------------------------------------------------------------------------------------

    def jobs(self) -> list[Object]:
        """The jobs that are kept, oldest first."""
        return self._list("GET", "jobs")

    def job(self, number: int, *, wait: float = 0.0) -> Object:
        """One job, once it has ended or after so many seconds."""
        return self._object("GET", f"jobs/{number}", query={"wait": wait} if wait else None)

    def cancel_job(self, number: int) -> Object:
        """End a job."""
        return self._object("DELETE", f"jobs/{number}")

    def _long(self, method: str, path: str, **rest: Any) -> Object:
        """What may take long: with somebody to watch as a job that is watched until it ends."""
        if self._watch is None:
            return self._object(method, path, **rest)
        job = self._object(method, path, headers={"Prefer": "respond-async"}, **rest)
        if not str(job.get("name", "")).startswith("jobs/") or "state" not in job:
            return job
        job = self._watch(self, job)
        if job.get("error"):
            raise error_of(500, job["error"])
        if job.get("state") != "done":
            raise RefusedError(f"{job['name']} was cancelled", hint="start it again")
        return job.get("result") or {}

    # -- events --------------------------------------------------------------------------------------------------

    def events(self, query: Mapping[str, Any]) -> list[Object]:
        """The newest events, oldest of them first."""
        return self._list("GET", "events", query=query)

    def follow(self, query: Mapping[str, Any]) -> Iterator[Object]:
        """Events as they come; ends when the service stops."""
        asked = {key: value for key, value in query.items() if value is not None}
        connection = self._endpoint.connection(self._timeout_s)
        try:
            connection.request(
                "GET", f"/v1/events:stream?{urlencode(asked)}", headers=self._endpoint.headers()
            )
            reply = connection.getresponse()
            if reply.status >= 300:
                raise error_of(reply.status, json.loads(reply.read(MAX_LINE_BYTES)))
            while line := reply.readline(MAX_LINE_BYTES):
                if line.startswith(b"data: ") and len(event := json.loads(line[6:])):
                    yield event
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    # -- files ---------------------------------------------------------------------------------------------------

    def ask(self, route: str, query: Mapping[str, Any]) -> Object:
        """One answer about files."""
        return self._object("GET", route, query=query)

    def stream(
        self, route: str, query: Mapping[str, Any], remark: Callable[[list[str]], None]
    ) -> Iterator[bytes]:
        """A body, piece by piece, after the remarks in its head. UnreachableError if it ends before its end."""
        connection = self._endpoint.connection(self._timeout_s)
        try:
            connection.request("GET", f"/v1/{route}?{urlencode(query)}", headers=self._endpoint.headers())
            reply = connection.getresponse()
            if reply.status >= 300:
                raise error_of(reply.status, json.loads(reply.read(MAX_LINE_BYTES)))
            remark(list(map(unquote, reply.headers.get_all("Cdp-Remark", []))))
            while part := reply.read(PIECE_BYTES):
                yield part
            if reply.length:
                raise http.client.IncompleteRead(b"", reply.length)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    # -- forks ---------------------------------------------------------------------------------------------------

    def add_fork(self, point: str, name: str) -> Object:
        """A writable disk on top of a point."""
        return self._object("POST", "forks", body={"point": point, "name": name})

    def forks(self) -> list[Object]:
        """Every fork."""
        return self._list("GET", "forks")

    def remove_fork(self, name: str) -> Object:
        """Remove a fork with what was written to it."""
        return self._long("DELETE", f"forks/{quote(name)}")

    # -- recoveries ----------------------------------------------------------------------------------------------

    def start_recovery(self, body: Object) -> Object:
        """Make writable disks of a point, and move them home while their VM runs."""
        return self._object("POST", "recoveries", body=body)

    def recoveries(self) -> list[Object]:
        """Every recovery, oldest first."""
        return self._list("GET", "recoveries")

    def recovery(self, which: str) -> Object:
        """One recovery."""
        return self._object("GET", f"recoveries/{quote(which, safe='')}")

    def change_recovery(self, which: str, verb: str, body: Object | None = None) -> Object:
        """abort, retry, commit or undo."""
        return self._object("POST", f"recoveries/{quote(which, safe='')}:{verb}", body=body)

    # -- drills --------------------------------------------------------------------------------------------------

    def drill(self, body: Object) -> Object:
        """Boot a point isolated; what came of it."""
        return self._long("POST", "drills", body=body)

    def drills(self, name: str | None) -> list[Object]:
        """Drills, oldest first."""
        return self._list("GET", "drills", query={"name": name})

    def lend(self, point: str, *, force: bool) -> Object:
        """Forks of a point for this process."""
        return self._object("POST", "probes", body={"point": point, "pid": os.getpid(), "force": force})

    def give_back(self, probe: str) -> Object:
        """They are needed no more."""
        return self._object("DELETE", f"probes/{quote(probe, safe='')}")

    # -- HTTP ----------------------------------------------------------------------------------------------------

    def _object(self, method: str, path: str, **rest: Any) -> Object:
        value = self._call(method, path, **rest)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._strange("no object")
        return value

    def _list(self, method: str, path: str, **rest: Any) -> list[Object]:
        value = self._call(method, path, **rest)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._strange("no list of objects")
        return value

    def _call(self, method: str, path: str, **rest: Any) -> Any:
        """One request and its answer; None for an answer without a body."""
        try:
            status, raw = self._ask(method, path, **rest)
        except UnreachableError as error:
            if self._without is None or method != "GET" or self._endpoint.host:
                raise
            return self._without(error, path, rest.get("query") or {})
        try:
            value = json.loads(raw) if raw else None
        except (ValueError, RecursionError):
            raise self._strange(f"status {status} without JSON") from None
        if status >= 300:
            raise error_of(status, value)
        return value

    def _ask(
        self,
        method: str,
        path: str,
        *,
        body: Object | None = None,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """One request; status and body of its answer."""
        asked = {key: value for key, value in (query or {}).items() if value is not None}
        target = f"/v1/{path}?{urlencode(asked)}" if asked else f"/v1/{path}"
        sent = None if body is None else json.dumps(body).encode()
        said = (
            self._endpoint.headers()
            | dict(headers or {})
            | ({} if sent is None else {"Content-Type": "application/json"})
        )
        connection = self._endpoint.connection(self._timeout_s)
        try:
            reply = ask(connection, method, target, sent, said)
            raw = reply.read(MAX_REPLY_BYTES + 1)
            if reply.length and len(raw) <= MAX_REPLY_BYTES:
                raise http.client.IncompleteRead(raw, reply.length)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()
        if len(raw) > MAX_REPLY_BYTES:
            raise self._strange(f"more than {MAX_REPLY_BYTES} bytes")
        return reply.status, raw

    def _unreachable(self, error: Exception) -> UnreachableError:
        return self._endpoint.unreachable(error, f"start it: cdpserver --state-dir {self._state.path}")

    def _strange(self, what: str) -> UnreachableError:
        return UnreachableError(
            f"what answers at {self._endpoint} is no cdpserver of this version: {what}",
            hint="restart cdpserver after an upgrade",
        )


def _disk(name: str, action: str = "") -> str:
    # The one slash of VM/NAME stays a slash; nothing else in a name may mean something in a path.
    return f"disks/{quote(name, safe='/')}" + (f":{action}" if action else "")


Watch: TypeAlias = Callable[[Client, Object], Object]
"""Follows a job to its end."""

Without: TypeAlias = Callable[[UnreachableError, str, Mapping[str, Any]], Any]
"""Answers a question about a path of the API from files, or raises the error."""

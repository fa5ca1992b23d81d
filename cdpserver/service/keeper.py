"""Who keeps the listening sockets while no service runs: systemd's file descriptor store, or a holder process of our own.

Clients that connect meanwhile wait in a socket's backlog instead of being refused: QEMU's mirrors pause for a second and more
after a refusal, and not at all after a wait. `take` at the start, `put` for every socket made, `drop` for one that is not
to be waited at any longer.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import trio

from cdpserver.events import EventLog
from cdpserver.service import holder, notify
from cdpserver.service.processes import FIRST_FD, keep_files

ANSWER_S = 5.0
"""How long the holder may take; without it the service makes its sockets anew."""

SELF = "CDP_SOCKETS"
"""Environment variable in which a service that replaces its own program leaves `NAME=FD,...` to the new one."""

PAUSE_S = 1.0
"""Between attempts to have a holder."""


class Keeper(Protocol):
    """Keeps sockets by name."""

    def take(self) -> dict[str, socket.socket]:
        """Every socket that is kept, by name; it stays kept."""

    def put(self, name: str, listener: socket.socket) -> None:
        """Keep a socket, instead of another of that name."""

    def drop(self, name: str) -> None:
        """Keep it no longer."""

    def stop(self, name: str) -> None:
        """The service stops on purpose: this socket's clients are not to wait for it."""

    async def stay(self) -> None:
        """See to it, for ever, that the keeper is there."""


def choose(run: Path, *, linger_s: float, log: EventLog) -> Keeper:
    """systemd when it started this process, else a holder that outlives it by `linger_s`."""
    if os.environ.get("NOTIFY_SOCKET"):
        return SystemdStore()
    return HolderProcess(run / "holder.sock", linger_s=linger_s, log=log)


class SystemdStore:
    """The file descriptor store of a unit with FileDescriptorStoreMax= (sd_notify(3)), and its socket units."""

    def take(self) -> dict[str, socket.socket]:
        """What systemd passes at the start (sd_listen_fds(3))."""
        taken: dict[str, socket.socket] = {}
        # Once: the program that this process becomes later has other files at these numbers.
        pid, count, names = (os.environ.pop(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES"))
        if pid == str(os.getpid()):
            for number, name in zip(range(int(count or 0)), names.split(":"), strict=False):
                os.set_inheritable(FIRST_FD + number, False)
                passed = socket.socket(fileno=FIRST_FD + number)
                # Sockets of units come first, then the store: where the unit made a new one, the stored one is deaf.
                if name in taken:
                    passed.close()
                else:
                    taken[name] = passed
        return taken

    def put(self, name: str, listener: socket.socket) -> None:
        """FDSTORE=1; systemd is not to poll them: a listening socket has nothing to say."""
        self.drop(name)
        notify.notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[listener.fileno()])

    def drop(self, name: str) -> None:
        """FDSTOREREMOVE=1"""
        notify.notify("FDSTOREREMOVE=1", f"FDNAME={name}")

    def stop(self, name: str) -> None:
        """systemd knows a stop from a restart, and forgets everything at a stop."""

    async def stay(self) -> None:
        """systemd is always there."""


class HolderProcess:
    """The holder (`cdpserver.service.holder`) at the Unix socket `path`, started when nobody is there."""

    def __init__(self, path: Path, *, linger_s: float, log: EventLog) -> None:
        self._path = path
        self._linger_s = linger_s
        self._log = log
        self._connection: socket.socket | None = None
        self._kept: dict[str, socket.socket] = {}

    def take(self) -> dict[str, socket.socket]:
        """Connect, and ask. A holder that fails is a warning: the sockets are made anew."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        try:
            connection = self._connect()
            connection.settimeout(ANSWER_S)
            message = {"op": "take", "linger": self._linger_s}
            connection.send(json.dumps(message).encode())
            taken: dict[str, socket.socket] = {}
            while True:
                data, fds, _, _ = socket.recv_fds(connection, holder.MESSAGE_BYTES, 1)
                answer = json.loads(data or b'{"end": true}')
                if answer.get("end"):
                    break
                taken[answer["name"]] = socket.socket(fileno=fds[0])
                taken[answer["name"]].set_inheritable(False)
        except (OSError, ValueError) as error:
            self._log.emit("service.no-holder", level="warning", reason=str(error))
            return {}
        connection.setblocking(False)
        self._connection = connection
        return taken

    def put(self, name: str, listener: socket.socket) -> None:
        """Keep a socket."""
        self._kept[name] = listener
        self._say({"op": "put", "name": name}, [listener.fileno()])

    def drop(self, name: str) -> None:
        """Keep it no longer."""
        self._kept.pop(name, None)
        self._say({"op": "drop", "name": name}, [])

    def stop(self, name: str) -> None:
        """As `drop`: the holder cannot know whether the service comes back."""
        self.drop(name)

    def _say(self, message: dict[str, str], fds: list[int]) -> None:
        if self._connection is not None:
            try:
                socket.send_fds(self._connection, [json.dumps(message).encode()], fds)
            except OSError as error:
                # `stay` sees the end of the connection, and tells the next holder everything.
                self._log.emit("service.no-holder", level="warning", reason=str(error))

    async def stay(self) -> None:
        """Start another holder when this one ends, and give it what is kept."""
        while True:
            if self._connection is not None:
                await trio.lowlevel.wait_readable(self._connection)
                self._connection.close()
                self._connection = None
                self._log.emit("service.holder-died", level="warning")
            for extra in self.take().values():
                extra.close()
            for name, listener in list(self._kept.items()):
                self.put(name, listener)
            if self._connection is None:
                await trio.sleep(PAUSE_S)
            else:
                self._log.emit("service.holder-replaced")

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(self._path))
        except (FileNotFoundError, ConnectionRefusedError):
            self._start()
            connection.connect(str(self._path))
        return connection

    def _start(self) -> None:
        self._path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self._path))
            listener.listen(8)
            # The shell ends at once, so that the holder is nobody's child: it is to outlive whoever started it.
            command = [sys.executable, "-I", "-S", str(Path(holder.__file__)), str(listener.fileno())]
            subprocess.run(
                ["/bin/sh", "-c", '"$@" &', "sh", *command],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # whoever reads the service's output does not wait for the holder's end
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                check=True,
            )


def leave_to_self(sockets: dict[str, socket.socket]) -> None:
    """Before this process replaces its program: let the new one find these sockets."""
    keep_files()
    left = {name: listener.detach() for name, listener in sockets.items()}
    for fd in left.values():
        os.set_inheritable(fd, True)
    os.environ[SELF] = ",".join(f"{name}={fd}" for name, fd in left.items())


def left_by_self() -> dict[str, socket.socket]:
    """What `leave_to_self` left."""
    taken = {}
    for item in filter(None, os.environ.pop(SELF, "").split(",")):
        name, _, fd = item.partition("=")
        taken[name] = socket.socket(fileno=int(fd))
        taken[name].set_inheritable(False)
    return taken

"""The state directory: its layout, its version, and the lock of its one service.

Invariants: the `format` file is written first, so a directory that has one is ours, complete or not, and
making it complete can be repeated. A directory with anything else in it is never touched. Readers open no other
version than ours; the service opens older ones and brings them up to date.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cdpserver import durable
from cdpserver.errors import CdpError, CorruptError, NotFoundError, RefusedError, UsageError
from cdpserver.names import show

FORMAT = "cdp-state"
VERSION = 7
OLDEST_VERSION = 1
"""What cdpserver/upgrade.py can still bring to VERSION."""

SOCKET_PATH_LENGTH = 107
"""Bytes of a Unix socket's path without the final NUL (sun_path in unix(7))."""

LONGEST_SOCKET = "nbd/t99999999.sock"
"""The longest socket name inside; checked when the directory is made, so that no disk fails on it later."""

_TIMELINE_ID = re.compile(r"t[1-9][0-9]{0,17}")


def check_timeline_id(text: str) -> str:
    """Return `text` if it is `t` and a decimal number, so that it can stand in a path."""
    if not _TIMELINE_ID.fullmatch(text):
        raise UsageError(f"not a timeline id: {show(text)}", hint="ids are t1, t2, ...")
    return text


class ServerLock:
    """`server.lock`, held until `close` or the end of the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Let another service have the directory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "ServerLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class StateDir:
    """Where everything is; see docs/format.md, State directory."""

    path: Path

    @property
    def format(self) -> Path:
        return self.path / "format"

    @property
    def server_lock(self) -> Path:
        return self.path / "server.lock"

    @property
    def clock(self) -> Path:
        return self.path / "clock.json"

    @property
    def boots(self) -> Path:
        return self.path / "boots.json"

    @property
    def catalog(self) -> Path:
        return self.path / "catalog"

    @property
    def catalog_copy(self) -> Path:
        return self.path / "catalog.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def bases(self) -> Path:
        return self.path / "bases"

    @property
    def api_socket(self) -> Path:
        return self.path / "api.sock"

    @property
    def target_socket(self) -> Path:
        return self.path / "target.sock"

    @property
    def export_socket(self) -> Path:
        return self.path / "export.sock"

    @property
    def tokens(self) -> Path:
        return self.path / "tokens.json"

    @property
    def nbd_key(self) -> Path:
        return self.path / "nbd.key"

    @property
    def nbd(self) -> Path:
        return self.path / "nbd"

    @property
    def run(self) -> Path:
        return self.path / "run"

    def worker_socket(self, number: int) -> Path:
        """Where worker `number` takes writes."""
        return self.run / f"worker-{number}.sock"

    def worker_control(self, number: int) -> Path:
        """Where the service asks worker `number`."""
        return self.run / f"target-{number}.ctl"

    @property
    def timelines(self) -> Path:
        return self.path / "timelines"

    def timeline(self, id: str) -> Path:
        """The directory of timeline `id`; UsageError for what is no id."""
        return self.timelines / check_timeline_id(id)

    @classmethod
    def create_or_open(cls, path: str | Path) -> "StateDir":
        """The state directory at `path`, made (mode 0700) if there is none; for the service.

        It may be of an older version, or have lost its `format`: see cdpserver/upgrade.py.
        """
        state = cls(_absolute(path))
        room = SOCKET_PATH_LENGTH - 1 - len(LONGEST_SOCKET)
        if (length := len(os.fsencode(state.path))) > room:
            raise UsageError(
                f"the path of the state directory is {length} bytes, too long for Unix sockets inside it",
                hint=f"choose one of at most {room} bytes",
            )
        with _refusing("cannot use state directory", state.path):
            if not state.path.exists():
                _make_parents(state.path.parent)
                durable.make_dir(state.path, 0o700)
            if state.version() is None and not _lost_format(state):
                _claim(state)
            for directory in (state.bases, state.timelines, state.nbd, state.run):
                with contextlib.suppress(FileExistsError):
                    durable.make_dir(directory)
            if not os.access(state.path, os.W_OK | os.X_OK):
                raise RefusedError(f"state directory {state.path} is not writable", hint="run as its owner")
        return state

    @classmethod
    def open(cls, path: str | Path) -> "StateDir":
        """The state directory at `path`, which must be ours; for readers. Nothing is written."""
        state = cls(_absolute(path))
        with _refusing("cannot read state directory", state.path):
            if not state.path.exists():
                raise NotFoundError(
                    f"there is no state directory at {state.path}",
                    hint="start cdpserver, or name another with --state-dir or CDP_STATE_DIR",
                )
            version = state.version()
            if version is None and _lost_format(state):
                raise RefusedError(
                    f"state directory {state.path} has lost its format file",
                    hint="start cdpserver once: it writes it anew",
                )
            if version is None:
                raise RefusedError(
                    f"{state.path} is not a state directory of cdpserver",
                    hint="name another with --state-dir or CDP_STATE_DIR",
                )
            if version < VERSION:
                raise RefusedError(
                    f"{state.path} has format version {version}, this program needs {VERSION}",
                    hint="start cdpserver once to upgrade it",
                )
        return state

    def version(self) -> int | None:
        """The format version. None without a `format`, or with a damaged one among files that are plainly ours.

        RefusedError for a version that we cannot use.
        """
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is not a directory", hint="name a directory with --state-dir")
        try:
            found = durable.read_json(self.format)
        except FileNotFoundError:
            return None
        except CorruptError:
            if _lost_format(self):
                return None
            raise
        version = found.get("version")
        if found.get("format") != FORMAT or type(version) is not int or version < OLDEST_VERSION:
            raise RefusedError(
                f"{self.path} has a format that is not ours", hint="name another with --state-dir"
            )
        if version > VERSION:
            raise RefusedError(
                f"{self.path} has format version {version}, this cdpserver knows {VERSION}",
                hint="upgrade cdpserver",
            )
        return version

    def set_version(self, version: int) -> None:
        """Say which version the files are of; durable on return."""
        durable.write_json(self.format, {"format": FORMAT, "version": version})

    def lock(self) -> ServerLock:
        """Become the one service of this directory; RefusedError if another process is."""
        with _refusing("cannot lock state directory", self.path):
            fd = os.open(self.server_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            except BlockingIOError:
                holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
                os.close(fd)
                raise RefusedError(
                    f"another cdpserver runs (pid {holder if holder.isdecimal() else 'unknown'})",
                    hint=f"stop it, or use another state directory than {self.path}",
                ) from None
            except BaseException:
                os.close(fd)
                raise
        return ServerLock(fd)


def default_state_dir(option: str | None) -> Path:
    """The option, else $CDP_STATE_DIR, else /var/lib/cdpserver for root and the XDG state directory for
    others.
    """
    chosen = option if option is not None else os.environ.get("CDP_STATE_DIR") or None
    if chosen is not None:
        return _absolute(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/cdpserver")
    xdg = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path here is invalid and must be ignored.
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local/state") / "cdpserver"


def _absolute(path: str | Path) -> Path:
    """`path` made absolute, if the system could take it as one."""
    text = os.fspath(path)
    try:
        usable = bool(text) and "\0" not in text and bool(os.fsencode(text))
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise UsageError(f"not a path: {show(text)}", hint="name the state directory with --state-dir")
    return Path(os.path.abspath(text))


@contextlib.contextmanager
def _refusing(doing: str, path: Path) -> Iterator[None]:
    """What the system says no to becomes one line for the operator."""
    try:
        yield
    except CdpError:
        raise
    except OSError as error:
        raise RefusedError(
            f"{doing} {path}: {error.strerror}", hint="check its path, owner and mount, or choose another"
        ) from error


def _make_parents(path: Path) -> None:
    if not path.exists():
        _make_parents(path.parent)
        durable.make_dir(path)


def _lost_format(state: StateDir) -> bool:
    """Without its `format` a directory is ours all the same if it has a catalog or timelines."""
    if state.catalog_copy.exists() or (state.catalog / "data.mdb").exists():
        return True
    return any(state.timelines.glob("t*/timeline.json"))


def _claim(state: StateDir) -> None:
    """Make the empty directory ours."""
    # A fresh file system has lost+found; systemd makes our socket before it starts us; a crash of ours before `format`
    # leaves a temporary.
    names = (name for name in os.listdir(state.path) if name not in ("lost+found", state.api_socket.name))
    if any(not name.startswith(durable.TEMPORARY) for name in names):
        raise RefusedError(
            f"{state.path} is not empty and not a state directory of cdpserver",
            hint="name an empty or absent directory with --state-dir",
        )
    os.chmod(state.path, 0o700)
    state.set_version(VERSION)

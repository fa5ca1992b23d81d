"""An export under way: the `.partial` file that it is written to, and the side file that says what is done.

    FILE.partial        the image; it gets its name FILE when it is whole and durable
    FILE.partial.json   what it is of and up to where it is durable

An export to a device or an NBD server has its side file in the operator's own state directory.
"""

import errno
import fcntl
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from cdpserver import durable
from cdpserver.errors import CorruptError, RefusedError, UsageError
from cdpserver.names import show

SCHEMES = ("nbd", "nbd+unix", "nbds", "nbds+unix")


@dataclass(frozen=True, slots=True)
class Output:
    """Where an export goes: a file, a device, or a URI."""

    text: str
    kind: str

    @classmethod
    def parse(cls, text: str) -> "Output":
        """UsageError for what cannot be written."""
        if urlsplit(text).scheme in SCHEMES:
            return cls(text, "nbd")
        path = Path(text).absolute()
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        if stat.S_ISBLK(mode):
            return cls(str(path), "device")
        if not stat.S_ISREG(mode) or not path.parent.is_dir():
            raise UsageError(
                f"{show(text)} is no place for an image", hint="name a file in a directory that is there"
            )
        return cls(str(path), "file")

    @property
    def path(self) -> Path:
        """Of a file or a device."""
        return Path(self.text)

    @property
    def partial(self) -> Path:
        """The file until it is whole."""
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def side(self) -> Path:
        """The side file."""
        if self.kind == "file":
            return self.path.with_name(f"{self.path.name}.partial.json")
        name = hashlib.sha256(self.text.encode()).hexdigest()[:32]
        return state_home() / "exports" / f"{name}.json"


def state_home() -> Path:
    """Where this user's commands keep what is to outlive them."""
    xdg = os.environ.get("XDG_STATE_HOME", "")
    home = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local/state"
    return home / "cdp"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What the side file says; `copied` is the offset before which everything is durable."""

    point: str
    disk: str
    timeline: str
    seq: int
    size: int
    format: str
    sparse: bool
    output: str
    copied: int

    def is_of(self, other: "Unfinished") -> bool:
        """The same content in the same form at the same place?"""
        ignored = {"point": "", "disk": "", "copied": 0}
        return replace(self, **ignored) == replace(other, **ignored)  # type: ignore[arg-type]


def load(path: Path) -> Unfinished | None:
    """The side file; None if there is none. CorruptError."""
    try:
        value = durable.read_json(path)
    except FileNotFoundError:
        return None
    kinds = {"seq": int, "size": int, "copied": int, "sparse": bool}
    fields = Unfinished.__slots__
    if value.keys() != {*fields} or any(type(value[key]) is not kinds.get(key, str) for key in fields):
        raise CorruptError(
            f"{path} is damaged: it does not say what is exported", hint="--force begins the export anew"
        )
    return Unfinished(**value)


def save(path: Path, unfinished: Unfinished) -> None:
    """Durable on return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_whole(path, json.dumps(asdict(unfinished)).encode() + b"\n")


class Partial:
    """The file that is being written, held against another export to the same place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise RefusedError(f"{path} is a link", hint="remove it, or name another output") from None
            raise
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise RefusedError(f"another export writes {path}", hint="wait for its end") from None

    @property
    def empty(self) -> bool:
        """Was nothing ever written?"""
        return os.fstat(self._fd).st_size == 0

    def begin(self, size: int) -> None:
        """A fresh raw image of `size` bytes."""
        with durable.io_errors("write", self.path):
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, size)

    def forget_pages(self) -> None:
        """What is read from now on comes from the device."""
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Let go; of an export that was refused before it began, nothing stays."""
        if self.empty:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

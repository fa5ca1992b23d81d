"""What an installation put where, so that exactly that is taken away again.

The manifest lies in the installed tree. A file is either ours, and goes with us, or configuration, which goes only if
it is as we wrote it. Paths in it are final ones; a staging root (DESTDIR) is put in front when they are used.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.packaging.errors import InstallError

NAME = "manifest.json"
FORMAT = 1


@dataclass
class Manifest:
    """`files` are ours, and so are the `directories` that were made for them.

    `configuration` maps a file to the digest of what we wrote.
    """

    prefix: str
    state_dir: str
    version: str
    files: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    configuration: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Into a file, whole or not at all."""
        self.files = sorted(set(self.files))
        self.directories = sorted(set(self.directories))
        put(path, json.dumps(asdict(self), indent=1).encode())


def read(path: Path) -> Manifest | None:
    """The manifest of what is installed; None if nothing is."""
    try:
        value = json.loads(path.read_bytes())
        found = Manifest(**value)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise InstallError(
            f"{path} cannot be read ({error}): install again over it (move it away first), then remove"
        ) from None
    if found.format != FORMAT:
        raise InstallError(f"{path} is of another version: use the tools/install that wrote it")
    return found


def put(path: Path, content: bytes, mode: int = 0o644) -> None:
    """A file, whole or not at all; its directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    temporary.chmod(mode)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def digest(content: bytes) -> str:
    """How a configuration file is known again."""
    return hashlib.sha256(content).hexdigest()


def put_configuration(path: Path, content: bytes, written_before: str | None) -> tuple[str, str]:
    """Write `content` unless the file there was changed; (digest of what we wrote last, what to tell the operator)."""
    try:
        there = path.read_bytes()
    except FileNotFoundError:
        there = None
    beside = path.with_name(f"{path.name}.new")
    if there is None or there == content or digest(there) == written_before:
        put(path, content)
        beside.unlink(missing_ok=True)
        return digest(content), ""
    if digest(content) == written_before:
        return digest(content), f"kept {path}, which was changed"
    put(beside, content)
    return digest(content), f"kept {path}, which was changed; the new default is {beside.name} beside it"


def take_away(manifest: Manifest, root: Path) -> list[str]:
    """Remove what the manifest lists, and its directories if that leaves them empty. What stays, as sentences."""
    said = []
    for name, written in manifest.configuration.items():
        path = at(root, name)
        path.with_name(f"{path.name}.new").unlink(missing_ok=True)
        if path.exists() and digest(path.read_bytes()) != written:
            said.append(f"{path} stays: it was changed")
        else:
            path.unlink(missing_ok=True)
    for name in manifest.files:
        at(root, name).unlink(missing_ok=True)
    for name in sorted(manifest.directories, key=len, reverse=True):
        said += _remove_if_empty(at(root, name), shared="/lib/cdpserver" not in name)
    return said


def _remove_if_empty(directory: Path, *, shared: bool) -> list[str]:
    if not directory.is_dir():
        return []
    left = list(directory.iterdir())
    if directory.name == "__pycache__" and all(path.suffix == ".pyc" for path in left):
        # What Python compiled after the installation is nobody's work.
        for path in left:
            path.unlink()
        left = []
    if not left:
        directory.rmdir()
        return []
    foreign = [path for path in left if not path.is_dir()]
    return [] if shared else [f"{path} stays: it was not installed" for path in foreign]


def at(root: Path, name: str) -> Path:
    """Where a final path is under the staging root."""
    return root / name.lstrip("/")

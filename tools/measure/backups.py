"""Backups of a disk against borg (chunks of fixed size) and restic, of the same content, in the same rounds.

Ours reads a point of the journal, the others the same bytes in a raw image; compression is zstd at its quickest level for borg,
and what restic does by itself. restic encrypts always, the others not here. Each command is a process of its own, start to end.
"""

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbd

from cdpserver.durable import used_bytes
from tools.kit.processes import FailedError, until
from tools.kit.server import BIN
from tools.measure.context import MIB, Context
from tools.measure.result import Goal, Measure

OURS = "cdp backup"
FROM = (Path("/usr/bin"), Path("/usr/lib"))
USED = 0.6
"""Of the disk; the rest is zeros."""

BLOCK = 4096
CHANGED = 100
"""One block in so many."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Commands, run in a directory of the peer's own that holds `repo`."""

    name: str
    make: Sequence[str]
    save: Sequence[str]
    restore: Sequence[str]
    restored: str


def peers(image: Path) -> list[Peer]:
    """Those that are installed (Debian: borgbackup, restic)."""
    found = []
    if shutil.which("borg"):
        options = (
            "--compression",
            "zstd,1",
            "--chunker-params",
            "fixed,4194304",
            "--sparse",
            "--files-cache",
            "disabled",
        )
        found.append(
            Peer(
                "borg",
                ("borg", "init", "--encryption", "none", "repo"),
                ("borg", "create", *options, "repo::{number}", str(image)),
                ("borg", "extract", "--sparse", "../repo::{number}"),
                str(image).lstrip("/"),
            )
        )
    if shutil.which("restic"):
        found.append(
            Peer(
                "restic",
                ("restic", "-q", "-r", "repo", "init"),
                ("restic", "-q", "-r", "repo", "backup", str(image)),
                ("restic", "-q", "-r", "../repo", "restore", "latest", "--target", "."),
                str(image).lstrip("/"),
            )
        )
    return found


def backups(context: Context) -> list[Measure]:
    """Full, incremental after 1 % scattered changes, restore; what is stored, and memory."""
    size = context.sizes.backup_disk
    image = context.directory / "backup.raw"
    others = peers(image)
    missing = {"borg", "restic"} - {peer.name for peer in others}
    if missing:
        context.say(f"backup: without {', '.join(sorted(missing))}, which are not installed")
    names = [peer.name for peer in others]

    def goals(value: float, text: str) -> tuple[Goal, ...]:
        return tuple(Goal(OURS, name, value, f"{text} {name}") for name in names)

    full = Measure("backup-full", f"full backup of {size // MIB} MiB", "MB/s", "higher", goals(1.5, "1.5x"))
    more = Measure(
        "backup-incremental", "incremental of 1 % scattered changes", "s", "lower", goals(0.2, "5x")
    )
    back = Measure("backup-restore", "restore", "MB/s", "higher", goals(1.5, "1.5x"))
    stored = Measure(
        "backup-stored", "stored by the full one", "MiB", "lower", goals(1.05, "at most 1.05 of")
    )
    both = Measure("backup-stored-both", "stored by both", "MiB", "lower", goals(1.05, "at most 1.05 of"))
    memory = Measure("backup-memory", "memory of the command and its children", "MiB", "lower")
    for number in range(context.rounds):
        with context.ours.disk(size, declared=False) as name:
            _fill(context, name, image, size)
            context.ours.wait_indexed(name)
            turns = rotated([_Ours(context, name), *(_Theirs(context, peer) for peer in others)], number)
            for turn in turns:
                context.settle()
                full.add(turn.name, size / turn.save() / 1e6)
                stored.add(turn.name, turn.stored() / MIB)
            _change(context, name, image, size, number)
            for turn in turns:
                context.settle()
                more.add(turn.name, turn.save())
                both.add(turn.name, turn.stored() / MIB)
            for turn in turns:
                context.settle()
                back.add(turn.name, size / turn.restore(image) / 1e6)
                memory.add(turn.name, turn.memory / MIB)
                turn.end()
    image.unlink()
    return [full, more, back, stored, both, memory]


def rotated(turns: list["_Turn"], number: int) -> list["_Turn"]:
    """Whose turn is when in round `number`: nobody is always the first one after the disk was written."""
    first = number % len(turns)
    return turns[first:] + turns[:first]


def _fill(context: Context, name: str, image: Path, size: int) -> None:
    """This machine's own files one after the other, into the disk and the image."""
    client = nbd.NBD()
    client.connect_uri(context.ours.uri(name))
    with open(image, "wb") as raw:
        raw.truncate(size)
        for number, piece in enumerate(_pieces(int(size * USED))):
            client.pwrite(piece, number * MIB)
            os.pwrite(raw.fileno(), piece, number * MIB)
    _ended(context, client, name)


def _pieces(length: int) -> Iterator[bytes]:
    """MiB by MiB, each file on a block of its own."""
    gathered = bytearray()
    for top in FROM:
        for folder, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                path = Path(folder) / name
                if path.is_symlink() or not path.is_file():
                    continue
                gathered += path.read_bytes()
                gathered += bytes(-len(gathered) % BLOCK)
                while len(gathered) >= MIB:
                    yield bytes(gathered[:MIB])
                    del gathered[:MIB]
                    length -= MIB
                    if length < MIB:
                        return
    raise FailedError(f"there are too few files in {' and '.join(map(str, FROM))}")


def _change(context: Context, name: str, image: Path, size: int, seed: int) -> None:
    """A hundredth of the used blocks, anywhere among them, to random bytes."""
    dice = random.Random(seed)
    used = int(size * USED) // BLOCK
    client = nbd.NBD()
    client.connect_uri(context.ours.uri(name))
    with open(image, "r+b") as raw:
        for block in sorted(dice.sample(range(used), used // CHANGED)):
            data = dice.randbytes(BLOCK)
            client.pwrite(data, block * BLOCK)
            os.pwrite(raw.fileno(), data, block * BLOCK)
    _ended(context, client, name)
    context.ours.wait_indexed(name)


def _ended(context: Context, client: nbd.NBD, name: str) -> None:
    client.flush()
    client.shutdown()
    until(lambda: context.ours.client.disk(name)["clients"] == 0, "end of the writer")
    context.ours.declare(name)


class _Turn:
    """One subject in one round."""

    def __init__(self, context: Context, name: str) -> None:
        self.name = name
        self.memory = 0
        self.path = context.directory / f"backup-{name.rsplit(maxsplit=1)[-1]}"
        self.path.mkdir()
        base = {"BORG_BASE_DIR": str(self.path / "own"), "RESTIC_CACHE_DIR": str(self.path / "own")}
        self.environment = {
            **os.environ,
            **base,
            "RESTIC_PASSWORD": "x",
            "XDG_CACHE_HOME": str(self.path / "own"),
        }
        self.environment["BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"] = "yes"

    def run(self, *command: str | Path, cwd: Path | None = None) -> float:
        """Its seconds."""
        began = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd or self.path, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        watch = threading.Thread(target=self._watch, args=(process,))
        watch.start()
        said, _ = process.communicate()
        seconds = time.monotonic() - began
        watch.join()
        if process.returncode:
            raise FailedError(
                f"{command[0]} ended with {process.returncode}: {said.decode(errors='replace')[-1000:]}"
            )
        return seconds

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        """The most that the process and its children had, seen every 20 ms: rusage counts what we had before exec, too."""
        while process.poll() is None:
            self.memory = max(self.memory, sum(map(_peak, [process.pid, *_children(process.pid)])))
            time.sleep(0.02)

    def stored(self) -> int:
        """Bytes of the repository."""
        return sum(
            used_bytes(Path(folder) / name)
            for folder, _, names in os.walk(self.path / "repo")
            for name in names
        )

    def save(self) -> float:
        """Back it up; seconds."""
        raise NotImplementedError

    def restore(self, image: Path) -> float:
        """The newest one into a file, which is compared; seconds."""
        raise NotImplementedError

    def end(self) -> None:
        """Nothing is left."""
        shutil.rmtree(self.path)


class _Ours(_Turn):
    def __init__(self, context: Context, disk: str) -> None:
        super().__init__(context, OURS)
        self.cdp = (BIN / "cdp", "--state-dir", context.ours.server.path)
        self.disk = disk
        self.run(*self.cdp, "repo", "init", "repo")

    def save(self) -> float:
        return self.run(*self.cdp, "backup", "run", f"{self.disk}@latest", "--repo", "repo")

    def restore(self, image: Path) -> float:
        output = self.path / "output"
        seconds = self.run(*self.cdp, "backup", "restore", "latest", "--repo", "repo", "--output", output)
        _compare(output, image)
        return seconds


class _Theirs(_Turn):
    def __init__(self, context: Context, peer: Peer) -> None:
        super().__init__(context, peer.name)
        self.peer = peer
        self.number = 0
        self.run(*peer.make)

    def save(self) -> float:
        self.number += 1
        return self.run(*(word.format(number=self.number) for word in self.peer.save))

    def restore(self, image: Path) -> float:
        output = self.path / "output"
        output.mkdir()
        seconds = self.run(*(word.format(number=self.number) for word in self.peer.restore), cwd=output)
        _compare(output / self.peer.restored, image)
        return seconds


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _peak(pid: int) -> int:
    """Bytes; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _compare(output: Path, image: Path) -> None:
    if subprocess.run(["cmp", "-s", output, image], check=False).returncode:
        raise FailedError(f"{output} is not what was backed up")

"""`python -m tests.gated REPOSITORY CACHE VM CONTENT WAITS`: a backup in a process of its own, of disks that are computed.

CONTENT is a letter for each disk. Before it reads the disk number WAITS it says so, and goes on with its input's end.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from cdpserver.repository.place import DirectoryPlace
from cdpserver.repository.repository import Repository
from cdpserver.repository.take import back_up
from tests.backed_up import SIZE, Made

NEVER = -1


def content(letter: str, length: int = SIZE, offset: int = 0) -> bytes:
    """Of a disk."""
    return blake3(letter.encode()).digest(length=length, seek=offset)


class Gated(Made):
    """One disk."""

    def __init__(self, name: str, letter: str, *, waits: bool) -> None:
        super().__init__(SIZE)
        self.name = self.timeline = name
        self._letter, self._waits = letter, waits

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        if self._waits:
            print("it waits", flush=True)
            sys.stdin.read()
            self._waits = False
        buffer[:] = content(self._letter, len(buffer), offset)


class Process:
    """One that runs, and waits if it is to."""

    def __init__(self, path: Path, cache: str, vm: str, letters: str, waits: int) -> None:
        words = ["-m", "tests.gated", str(path / "repo"), str(path / cache), vm, letters, str(waits)]
        root = Path(__file__).parent.parent
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
        )
        if waits != NEVER:
            assert self._line() == "it waits"

    def _line(self) -> str:
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline()
        return line.strip()

    def end(self) -> str:
        """It goes on to its end; the id of its backup."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        id_ = self._line()
        assert self._process.wait() == 0
        return id_

    def kill(self) -> None:
        """Whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def at_once(path: Path, *wanted: tuple[str, str, str, int]) -> Iterator[list[Process]]:
    """(cache, VM, content, waits) of each."""
    running: list[Process] = []
    try:
        for cache, vm, letters, waits in wanted:
            running.append(Process(path, cache, vm, letters, waits))
        yield running
    finally:
        for one in running:
            one.kill()


def main() -> None:
    """One backup."""
    repo, cache, vm, letters, waits = sys.argv[1:]
    sources = [
        Gated(f"{vm}/{number}", letter, waits=number == int(waits)) for number, letter in enumerate(letters)
    ]
    with Repository(DirectoryPlace(Path(repo)), cache=Path(cache)) as repository:
        print(back_up(repository, sources, f"{vm}@seq:1").id, flush=True)


if __name__ == "__main__":
    main()

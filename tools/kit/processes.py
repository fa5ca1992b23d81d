"""Starting programs, waiting for what they announce, and ending them: each by its own pid, never by a name."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

DEADLINE_S = 60.0
"""Longest wait for anything that should happen at once; a machine that is busy with other work may be slow."""

STOP_S = 15.0
"""How long a program may take to end after SIGTERM."""

Found = TypeVar("Found")
Process = subprocess.Popen[bytes]


class FailedError(Exception):
    """Something that had to work did not; the text is for a person."""


class TooLate(FailedError):
    """Something that had to happen has not, in all the time it was given."""


def until(
    look: Callable[[], Found | None], what: str, *, seconds: float = DEADLINE_S, every_s: float = 0.02
) -> Found:
    """What `look` finds, once it finds something. TooLate names what did not come."""
    deadline = time.monotonic() + seconds
    while True:
        if found := look():
            return found
        if time.monotonic() > deadline:
            raise TooLate(f"no {what} within {seconds:.0f} s")
        time.sleep(every_s)


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """What is done here takes no longer. TooLate if it did."""
    began = time.monotonic()
    yield
    if (took := time.monotonic() - began) > seconds:
        raise TooLate(f"{what} took {took:.1f} s, more than {seconds:.0f} s")


def start(command: Sequence[str | Path], log: Path) -> Process:
    """Start a program in a process group of its own (a Ctrl-C is for us alone); what it says goes to `log`."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
        )


def stop(process: Process, seconds: float = STOP_S) -> int:
    """SIGTERM, and SIGKILL if that does not do; the exit status."""
    process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def listens(process: Process, socket: Path, log: Path) -> None:
    """Wait until a program has made its socket."""

    def there() -> bool:
        if process.poll() is not None:
            raise FailedError(f"{process.args!r} ended: {log.read_text(errors='replace')[-2000:]}")
        return socket.exists()

    until(there, f"socket {socket}")


def run(*command: str | Path, accept: Sequence[int] = (0,)) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end. FailedError with what it said unless its exit status is accepted."""
    done = subprocess.run(
        [str(part) for part in command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode not in accept:
        said = (done.stderr or done.stdout).strip()
        raise FailedError(f"{' '.join(map(str, command))}: exit status {done.returncode}: {said}")
    return done


@contextlib.contextmanager
def scratch(prefix: str, *, parent: Path | None = None, keep: bool = False) -> Iterator[Path]:
    """A directory with a short path (a Unix socket's holds 107 bytes); removed at the end unless it is to be kept."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield path
    finally:
        if not keep:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the block; the clean-up around it is not disturbed by further ones."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: int, _: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)


def why_no_mount() -> str:
    """What keeps us from mounting a file system on an NBD export; empty when nothing does."""
    if os.geteuid() != 0:
        return "not root"
    missing = [path for path in ("/dev/fuse", "/dev/loop-control") if not os.access(path, os.R_OK | os.W_OK)]
    return f"no {' and no '.join(missing)} here" if missing else ""

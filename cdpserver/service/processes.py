"""Starting a process of ours so that the next service finds it, whatever happens to this one.

A shell in front of every process writes its own line of /proc/PID/stat to `run/NAME*.pid` before it becomes the program, so
there is no instant at which a process runs unknown. A pid and a start time name one process for good: `kill_orphans` kills
exactly those that a service of this state directory started, and waits until they are gone.
Listening sockets are handed over as systemd does (sd_listen_fds(3)): file descriptors from 3 on, LISTEN_FDS and LISTEN_PID.
"""

import contextlib
import fcntl
import functools
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import trio

from cdpserver.errors import BrokenError
from cdpserver.index import store
from cdpserver.messages import READY_FD

# A full file system must not keep a target from starting: then the file is missing, and the writer's locks still
# keep a second one out.
# Who started it may have been killed before the note was there, and the next service looked in vain: then it does not run.
SHELL = (
    'read -r stat </proc/$$/stat; printf "%s\\n" "$stat" >"$1"; '
    'read -r _ _ _ parent _ </proc/$$/stat; [ "$parent" = "$2" ] || exit 1; '
    'shift 2; export LISTEN_PID=$$; exec "$@"'
)

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""

MANAGERS = ("LISTEN_", "NOTIFY_", "WATCHDOG_")
"""What a service manager says to this process is not for its children."""

SAFE_FD = 64
"""Sockets live above this here, so that putting them at 3, 4, ... of a child never overwrites one still to be put."""

ORPHAN_SECONDS = 30.0
"""A killed process that is not gone by then hangs in the kernel: on a dead disk, say."""


def wrapped(pid_file: Path, command: Sequence[str], *, parent: int | None = None) -> list[str]:
    """The command line that runs `command` behind the shell that notes its pid, as a child of `parent` (this process)."""
    return ["/bin/sh", "-c", SHELL, "sh", str(pid_file), str(parent or os.getpid()), *command]


def environment() -> dict[str, str]:
    """What our processes get: the interpreter's own directory first on PATH, since nbdkit's Python is found there."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(MANAGERS)}
    path = inherited.get("PATH", os.defpath)
    return inherited | {"PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{path}"}


def keep_for_children(listener: socket.socket) -> socket.socket:
    """The same socket at a file descriptor from which `spawn` can hand it over; the given one is closed."""
    fd = _safe(listener.fileno())
    listener.close()
    return socket.socket(fileno=fd)


def ready_pipe() -> tuple[int, int]:
    """(end to read, end for `spawn`)."""
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    safe = _safe(writing)
    os.close(writing)
    return reading, safe


def _safe(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, SAFE_FD)


def spawn(
    pid_file: Path,
    command: Sequence[str],
    sockets: Sequence[socket.socket] = (),
    *,
    ready_fd: int | None = None,
    output: Path | None = None,
    more: Mapping[str, str] | None = None,
) -> int:
    """Start `command` in a process group of its own with `sockets` to listen on; its pid.

    `ready_fd` is the end of a pipe on which it says how far it has come (`nbdplugin.serving`), `output` a file for what it
    prints, `more` its environment beyond ours.
    """
    actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    ]
    if output is not None:
        actions.append((os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        actions.append((os.POSIX_SPAWN_DUP2, 1, 2))
    for number, listener in enumerate(sockets):
        assert listener.fileno() >= SAFE_FD
        actions.append((os.POSIX_SPAWN_DUP2, listener.fileno(), FIRST_FD + number))
    variables = environment() | dict(more or {})
    if sockets:
        variables["LISTEN_FDS"] = str(len(sockets))
    if ready_fd is not None:
        assert ready_fd >= SAFE_FD
        actions.append((os.POSIX_SPAWN_DUP2, ready_fd, FIRST_FD + len(sockets)))
        variables[READY_FD] = str(FIRST_FD + len(sockets))
    with store.none_opened():
        keep_files()
        # Its own group: a Ctrl-C at the terminal is for the service, and SIGINT would turn a live mirror's writes into errors.
        return os.posix_spawn(
            "/bin/sh",
            wrapped(pid_file, command),
            variables,
            file_actions=actions,
            setpgroup=0,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE],
        )


def keep_files() -> None:
    """LMDB leaves its data files to whatever is started: it would keep dropped indexes, and their room, as long as it runs."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd >= FIRST_FD:
            with contextlib.suppress(OSError):  # that of the listing is gone
                os.set_inheritable(fd, False)


def note(pid_file: Path, pid: int) -> bool:
    """Note a child that could not note itself, if it is not noted: where the store was full. Is it?"""
    if (fd := noted(pid_file)) is not None:
        os.close(fd)
        return True
    with contextlib.suppress(OSError):
        pid_file.write_text(Path(f"/proc/{pid}/stat").read_text())
    return False


async def wait(pid: int) -> int:
    """Wait for the end of a child; its exit status, negative for a signal."""
    with _pidfd(pid) as fd:
        await trio.lowlevel.wait_readable(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # noqa: ASYNC222 (it has ended)


async def run(
    pid_file: Path, command: Sequence[str], hear: Callable[[bytes], None], *, let_end_s: float = 0
) -> "subprocess.CompletedProcess[bytes]":
    """Run `command` to its end and capture what it says; `hear` gets each line as it comes. Killed when cancelled,
    with `let_end_s` only if SIGTERM has not ended it by then.
    """
    start = functools.partial(
        trio.run_process,
        wrapped(pid_file, command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
        deliver_cancel=functools.partial(_end, let_end_s),
        env=environment(),
        process_group=0,
    )
    said, complained = bytearray(), bytearray()
    try:
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(start)
            assert process.stdout is not None
            assert process.stderr is not None
            nursery.start_soon(_keep, process.stderr, complained)
            async for part in process.stdout:
                begin = said.rfind(b"\n") + 1
                said += part
                *lines, _ = said[begin:].split(b"\n")
                for line in lines:
                    hear(bytes(line))
        assert process.returncode is not None
        return subprocess.CompletedProcess(command, process.returncode, bytes(said), bytes(complained))
    finally:
        pid_file.unlink(missing_ok=True)  # noqa: ASYNC240 (one system call)


async def _keep(stream: trio.abc.ReceiveStream, kept: bytearray) -> None:
    async for part in stream:
        kept += part


async def _end(let_end_s: float, process: trio.Process) -> None:
    if let_end_s:
        process.terminate()
        with trio.move_on_after(let_end_s):
            await process.wait()
    process.kill()


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _start_time(stat: str) -> tuple[int, str]:
    """(pid, start time) from a line of /proc/PID/stat; the name in it may hold anything, so count from its end."""
    pid, _, rest = stat.partition(" ")
    return int(pid), rest.rpartition(")")[2].split()[19]


def orphans(run_directory: Path) -> list[Path]:
    """The files of processes that a service which is gone may have left running. Ask before the first start."""
    return sorted(run_directory.glob("*.pid"))


def name_of(pid_file: Path) -> str:
    """The name under which a process was started."""
    return pid_file.name.partition(".")[0]


def new_pid_file(run_directory: Path, name: str) -> Path:
    """A file for one more process of this name: an earlier one may still run."""
    numbers = itertools.count(1)
    return next(path for n in numbers if not (path := run_directory / f"{name}.{n}.pid").exists())


def kill_orphans(pid_files: Sequence[Path]) -> list[str]:
    """Kill those that run, and wait until they are gone; their names.

    BrokenError if one doesn't go: its file descriptors could still write.
    """
    with contextlib.ExitStack() as stack:
        dying = [(file, fd) for file in pid_files if (fd := _kill_noted(file, stack)) is not None]
        deadline = time.monotonic() + ORPHAN_SECONDS
        for file, fd in dying:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise BrokenError(
                    f"process {file.read_text().split()[0]} ({name_of(file)}) of an earlier cdpserver does not end",
                    hint="look at the kernel log and the store's disk",
                )
            # Ours, when this process is what the earlier service became.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(file.read_text().split()[0]), os.WNOHANG)
    for file in pid_files:
        file.unlink(missing_ok=True)
    return [name_of(file) for file, _ in dying]


def _kill_noted(pid_file: Path, stack: contextlib.ExitStack) -> int | None:
    """Send SIGKILL; a pidfd that becomes readable when the process is gone. None when it is already."""
    fd = noted(pid_file)
    if fd is None:
        return None
    stack.callback(os.close, fd)
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return fd


def noted(pid_file: Path) -> int | None:
    """A pidfd of the process that noted itself in this file, for the caller to close; None when it is gone."""
    try:
        return same_process(*_start_time(pid_file.read_text()))
    except (ValueError, IndexError, FileNotFoundError):
        return None


def same_process(pid: int, started: str) -> int | None:
    """A pidfd of the process that had this pid and start time; None when it is gone."""
    try:
        # The pidfd first: from then on the pid cannot come to mean another process.
        fd = os.pidfd_open(pid)
    except (OverflowError, OSError):
        return None
    with contextlib.suppress(ProcessLookupError):
        if start_time(pid) == started:
            return fd
    os.close(fd)
    return None


def start_time(pid: int) -> str:
    """When a process began, in the kernel's words. ProcessLookupError if there is none."""
    try:
        return _start_time(Path(f"/proc/{pid}/stat").read_text())[1]
    except FileNotFoundError:
        raise ProcessLookupError(f"there is no process {pid}") from None


def has_ended(pidfd: int) -> bool:
    """Is the process gone, but perhaps for what its parent has not asked yet?"""
    return bool(select.select([pidfd], [], [], 0)[0])

"""`cdp mount --kernel`: a point's file system mounted by this host's kernel, as root, with its own journal replay.

    point's export -> nbdkit cow (what the kernel writes stays here) -> nbdfuse WORK/nf/nbd -> loop device -> mount -o ro DIR

The loop device is writable below the read-only mount: the kernel replays a journal into it, and refuses to mount without.

Whatever ends first, all of it is undone: by the process that serves the mount; by a second one that waits for that to end,
however it ends; and by `cdp umount`. What there is to undo is read from the kernel, so doing it twice is doing it once.
As a program, `python -m recovery.kernel_mount WORK`, it is that second process: it undoes WORK at the end of its standard input.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from cdpserver.errors import BrokenError, CdpError, RefusedError, UsageError

WORK_PREFIX = "cdp-mount-"
WORK_PARENT = Path("/run")

TYPES = {"ext": "ext4", "xfs": "xfs", "btrfs": "btrfs", "ntfs": "ntfs3", "fat": "vfat", "exfat": "exfat"}
"""What Linux calls the file systems that we know; ext4 mounts ext2 and ext3, too."""

OPTIONS = "ro,nosuid,nodev,noexec"
START_S = 20.0
LOOK_MS = 1000

RISK = (
    "the kernel of this host now reads what a guest has written: a file system that was made to harm it could take the host "
    "over; without --kernel it is read in a sandbox"
)


def check_root() -> None:
    """RefusedError for anybody else."""
    if os.geteuid() != 0:
        raise RefusedError(
            "mounting with the kernel takes root",
            hint="sudo; or leave --kernel out: cdp mount shows the same files without root",
        )


def new_work() -> Path:
    """Where the pieces of one mount will be; it is not made yet."""
    return WORK_PARENT / f"{WORK_PREFIX}{os.urandom(6).hex()}"


# --- serving


def serve(uri: str, kind: str, directory: Path, work: Path) -> None:
    """Mount, and stay until it is unmounted, a piece of it dies, or a signal says to end; then undo it."""
    check_kind(kind)
    with _watched_over(work), _ended_by_signals():
        try:
            fuse = _attach(uri, work)
            _mount(work, kind, directory)
            why = _wait(directory, fuse)
        finally:
            undo(work)
    if why:
        raise BrokenError(f"{directory}: {why}", hint="mount it again; the log of cdpserver may say more")


def check_kind(kind: str) -> None:
    """UsageError for what no kernel is asked to mount."""
    if kind not in TYPES:
        raise UsageError(
            f"this holds {kind or 'no file system that is known'}", hint=f"mounted are {', '.join(TYPES)}"
        )


@contextlib.contextmanager
def _watched_over(work: Path) -> Iterator[None]:
    """A second process stands by while this one lives."""
    watcher = subprocess.Popen(
        [sys.executable, "-m", "recovery.kernel_mount", str(work)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert watcher.stdin is not None
    try:
        yield
    finally:
        watcher.stdin.close()
        watcher.wait()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _attach(uri: str, work: Path) -> subprocess.Popen[bytes]:
    """The point as a file, WORK/nf/nbd, that can be written to. In a session of its own: it has to outlast Ctrl-C."""
    nf = work / "nf"
    nf.mkdir(parents=True, mode=0o700)
    with open(work / "log", "wb") as log:
        process = subprocess.Popen(
            [
                *("nbdfuse", "-P", str(work / "pid"), str(nf / "nbd"), "--command"),
                *("nbdkit", "-s", "--exit-with-parent", "--filter=cow", "nbd", f"uri={uri}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_S
    while not (work / "pid").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            said = (work / "log").read_text(errors="replace").strip()
            raise BrokenError(
                f"the point could not be attached: {said[-300:]}",
                hint="it needs nbdkit, nbdfuse and /dev/fuse: tools/setup",
            )
        time.sleep(0.01)
    return process


def _mount(work: Path, kind: str, directory: Path) -> None:
    """A loop device that vanishes with its mount, and the mount."""
    device = _run("losetup", "--find", "--show", str(work / "nf" / "nbd"))
    # Two points of one disk have the same UUID, which XFS looks at.
    options = OPTIONS + (",nouuid" if kind == "xfs" else "")
    try:
        _run("mount", "-t", TYPES[kind], "-o", options, "--", device, str(directory))
    finally:
        # Detached while it is in use, it goes with the mount.
        _run("losetup", "--detach", device)


def _wait(directory: Path, fuse: subprocess.Popen[bytes]) -> str:
    """Until it is unmounted ("") or cannot be read any more (why)."""
    mounts = os.open("/proc/self/mountinfo", os.O_RDONLY)
    ended = os.pidfd_open(fuse.pid)
    try:
        poll = select.poll()
        poll.register(mounts, select.POLLERR | select.POLLPRI)
        poll.register(ended, select.POLLIN)
        while os.path.ismount(directory):
            if fuse.poll() is not None:
                return "the process that reads the point ended, and it was unmounted"
            poll.poll(LOOK_MS)
    finally:
        os.close(mounts)
        os.close(ended)
    return ""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise BrokenError(
            f"{command[0]}: {said[0][-300:] if said else done.returncode}",
            hint="the kernel may not know this file system, or it is damaged: cdp mount without --kernel reads it in a sandbox",
        )
    return done.stdout.strip()


# --- undoing


def undo(work: Path) -> None:
    """Take away what is left of a mount, in the order in which it stands on each other. BrokenError if something stays."""
    loops = loops_of(work)
    for _, directory in mounts_of(loops):
        if subprocess.run(["umount", "--", directory], capture_output=True, check=False).returncode:
            # Somebody is in it: for them it ends with an error.
            subprocess.run(["umount", "--lazy", "--", directory], capture_output=True, check=False)
    for device in loops:
        subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)
    nf = work / "nf"
    if _is_mount(nf):
        subprocess.run(["umount", "--lazy", "--", str(nf)], capture_output=True, check=False)
    _end_fuse(work)
    for name in ("pid", "log"):
        (work / name).unlink(missing_ok=True)
    for path in (nf, work):
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()


def loops_of(work: Path) -> list[str]:
    """The loop devices that stand on a mount's file."""
    found = []
    for held in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):  # it went meanwhile
            if held.read_text().startswith(f"{work}/"):
                found.append(f"/dev/{held.parent.parent.name}")
    return found


def mounts_of(loops: list[str]) -> list[tuple[str, str]]:
    """(device, directory) of what is mounted from these, newest first."""
    return [(device, directory) for device, directory in _mounts() if device in loops][::-1]


def work_of(directory: Path) -> Path | None:
    """The work of the `cdp mount --kernel` that is in a directory; None if it is none."""
    for device, held in _mounts()[::-1]:
        if held == str(directory):
            with contextlib.suppress(OSError):
                backing = Path(f"/sys/block/{Path(device).name}/loop/backing_file").read_text().strip()
                work = Path(backing.removesuffix(" (deleted)")).parent.parent
                return work if work.name.startswith(WORK_PREFIX) and work.parent == WORK_PARENT else None
            return None
    return None


def unmount(directory: Path, work: Path) -> None:
    """As the operator says. RefusedError while a program is in it; on return nothing of it is left."""
    done = subprocess.run(["umount", "--", directory], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(f"{directory}: {done.stderr.strip()}", hint="leave it with all programs first")
    deadline = time.monotonic() + START_S
    while work.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    undo(work)


def _mounts() -> list[tuple[str, str]]:
    """(source, directory) of every mount, oldest first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        found.append((_name(fields[fields.index(b"-") + 2]), _name(fields[4])))
    return found


def _name(field: bytes) -> str:
    """A path as the kernel lists it: blanks and the like are octal."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), field))


def _is_mount(path: Path) -> bool:
    return any(directory == str(path) for _, directory in _mounts())


def _end_fuse(work: Path) -> None:
    """The pid is its own only if its command line says so: numbers are used again."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        pid = int((work / "pid").read_text())
        fd = os.pidfd_open(pid)
        try:
            if os.fsencode(work / "nf") in Path(f"/proc/{pid}/cmdline").read_bytes():
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                select.select([fd], [], [], START_S)
        finally:
            os.close(fd)


def main() -> None:
    """The second process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    with contextlib.suppress(CdpError):
        undo(Path(sys.argv[1]))


if __name__ == "__main__":
    main()

"""`cdp mount` and `cdp umount`: a point as a directory, by a process of its own that ends when it is unmounted."""

import contextlib
import getpass
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from cdpserver import events, names
from cdpserver.errors import BrokenError, NotFoundError, RefusedError, UnreachableError, UsageError
from cdpserver.held import HeldPoint
from cdpserver.names import Seq
from cdpserver.state import StateDir, default_state_dir
from recovery import kernel_mount
from recovery.opened import Opened, opened
from recovery.output import say
from recovery.remote import client
from recovery.together import one_disk

START_S = 30.0


def mount(options: Namespace) -> None:
    """The point is below the directory on return."""
    options.point = one_disk(options, options.point)
    directory = Path(options.directory).resolve()
    if not directory.is_dir() or os.path.ismount(directory):
        raise UsageError(f"{directory} is no directory that is free", hint="make an empty one: mkdir")
    if options.kernel:
        kernel_mount.check_root()
    elif names.split_volume(options.point)[1] is not None:
        raise UsageError("without --kernel all volumes are shown", hint="leave the volume out of the point")
    if options.foreground:
        (_serve_kernel if options.kernel else _serve)(options, directory)
        return
    command = [sys.executable, "-m", "recovery.cli"]
    command += ["--state-dir", str(default_state_dir(options.state_dir))]
    command += ["mount", "--foreground", *(["--kernel"] if options.kernel else [])]
    command += ["--", options.point, str(directory)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + START_S
        while not os.path.ismount(directory):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                log.seek(0)
                said = log.read().decode(errors="replace").strip()
                raise BrokenError(
                    f"the mount did not start: {said[-500:]}", hint="it needs /dev/fuse and fuse3"
                )
            time.sleep(0.02)
        log.seek(0)
        for line in log.read().decode(errors="replace").splitlines():
            say(line)
    say(f"{options.point} is in {directory}; to take it away: cdp umount {directory}")


def _serve(options: Namespace, directory: Path) -> None:
    from cdpserver.files.mount import PointFiles, serve

    disk, when = names.parse_point(options.point)
    state = StateDir.open(default_state_dir(options.state_dir))
    with contextlib.suppress(UnreachableError):
        when = Seq(int(client(options).place(options.point)["seq"]))
    with contextlib.closing(HeldPoint(state, disk, when)) as held:
        log = events.EventLog(state.events)

        def failed(path: str, reason: str) -> None:
            log.emit("mount.failed", level="warning", point=held.name, path=path, reason=reason)

        with contextlib.closing(PointFiles(held.view, failed)) as files:
            for remark in files.remarks:
                say(f"{held.name}: {remark}")
            serve(files, str(directory), held.name)


def _serve_kernel(options: Namespace, directory: Path) -> None:
    text, volume = names.split_volume(options.point)
    with opened(options, text) as point:
        where = f"{point.disk}@seq:{point.seq}"
        volume, kind = _what_to_mount(options, point, volume)
        kernel_mount.check_kind(kind)
        uri = point.uri.replace("?", f"/{volume}?", 1) if volume else point.uri
        say(kernel_mount.RISK)
        events.EventLog(StateDir(default_state_dir(options.state_dir)).events).record(
            "mount.kernel",
            user=getpass.getuser(),
            sudo_user=os.environ.get("SUDO_USER"),
            disk=point.disk,
            point=where,
            volume=volume,
            directory=str(directory),
        )
        kernel_mount.serve(uri, kind, directory, kernel_mount.new_work())


def _what_to_mount(options: Namespace, point: Opened, volume: str | None) -> tuple[str, str]:
    """(volume, what it holds), looked at in the sandbox."""
    from cdpserver.files.browser import Browser

    state = StateDir.open(default_state_dir(options.state_dir))
    with (
        contextlib.closing(HeldPoint(state, point.disk, Seq(point.seq))) as held,
        Browser(held.view) as browser,
    ):
        chosen = browser.choose(volume)
        holds = {known.name: known.holds for known in browser.volumes()}
    if chosen not in holds:
        known = ", ".join(filter(None, holds)) or "none"
        raise NotFoundError(f"the disk has no {chosen}", hint=f"its volumes: {known}")
    return chosen, holds[chosen]


def umount(options: Namespace) -> None:
    """Take it away. RefusedError while a program is in it."""
    directory = Path(options.directory).absolute()
    work = kernel_mount.work_of(directory.resolve())
    if work is not None:
        kernel_mount.unmount(directory.resolve(), work)
        return
    done = subprocess.run(["fusermount3", "-u", directory], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(f"{directory}: {done.stderr.strip()}", hint="leave it with all programs first")

"""`cdp mount` and `cdp umount`: a point as a directory, by a process of its own that ends when it is unmounted."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from cdpserver import events, names
from cdpserver.errors import BrokenError, RefusedError, UnreachableError, UsageError
from cdpserver.held import HeldPoint
from cdpserver.names import Seq
from cdpserver.state import StateDir, default_state_dir
from recovery.output import say
from recovery.remote import client

START_S = 30.0


def mount(options: Namespace) -> None:
    """The point is below the directory on return."""
    directory = Path(options.directory).resolve()
    if not directory.is_dir() or os.path.ismount(directory):
        raise UsageError(f"{directory} is no directory that is free", hint="make an empty one: mkdir")
    if options.foreground:
        _serve(options, directory)
        return
    command = [sys.executable, "-m", "recovery.cli"]
    command += ["--state-dir", str(default_state_dir(options.state_dir))]
    command += ["mount", "--foreground", "--", options.point, str(directory)]
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
            serve(files, str(directory), held.name)


def umount(options: Namespace) -> None:
    """Take it away. RefusedError while a program is in it."""
    directory = Path(options.directory).absolute()
    done = subprocess.run(["fusermount3", "-u", directory], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(f"{directory}: {done.stderr.strip()}", hint="leave it with all programs first")

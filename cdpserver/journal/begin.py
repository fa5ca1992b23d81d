"""How a timeline's history begins, and who may write it."""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from cdpserver import durable
from cdpserver.errors import RefusedError
from cdpserver.journal import control
from cdpserver.journal.control import State
from cdpserver.journal.log import interval_path
from cdpserver.journal.record import Kind, payload_digest
from cdpserver.journal.segment import Header, SegmentWriter

WRITER_GONE_S = 2.0
"""How long a writer may take to go that has been killed; it goes in milliseconds."""


def lock_timeline(directory: Path, *, patience_s: float = WRITER_GONE_S) -> int:
    """Take the writer lock; RefusedError while another process holds it and does not let go."""
    fd = os.open(directory / "writer.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError as error:
            if time.monotonic() < deadline:
                time.sleep(0.005)
                continue
            os.close(fd)
            raise RefusedError(
                f"another process writes to {directory.name}",
                hint="stop it; there is one writer per timeline",
            ) from error
        except BaseException:
            os.close(fd)
            raise


def start_history(
    directory: Path, *, uuid: bytes, boot_id: str, now_ns: int, mode: str, session: int = 0
) -> None:
    """Create interval 1, segment 1 with the `begin` record; the history starts here.

    Durable on return, except the base image that it stands on. Appears whole: before the log is renamed into place
    the timeline is still in its first copy.
    """
    interval = interval_path(directory, 1)
    interval.mkdir(exist_ok=True)
    payload = control.encode(control.begin(mode, session))
    header = Header(uuid, 1, 1, 1, now_ns, boot_id, State())
    # Written under a name that no reader looks for, with its first record in it, then renamed.
    staging = interval / ".tmp-begin"
    staging.mkdir(exist_ok=True)
    with contextlib.closing(SegmentWriter.create(staging, header)) as segment:
        place = segment.append_payload(payload)
        segment.put(Kind.CONTROL, 0, 1, now_ns, len(payload), place, payload_digest(payload))
        segment.sync()
    os.rename(staging / "00000001.data", interval / "00000001.data")
    os.rename(staging / "00000001.log", interval / "00000001.log")
    staging.rmdir()
    for path in (interval, interval.parent):
        durable.fsync_dir(path)

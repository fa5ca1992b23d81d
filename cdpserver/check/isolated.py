"""Runs the check of indexes in a process of its own: LMDB may crash on damaged pages rather than fail.

A process is given the intervals in turn, and the merged indexes, each when the one before is done. Where a signal ends it, that
interval's index is the finding, and another one goes on after it.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from cdpserver.check.damage import Finding
from cdpserver.check.index import REBUILD, check_interval, start_of
from cdpserver.check.merged import check_merged
from cdpserver.errors import BrokenError
from cdpserver.index.merged import DIRECTORY
from cdpserver.index.store import find_index
from cdpserver.journal.log import interval_path, segments

MERGED = 0
"""Stands in the place of an interval for the merged indexes."""

ROOT = Path(__file__).resolve().parent.parent.parent


def check_indexes(
    directory: Path, numbers: Iterable[int], unsure: Collection[int], boot_id: str
) -> Iterator[tuple[int, list[Finding]]]:
    """Each interval with its findings, in turn; MERGED stands for the merged indexes. Runs a process; it ends with the iterator.

    A number is asked for when all before it are done. Of the intervals `unsure` not every record is known, so only what the
    others say is held against their index. BrokenError if the process cannot be run; what it raised is raised here.
    """
    worker = None
    try:
        for number in numbers:
            if worker is None:
                worker = _start(directory, boot_id)
            found = _ask(worker, f"{number}?" if number in unsure else str(number))
            if found is not None:
                yield number, found
                continue
            status, worker = _end(worker), None
            if status >= 0:
                raise BrokenError(
                    f"the process that checks indexes ended with status {status}", hint="try again"
                )
            yield number, [_crashed(directory, number, boot_id, signal.Signals(-status).name)]
    finally:
        if worker is not None:
            worker.kill()
            _end(worker)


def _ask(worker: "subprocess.Popen[bytes]", number: str) -> list[Finding] | None:
    """What a process says of an interval; None if it has ended."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(f"{number}\n".encode())
        worker.stdin.flush()
        found: list[Finding] | Exception = pickle.load(worker.stdout)
    except (EOFError, pickle.UnpicklingError, BrokenPipeError):
        return None
    if isinstance(found, Exception):
        raise found
    return found


def _end(worker: "subprocess.Popen[bytes]") -> int:
    """The status of a process that ends, or has."""
    status = worker.wait()
    worker.communicate()
    return status


def _start(directory: Path, boot_id: str) -> "subprocess.Popen[bytes]":
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "cdpserver.check.isolated", str(directory), boot_id],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C at a terminal is for us, who then end it
    )


def _crashed(directory: Path, interval: int, boot_id: str, name: str) -> Finding:
    if interval == MERGED:
        what = f"a merged index is damaged: reading it ends a process with {name}"
        return Finding(what, directory / DIRECTORY, 0, 0, hint=REBUILD)
    path = interval_path(directory, interval)
    index = find_index(path, boot_id) or path
    first_seq, first_time_ns = start_of(path, segments(directory, interval))
    what = f"the index of interval {interval} is damaged: reading it ends a process with {name}"
    return Finding(what, index, first_seq, first_time_ns, hint=REBUILD)


def main() -> None:
    """`python -m cdpserver.check.isolated DIRECTORY BOOT_ID`: lines NUMBER or NUMBER? on stdin, findings on stdout, pickled."""
    directory, boot_id = Path(sys.argv[1]), sys.argv[2]
    for number in map(str.strip, iter(sys.stdin.readline, "")):
        found: list[Finding] | Exception
        interval = int(number.rstrip("?"))
        try:
            if interval == MERGED:
                found = check_merged(directory)
            else:
                found = check_interval(directory, interval, boot_id, whole=not number.endswith("?"))
        except Exception as error:  # noqa: BLE001 - the process's rim: raised again on the other side
            found = error
        pickle.dump(found, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

"""Runs the check of indexes in a process of its own: LMDB may crash on damaged pages rather than fail.

A process goes through the intervals in turn, and the merged indexes. Where a signal ends it, that interval's index is the
finding, and another one goes on after it.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
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
    directory: Path, numbers: Sequence[int], unsure: Collection[int], boot_id: str
) -> Iterator[list[Finding]]:
    """The findings of each interval in turn; MERGED stands for the merged indexes. Runs a process; it ends with the iterator.

    Of the intervals `unsure` not every record is known, so only what the others say is held against their index.
    BrokenError if the process cannot be run; what it raised is raised here.
    """
    left = list(numbers)
    while left:
        worker = _start(directory, left, unsure, boot_id)
        assert worker.stdout is not None
        try:
            while left:
                found = pickle.load(worker.stdout)
                if isinstance(found, Exception):
                    raise found
                yield found
                left.pop(0)
        except (EOFError, pickle.UnpicklingError):
            status = worker.wait()
            if status >= 0:
                raise BrokenError(
                    f"the process that checks indexes ended with status {status}", hint="try again"
                ) from None
            yield [_crashed(directory, left.pop(0), boot_id, signal.Signals(-status).name)]
        finally:
            worker.kill()
            worker.communicate()


def _start(
    directory: Path, numbers: Sequence[int], unsure: Collection[int], boot_id: str
) -> "subprocess.Popen[bytes]":
    arguments = [
        str(directory),
        boot_id,
        *(f"{number}?" if number in unsure else str(number) for number in numbers),
    ]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "cdpserver.check.isolated", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
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
    """`python -m cdpserver.check.isolated DIRECTORY BOOT_ID NUMBER[?]...`: the findings on stdout, pickled."""
    directory, boot_id = Path(sys.argv[1]), sys.argv[2]
    for number in sys.argv[3:]:
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

"""The commands that work on the files themselves, whether the service runs or not: show, rebuild."""

import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from cdpserver.catalog import Catalog
from cdpserver.clock import boot_id
from cdpserver.errors import CdpError, CorruptError, NotFoundError, RemovedError
from cdpserver.names import show
from cdpserver.state import StateDir, default_state_dir
from recovery.output import answer, answer_json, answer_json_items

LOCK_SECONDS = 10.0
"""How long a rebuild waits for the indexer to let go of the timeline; it holds it for one batch."""


def timeline_of(state: StateDir, disk: str) -> str:
    """The id of the disk's timeline."""
    with Catalog.open(state, writable=False) as catalog:
        return id_in(catalog, disk)


def id_in(catalog: Catalog, disk: str) -> str:
    """The id of a disk's timeline, of a catalog that is open."""
    entry = catalog.get(disk)
    if entry is None:
        raise NotFoundError(f"there is no disk {show(disk)}", hint="list the disks: cdp disk list")
    if entry.state != "live":
        raise RemovedError(f"{disk} is being removed", hint="cdp disk list shows when it is gone")
    return entry.id


# --- segment show


def segment_show(options: Namespace) -> None:
    """A segment as text. CorruptError at the end if any of it is damaged."""
    from recovery.segment_text import SegmentText
    from recovery.segment_text import show as show_segment

    segment = SegmentText(Path(options.path))
    with contextlib.closing(segment):
        write = answer_json_items if options.json else _answer_lines
        damaged = show_segment(segment, verify=options.verify, as_json=options.json, write=write)
        if segment.damage or damaged:
            said = [segment.damage] if segment.damage else []
            said += (
                [f"{damaged} records are damaged" if damaged > 1 else "a record is damaged"]
                if damaged
                else []
            )
            raise CorruptError(
                f"{segment.path}: {'; '.join(said)}", hint="cdp check DISK says what that touches"
            )


def _answer_lines(lines: Iterator[str]) -> None:
    for line in lines:
        answer(line)


# --- index rebuild


def index_rebuild(options: Namespace) -> None:
    """Make the index of a disk anew."""
    state = StateDir.open(default_state_dir(options.state_dir))
    directory = state.timeline(timeline_of(state, options.disk))
    started = time.monotonic()
    with busy(f"indexing {options.disk}"):
        records = rebuild_index(directory)
    seconds = time.monotonic() - started
    rate = round(records / seconds) if seconds else 0
    if options.json:
        answer_json(
            {"disk": options.disk, "records": records, "seconds": round(seconds, 3), "per_second": rate}
        )
    else:
        answer(f"{options.disk}: {records:,} records indexed in {seconds:.2f} s ({rate:,} a second)")


def rebuild_index(directory: Path) -> int:
    from cdpserver.index.indexer import rebuild

    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return rebuild(directory, boot_id())
        except CorruptError:
            raise
        except CdpError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


@contextlib.contextmanager
def busy(doing: str) -> Iterator[None]:
    """Show on a terminal that something is going on."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(doing)):
        yield

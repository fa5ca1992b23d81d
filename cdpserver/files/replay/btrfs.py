"""Btrfs: always whole as of its last commit; what was fsynced since lies in a log tree, which is said and not replayed.

Layout: https://btrfs.readthedocs.io/en/latest/dev/On-disk-format.html
"""

import struct
from datetime import UTC, datetime

from dissect.btrfs.btrfs import Btrfs

from cdpserver.files.replay.overlay import exactly
from cdpserver.files.replay.remarks import MOUNT, Replayed
from cdpserver.files.source import Reader, Stream

SUPERBLOCK_AT = 64 << 10
MAGIC_AT = SUPERBLOCK_AT + 64
MAGIC = b"_BHRfS_M"
GENERATION = 72
"""Followed by the places of three trees; the third is the log's, 0 for none."""
COMMIT_INTERVAL_S = 30
"""Btrfs's own, unless it is mounted with `commit=`."""


def remark_btrfs(reader: Reader) -> Replayed:
    """Says that there is a log tree, and when the last commit was."""
    generation, _, _, log = struct.unpack("<4Q", exactly(reader, SUPERBLOCK_AT + GENERATION, 32))
    if not log:
        return Replayed(reader)
    return Replayed(
        reader,
        (
            f"this is its last commit ({generation}{last_commit(reader)}), as a rule at most {COMMIT_INTERVAL_S} s before "
            f"this instant; what was fsynced since is not read: {MOUNT}",
        ),
    )


def last_commit(reader: Reader) -> str:
    """When the default subvolume was last changed, as `, TIME`; "" where that cannot be read."""
    try:
        root = Btrfs(Stream(reader))._open_default_subvolume().tree.root_item
        when = datetime.fromtimestamp(root.ctime.sec, UTC)
    except Exception:  # noqa: BLE001 - a parser's exceptions are its own; whoever opens the file system says what is wrong
        return ""
    return f", {when:%Y-%m-%dT%H:%M:%SZ}"

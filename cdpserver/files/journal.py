"""The journal of a file system: what a crash-consistent point says of it, before it is read.

A file system that was in use when the point was taken has changes in its journal that are not in their places yet. The reader
that comes back reads as if they were, and its `places` leave out what only the journal has: content there comes through the
worker.
"""

import struct

from cdpserver.files.source import Reader

NEEDS_RECOVERY = 0x4
"""Of ext4: s_feature_incompat."""

LOG_ROOT = 65536 + 96
"""Of Btrfs: where its superblock names the log tree; 0 for none."""

OLDER = (
    "it was in use at this instant, and changes in its journal are not read: files may be missing or older"
)


def journal_replayed(reader: Reader, holds: str) -> tuple[Reader, list[str]]:
    """The same volume with its journal replayed, and remarks for the operator's screen."""
    if holds == "ext" and struct.unpack_from("<I", reader.read(1024, 1024), 96)[0] & NEEDS_RECOVERY:
        return reader, [OLDER]
    if holds == "xfs":
        return reader, ["if it was in use at this instant, what its log holds is not read: it may look older"]
    if holds == "btrfs" and any(reader.read(LOG_ROOT, 8)):
        return reader, ["it was in use at this instant: what was fsynced since its last commit is not read"]
    if holds == "ntfs":
        return reader, ["changes of the last seconds before the instant may be missing"]
    return reader, []

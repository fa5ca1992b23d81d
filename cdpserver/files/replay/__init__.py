"""File systems that were in use read as after their journal's replay: in memory, and nothing is written."""

import struct

from cdpserver.errors import CorruptError
from cdpserver.files.replay import btrfs, ntfs, xfs
from cdpserver.files.replay.ext import EXT_MAGIC, MAGIC_AT
from cdpserver.files.replay.ext4 import replay_ext
from cdpserver.files.replay.overlay import NotReplayedError
from cdpserver.files.replay.remarks import Replayed, not_replayed
from cdpserver.files.source import Reader

__all__ = ["Replayed", "journal_replayed"]

KINDS = (
    (ntfs.MAGIC_AT, ntfs.MAGIC, ntfs.remark_ntfs),
    (0, xfs.MAGIC, xfs.replay_xfs),
    (MAGIC_AT, EXT_MAGIC, replay_ext),
    (btrfs.MAGIC_AT, btrfs.MAGIC, btrfs.remark_btrfs),
)
"""Where a file system's magic is, and who knows its journal."""


def journal_replayed(reader: Reader) -> Replayed:
    """A volume with its journal replayed. A journal that can't be is left alone, and the remarks say why."""
    for offset, magic, replay in KINDS:
        if reader.read(offset, len(magic)) != magic:
            continue
        try:
            return replay(reader)
        except (CorruptError, NotReplayedError) as error:
            return not_replayed(reader, error.message)
        except struct.error:
            return not_replayed(reader, "it ends in the middle of a structure")
    return Replayed(reader)

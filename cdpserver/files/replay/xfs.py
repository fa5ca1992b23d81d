"""XFS: its log is not replayed, and that is said."""

from cdpserver.files.replay.remarks import MOUNT, Replayed
from cdpserver.files.source import Reader

MAGIC = b"XFSB"


def remark_xfs(reader: Reader) -> Replayed:
    """Whether it was in use isn't looked at."""
    return Replayed(
        reader,
        (f"if it was in use at this instant, what its log holds is not read: it may look older: {MOUNT}",),
    )

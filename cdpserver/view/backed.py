"""Where bytes of a disk are that stands on a backup."""

from pathlib import Path

from cdpserver.names import BACKUP
from cdpserver.repository.content import Content
from cdpserver.repository.registered import content_of
from cdpserver.timeline import BackupBase
from cdpserver.view.extent import Extent, Files


def backed_up(
    files: Files, state_dir: Path, base: BackupBase, offset: int, end: int, *, holes: bool
) -> list[Extent]:
    """Extents of [offset, end), read through `files.readers`. The disk may have grown since: beyond the backup are zeros."""
    name = f"{BACKUP}{base.backup}/{base.disk}"
    content = files.readers.get(name)
    if not isinstance(content, Content):
        content = files.readers[name] = content_of(state_dir, base)
    stop = max(offset, min(end, content.size))
    extents: list[Extent] = []
    if offset < stop:
        runs = content.status(offset, stop, one=False) if holes else [(offset, stop, False)]
        extents = [(low, high, None if zero else name, low) for low, high, zero in runs]
    if stop < end:
        extents.append((stop, end, None, 0))
    return extents

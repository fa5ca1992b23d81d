"""NTFS: whether its journal ($LogFile) was closed; it isn't replayed, and that is said.

    boot sector -> $MFT -> record 2, $LogFile -> two restart pages, the one with the larger LSN counts

Layout: https://flatcap.github.io/linux-ntfs/ntfs/files/logfile.html
"""

import struct

from cdpserver.errors import CorruptError
from cdpserver.files.replay.overlay import exactly
from cdpserver.files.replay.remarks import MOUNT, Replayed
from cdpserver.files.source import Reader

MAGIC_AT = 3
MAGIC = b"NTFS    "
LOGFILE_RECORD = 2
DATA = 0x80
END = 0xFFFFFFFF
PAGE = 4096
NO_CLIENT = 0xFFFF
VOLUME_IS_CLEAN = 0x2


def remark_ntfs(reader: Reader) -> Replayed:
    """Says that the journal is open. CorruptError if it cannot be found."""
    pages = [exactly(reader, place, PAGE) for place in restart_pages(reader)]
    areas = [area for page in pages if (area := _restart_area(page)) is not None]
    if not areas or _is_closed(max(areas, key=_lsn)):
        return Replayed(reader)
    return Replayed(
        reader,
        (
            "it was in use at this instant, and its journal is not replayed: what changed in the last seconds may be missing "
            f"or damaged: {MOUNT}, where the kernel knows NTFS",
        ),
    )


def restart_pages(reader: Reader) -> tuple[int, int]:
    """Where the two restart pages of $LogFile are, in bytes."""
    boot = exactly(reader, 0, 512)
    sector, per_cluster = struct.unpack_from("<HB", boot, 11)
    # 2 to the power of what is missing to 256, where clusters are larger than 64 KiB.
    cluster = sector * per_cluster if per_cluster <= 128 else sector << (256 - per_cluster)
    (table,) = struct.unpack_from("<Q", boot, 48)
    (clusters,) = struct.unpack_from("<b", boot, 64)
    size = clusters * cluster if clusters > 0 else 1 << -clusters
    if (
        sector not in (256, 512, 1024, 2048, 4096)
        or not 512 <= size <= 1 << 16
        or not 512 <= cluster <= 2 << 20
    ):
        raise CorruptError("the sizes in the boot sector cannot be")
    first = _first_cluster(exactly(reader, table * cluster + LOGFILE_RECORD * size, size)) * cluster
    return first, first + PAGE


def _first_cluster(record: bytes) -> int:
    """Of the unnamed stream of a file; read without its fixups, which are in the last bytes of sectors."""
    (offset,) = struct.unpack_from("<H", record, 20)
    while record[:4] == b"FILE" and offset + 64 <= len(record):
        kind, length, resident, name = struct.unpack_from("<IIBB", record, offset)
        if kind == END or length < 24 or offset + length > len(record):
            break
        if kind == DATA and resident and not name:
            (runs,) = struct.unpack_from("<H", record, offset + 32)
            if runs >= length:
                break
            at = offset + runs + 1
            counted, placed = record[at - 1] & 15, record[at - 1] >> 4
            return int.from_bytes(record[at + counted : at + counted + placed], "little")
        offset += length
    raise CorruptError("$LogFile cannot be found")


def _restart_area(page: bytes) -> bytes | None:
    """What says how the journal was left; None where there is nothing (a journal that is all ones was reset)."""
    (start,) = struct.unpack_from("<H", page, 24)
    if page[:4] != b"RSTR" or start + 16 > len(page):
        return None
    return page[start : start + 16]


def _lsn(area: bytes) -> int:
    return int.from_bytes(area[:8], "little")


def _is_closed(area: bytes) -> bool:
    in_use, flags = struct.unpack_from("<HH", area, 12)
    return in_use == NO_CLIENT or bool(flags & VOLUME_IS_CLEAN)

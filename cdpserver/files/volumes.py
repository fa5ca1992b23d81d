"""The volumes of a disk: the whole disk, its partitions (GPT, MBR), and the logical volumes (LVM2) on them.

A volume is named `pN` (the number that Linux gives the partition) or `lv/VG/LV`; a disk without partitions is one volume,
named "". Tables and metadata are parsed by dissect; where logical volumes lie is worked out here, since dissect.volume puts
stripes one after the other, and does not follow LVM's metadata around the end of its ring.
Encrypted volumes are recognised, and only that.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dissect.volume.disk.disk import Disk
from dissect.volume.disk.schemes import GPT
from dissect.volume.exceptions import Error as VolumeError
from dissect.volume.lvm.physical import LVM2Device, parse_metadata

from cdpserver.errors import RefusedError
from cdpserver.files.source import Join, Part, Reader, Stream, Stripes

SECTOR = 512
MAX_PARTITIONS = 1024
MAX_METADATA = 8 << 20
"""Bytes of LVM metadata that are read; its areas are of 1 MiB."""

FORK = "attach the disk to a VM: cdp fork add"

_EXTENDED = (0x05, 0x0F, 0x85)

_MAGICS = (
    (0, b"LUKS\xba\xbe", "luks"),
    (3, b"-FVE-FS-", "bitlocker"),
    (4086, b"SWAPSPACE2", "swap"),
    (4086, b"SWAP-SPACE", "swap"),
    (32769, b"CD001", "iso9660"),
    (0, b"hsqs", "squashfs"),
    (1024, b"\x10\x20\xf5\xf2", "f2fs"),
    (0, b"\x88\x16\x88\x58", "bcache"),
)
_BITLOCKER_TO_GO = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")
"""The identifier of BitLocker To Go, whose boot sector looks like FAT."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A part of the disk. `holds` is what it holds: the kind of a file system, `lvm`, `luks`, or "" for nothing known."""

    name: str
    reader: Reader
    holds: str
    note: str = ""


def find_volumes(disk: Reader) -> list[Volume]:
    """All volumes, in the order of their numbers and names; those of physical volumes behind the partitions."""
    found = list(_partitions(disk)) or [Volume("", disk, recognise(disk))]
    return found + list(_logical(found))


def recognise(reader: Reader) -> str:
    """What begins here."""
    head = reader.read(0, 64 << 10)
    for offset, magic, kind in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return kind
    if any(head[at : at + 8] == b"LABELONE" for at in range(0, 4 * SECTOR, SECTOR)):
        return "lvm"
    if head[1080:1082] == b"\x53\xef":
        return "ext"
    if head[:4] == b"XFSB":
        return "xfs"
    if head[3:11] == b"NTFS    ":
        return "ntfs"
    if head[3:11] == b"EXFAT   ":
        return "exfat"
    if reader.read(65600, 8) == b"_BHRfS_M":
        return "btrfs"
    return _fat(head)


def _fat(head: bytes) -> str:
    if len(head) < SECTOR or head[510:512] != b"\x55\xaa" or head[0] not in (0xEB, 0xE9):
        return ""
    if head[3:11] == b"MSWIN4.1" and head[424:440] == _BITLOCKER_TO_GO:
        return "bitlocker"
    sector, cluster, reserved, tables = struct.unpack_from("<HBHB", head, 11)
    fits = sector in (512, 1024, 2048, 4096) and cluster and not cluster & (cluster - 1)
    return "fat" if fits and reserved and tables in (1, 2) else ""


# --- partitions


def _partitions(disk: Reader) -> Iterator[Volume]:
    if recognise(disk):
        return  # a file system from the first byte on; some boot sectors look like a partition table
    for sector in (SECTOR, 4096):
        try:
            table = Disk(Stream(disk), sector_size=sector)
        except (VolumeError, EOFError, ValueError, struct.error):
            continue
        kinds = sorted(table.partitions[:MAX_PARTITIONS], key=_number)
        for partition in kinds:
            # dissect leaves out the last sector of a GPT's partition, whose table names it inclusively.
            size = partition.size + (sector if isinstance(partition.disk, GPT) else 0)
            if partition.type in _EXTENDED or size <= 0 or partition.offset >= disk.size:
                continue
            reader = Part(disk, partition.offset, size)
            note = "" if reader.size == size else "it goes on behind the end of the disk"
            yield Volume(f"p{partition.number}", reader, recognise(reader), note)
        return


def _number(partition: Any) -> int:
    return int(partition.number)


# --- logical volumes


def _logical(volumes: list[Volume]) -> Iterator[Volume]:
    groups: dict[str, tuple[str, dict[str, Any], dict[str, Reader]]] = {}
    for volume in volumes:
        if volume.holds != "lvm":
            continue
        device = LVM2Device(Stream(volume.reader))
        text = _metadata(volume.reader, device)
        if not text:
            continue
        tree = parse_metadata(text)
        name, group = next((key, value) for key, value in tree.items() if isinstance(value, dict))
        held = groups.setdefault(group["id"], (name, group, {}))
        for key, known in held[1]["physical_volumes"].items():
            if known["id"].replace("-", "") == device.id:
                held[2][key] = volume.reader
    names = [name for name, _, _ in groups.values()]
    for name, group, devices in groups.values():
        twice = f"there are {names.count(name)} volume groups of this name" if names.count(name) > 1 else ""
        for lv, described in sorted(group.get("logical_volumes", {}).items()):
            if "VISIBLE" not in described.get("status", ()):
                continue
            yield _volume(f"lv/{name}/{lv}", group, devices, described, twice)


def _metadata(reader: Reader, device: Any) -> str:
    """The text of the newest metadata: it may go around the end of its area."""
    for header, locations in device._metadata_areas:
        if not locations or locations[0].size > min(header.size, MAX_METADATA):
            continue
        offset, size = locations[0].offset, locations[0].size
        first = min(size, header.size - offset)
        text = reader.read(header.start + offset, first) + reader.read(header.start + SECTOR, size - first)
        return text.rstrip(b"\0").decode(errors="replace")
    return ""


def _volume(
    name: str, group: dict[str, Any], devices: dict[str, Reader], described: dict[str, Any], note: str
) -> Volume:
    try:
        readers = [_segment(group, devices, part) for part in _segments(described)]
    except RefusedError as error:
        return Volume(name, Join([]), "", error.message)
    reader = Join(readers)
    return Volume(name, reader, recognise(reader), note)


def _segments(described: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [part for part in described.values() if isinstance(part, dict) and "start_extent" in part]
    return sorted(parts, key=lambda part: int(part["start_extent"]))


def _segment(group: dict[str, Any], devices: dict[str, Reader], segment: dict[str, Any]) -> Reader:
    if segment["type"] not in ("striped", "linear"):
        raise RefusedError(f"volumes of the type {segment['type']} are not supported", hint=FORK)
    extent = group["extent_size"] * SECTOR
    stripes = list(zip(segment["stripes"][::2], segment["stripes"][1::2], strict=True))
    size = segment["extent_count"] * extent // len(stripes)
    readers = []
    for pv, first in stripes:
        if pv not in devices:
            raise RefusedError("a part of it is on another disk", hint=FORK)
        start = group["physical_volumes"][pv]["pe_start"] * SECTOR + first * extent
        readers.append(Part(devices[pv], start, size))
    return readers[0] if len(readers) == 1 else Stripes(readers, segment["stripe_size"] * SECTOR)

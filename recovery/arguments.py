"""Arguments that several commands of `cdp` take, as argparse knows them. Loaded by every command, so it is small."""

from argparse import ArgumentParser

from cdpserver import names
from cdpserver.errors import UsageError


def point(text: str) -> str:
    """`DISK@WHEN`, `VM@WHEN` or `GROUP@WHEN`; `backup:ID` or `backup:ID/DISK`"""
    if text.startswith(names.BACKUP):
        names.parse_backup(text)
    else:
        names.parse_point(text)
    return text


def place(text: str) -> str:
    """`DISK@WHEN`, `DISK@WHEN/p2` or `DISK@WHEN/lv/VG/LV`; `VM@WHEN/DISK` or `backup:ID/DISK` and the same after it."""
    if text.startswith(names.BACKUP):
        return point(text)
    name, _, rest = text.partition("@")
    when, _, inner = rest.partition("/")
    names.parse_point(f"{name}@{when}" if "@" in text else text)
    try:
        names.split_volume(text)
    except UsageError:
        if "/" in name:
            raise
        names.check_name(inner.partition("/")[0])
    return text


def when(text: str) -> str:
    """`WHEN`"""
    names.parse_when(text)
    return text


def instant(text: str) -> str:
    """`WHEN` or `backup:ID`"""
    if text.startswith(names.BACKUP):
        names.parse_backup(text)
        return text
    return when(text)


def count(text: str) -> int:
    """A whole number from 0."""
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise UsageError(f"not a count: {names.show(text)}", hint="write a whole number from 0")
    return int(text)


def take_disk(*commands: ArgumentParser, metavar: str = "DISK", optional: bool = False) -> None:
    """Each of them is about a disk or fork, or about all of them if none is named."""
    for command in commands:
        command.add_argument(
            metavar.lower(), metavar=metavar, nargs="?" if optional else None, type=names.check_disk_name
        )


def take_point(*commands: ArgumentParser, help: str | None = None) -> None:
    """Each of them is about one point."""
    for command in commands:
        command.add_argument(
            "point", metavar="DISK@WHEN", type=point, help=help or "or VM@WHEN, GROUP@WHEN, backup:ID"
        )


def take_place(*commands: ArgumentParser) -> None:
    """Each of them is about a point, or about one volume in it."""
    for command in commands:
        command.add_argument(
            "point",
            metavar="DISK@WHEN",
            type=place,
            help="and where there are several: /p2 or /lv/VG/LV after it; VM@WHEN/DISK, backup:ID/DISK as well",
        )


def take_yes(*commands: ArgumentParser) -> None:
    """Each of them asks before it takes something away."""
    for command in commands:
        command.add_argument("--yes", action="store_true", help="do not ask")

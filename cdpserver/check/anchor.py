"""An anchor: the heads of hash chains in a file that lies somewhere else, where who rewrites history cannot reach it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdpserver import durable
from cdpserver.check.links import Head
from cdpserver.errors import CorruptError
from cdpserver.journal.links import head_digest, read

FORMAT = 1


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Heads by the timeline's uuid; {} where there is no file yet. CorruptError."""
    try:
        value = durable.read_json(path)
    except FileNotFoundError:
        return {}
    disks = value.get("disks")
    if value.get("format") != FORMAT or not isinstance(disks, dict):
        raise CorruptError(f"{path} is no anchor", hint="name the file that cdp check --chain --anchor wrote")
    for row in disks.values():
        if (
            not isinstance(row, dict)
            or type(row.get("links")) is not int
            or not isinstance(row.get("head"), str)
        ):
            raise CorruptError(f"{path} is damaged", hint="use an older copy of it")
    return disks


def compare(directory: Path, head: Head, anchored: Mapping[str, Any]) -> str:
    """What is wrong with a chain that was anchored; nothing if all that was there then is there as it was."""
    links = int(anchored["links"])
    if head.links < links:
        return f"the chain has {head.links} links, and had {links} when it was anchored"
    uuid, found = read(directory)
    if head_digest(uuid, found[:links]).hex() != anchored["head"]:
        return f"the first {links} links of the chain are not those that were anchored"
    return ""


def save(path: Path, disks: Mapping[str, Mapping[str, Any]]) -> None:
    """Durable on return."""
    durable.write_json(path, {"format": FORMAT, "disks": {uuid: dict(row) for uuid, row in disks.items()}})

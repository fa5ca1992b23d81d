"""Files, volumes, versions and differences as programs get them: from `cdp file --json` and from the API alike.

Names are bytes. One that is no UTF-8 has U+FFFD where it is none, and its bytes in the field `name_hex` beside it.
"""

import contextlib
from typing import Any

from cdpserver.files.browser import File, Volume
from cdpserver.files.differences import Difference
from cdpserver.files.versions import FIELDS, Version


def row(file: File) -> dict[str, Any]:
    """A file; its name is its path from where one looked."""
    name = b"/".join(file.path) or b"/"
    known: dict[str, Any] = {
        "name": name.decode(errors="replace"),
        "type": file.type,
        "size": file.size,
        "mtime_ns": file.mtime_ns,
        "mode": file.mode,
        "uid": file.uid,
        "gid": file.gid,
        "target": None if file.target is None else file.target.decode(errors="replace"),
    }
    if not is_utf8(name):
        known["name_hex"] = name.hex()
    if file.target is not None and not is_utf8(file.target):
        known["target_hex"] = file.target.hex()
    if file.why:
        known["why"] = file.why
    return known


def stat_row(file: File, xattrs: dict[str, bytes]) -> dict[str, Any]:
    """All that is known of one file, whose path is the whole one."""
    path = b"/" + b"/".join(file.path)
    known = row(file) | {"name": file.name.decode(errors="replace") or "/"}
    known |= {"path": path.decode(errors="replace")}
    if not is_utf8(path):
        known |= {"name_hex": (file.name or b"/").hex(), "path_hex": path.hex()}
    attributes = {name: value.hex() for name, value in xattrs.items()}
    return known | {"atime_ns": file.atime_ns, "links": file.links, "xattrs": attributes}


def volume_row(volume: Volume) -> dict[str, Any]:
    """A volume, in a list of what a disk has."""
    nothing = dict.fromkeys(("mtime_ns", "mode", "uid", "gid", "target"))
    known: dict[str, Any] = {"name": volume.name, "type": "volume", "size": volume.size}
    return known | nothing | {"holds": volume.holds, "note": volume.note}


def preview_row(file: File, head: bytes, image: tuple[int, int] | None) -> dict[str, Any]:
    """The head of a file: text if it is any, else its bytes; of an image its dimensions, too."""
    text = as_text(head, cut=file.size > len(head))
    found: dict[str, Any] = {"name": row(file)["name"], "size": file.size, "bytes": len(head)}
    if image is not None:
        found |= {"kind": "image", "width": image[0], "height": image[1]}
    else:
        found |= {"kind": "binary" if text is None else "text"}
    return found | ({"hex": head.hex()} if text is None else {"text": text})


def version_row(disk: str, version: Version) -> dict[str, Any]:
    """A file from one point to another."""
    known: dict[str, Any] = dict.fromkeys(FIELDS)
    if version.file is not None:
        known |= {key: value for key, value in row(version.file).items() if key not in ("name", "name_hex")}
    return {
        "point": f"{disk}@seq:{version.first.seq}",
        "time_ns": version.first.time_ns,
        "last_point": f"{disk}@seq:{version.last.seq}",
        "last_time_ns": version.last.time_ns,
        "changes": list(version.changes),
        **known,
        "digest": version.digest,
        "why": version.why,
    }


def difference_row(one: Difference) -> dict[str, Any]:
    """A file that is not the same at two points."""
    name = b"/".join(one.path) or b"/"
    known: dict[str, Any] = {"name": name.decode(errors="replace")}
    if not is_utf8(name):
        known["name_hex"] = name.hex()
    return known | {
        "change": one.change,
        "fields": list(one.fields),
        "before": None if one.before is None else row(one.before),
        "after": None if one.after is None else row(one.after),
    }


def is_utf8(name: bytes) -> bool:
    """Is it text?"""
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def as_text(head: bytes, *, cut: bool) -> str | None:
    """UTF-8 text, of which a last character may be cut off; None if it is none."""
    if b"\0" in head:
        return None
    for length in range(len(head), max(len(head) - (4 if cut else 1), -1), -1):
        with contextlib.suppress(UnicodeDecodeError):
            return head[:length].decode()
    return None

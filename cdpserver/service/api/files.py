"""The routes that list and show files of a point.

    point=DISK@WHEN[/p2|/lv/VG/LV]   path=/etc/fstab, or path_hex=... for bytes that are no UTF-8

Lists always come in pages: a directory may have a billion entries. A page may be shorter than asked for, or empty: only without
`next_page_token` it is the last. All pages are of the instant that the first one was of.
"""

import time
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Depends, Query
from starlette.responses import Response

from cdpserver import names
from cdpserver.catalog import Entry
from cdpserver.errors import UsageError
from cdpserver.files import MAX_PREVIEW, PREVIEW_BYTES
from cdpserver.service.api import file_models as models
from cdpserver.service.api import paging
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.browsing import Browsing
from cdpserver.service.core import Core

MAX_PATH = 1 << 14
"""Characters; Linux has paths of 4096 bytes."""

PointText: TypeAlias = Annotated[
    str, Query(max_length=1024, description="DISK@WHEN, or DISK@WHEN/p2 or DISK@WHEN/lv/VG/LV.")
]


def path_of(
    path: Annotated[str, Query(max_length=MAX_PATH, description="In the file system.")] = "/",
    path_hex: Annotated[
        str | None, Query(max_length=2 * MAX_PATH, description="Instead: its bytes, in hex.")
    ] = None,
) -> bytes:
    """The path that a request names."""
    if path_hex is None:
        return path.encode(errors="surrogateescape")
    try:
        return bytes.fromhex(path_hex)
    except ValueError:
        raise UsageError("path_hex is not in hex", hint="two digits for each byte") from None


PathOf: TypeAlias = Annotated[bytes, Depends(path_of)]


def absolute(entry: Entry, seq: int, volume: str | None) -> str:
    """The name of a point that never means another one."""
    return f"{entry.name}@seq:{seq}" + ("" if volume is None else f"/{volume}")


def routes(core: Core, answers: Answers, browsing: Browsing) -> APIRouter:
    """Listing, finding, and what is known of one file."""
    made = APIRouter(tags=["files"])

    async def page(
        kind: str,
        point: str,
        size: int | None,
        token: str | None,
        extra: int,
        request: dict[str, Any],
    ) -> Response:
        entry, seq, volume = await browsing.place(point, at=None if token is None else _seq(kind, token))
        known = paging.read_token(kind, token, int, int, int)
        position = 0
        if known is not None:
            _, extra, position = (int(part) for part in known)
            if "newer_ns" in request:
                request["newer_ns"] = None if extra < 0 else extra
        found = await browsing.ask(
            entry,
            seq,
            {"op": "page", "volume": volume, "position": position, "count": size or paging.DEFAULT_PAGE}
            | request,
        )
        following = found["next"]
        return await answers.one(
            {
                "items": found["items"],
                "next_page_token": None
                if following is None
                else paging.write_token(kind, (seq, extra, following)),
                "point": absolute(entry, seq, volume),
                "remarks": found["remarks"],
            }
        )

    @made.get("/v1/files", response_model=models.Files)
    async def list_files(
        point: PointText, path: PathOf, page_size: PageSize = None, page_token: PageToken = None
    ) -> Response:
        """A directory by name, or a file itself; of a disk that has several volumes, and no path, the volumes."""
        return await page("files", point, page_size, page_token, -1, {"what": "files", "path": path})

    @made.get("/v1/files:find", response_model=models.Files)
    async def find_files(
        point: PointText,
        path: PathOf,
        name: Annotated[
            str | None, Query(max_length=1024, description="A pattern as in the shell: *.txt")
        ] = None,
        regex: Annotated[
            str | None, Query(max_length=1024, description="Found in the path below the directory.")
        ] = None,
        newer: Annotated[
            str | None, Query(max_length=64, description="Changed after this time: -2d, 2027-01-15T08:00Z.")
        ] = None,
        type: Literal["file", "dir", "link"] | None = None,
        page_size: PageSize = None,
        page_token: PageToken = None,
    ) -> Response:
        """What is below a directory and matches. Names are paths from there; what cannot be read is `unreadable`."""
        newer_ns = names.wall_time_of(newer, now_ns=time.time_ns())
        wanted = {
            "what": "find",
            "path": path,
            "name": None if name is None else name.encode(errors="surrogateescape"),
            "regex": None if regex is None else regex.encode(errors="surrogateescape"),
            "newer_ns": newer_ns,
            "type": type,
        }
        return await page("found", point, page_size, page_token, -1 if newer_ns is None else newer_ns, wanted)

    @made.get("/v1/files:stat", response_model=models.FileStat)
    async def stat_file(point: PointText, path: PathOf) -> Response:
        """All that is known of one file, its extended attributes with it."""
        entry, seq, volume = await browsing.place(point)
        found = await browsing.ask(entry, seq, {"op": "stat", "volume": volume, "path": path})
        return await answers.one(
            found["row"] | {"point": absolute(entry, seq, volume), "remarks": found["remarks"]}
        )

    @made.get("/v1/files:preview", response_model=models.Preview)
    async def preview_file(
        point: PointText,
        path: PathOf,
        bytes: Annotated[int, Query(ge=1, le=MAX_PREVIEW)] = PREVIEW_BYTES,
    ) -> Response:
        """The head of a file: text, else its bytes in hex; of an image its dimensions. Links are followed."""
        entry, seq, volume = await browsing.place(point)
        asked = {"op": "preview", "volume": volume, "path": path, "bytes": bytes}
        found = await browsing.ask(entry, seq, asked)
        return await answers.one(
            found["row"] | {"point": absolute(entry, seq, volume), "remarks": found["remarks"]}
        )

    return made


def _seq(kind: str, token: str) -> int:
    known = paging.read_token(kind, token, int, int, int)
    assert known is not None
    return int(known[0])

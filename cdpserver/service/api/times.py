"""The routes about files through time: the versions of one, and what differs between two points; in pages, as all about files."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from cdpserver import names
from cdpserver.names import Latest, Seq
from cdpserver.service.api import file_models as models
from cdpserver.service.api import paging
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.files import PathOf, PointText, absolute
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.browsing import WHOLE, Browsing
from cdpserver.service.core import Core


def routes(core: Core, answers: Answers, browsing: Browsing) -> APIRouter:
    """History and differences."""
    made = APIRouter(tags=["files"])

    @made.get("/v1/files:history", response_model=models.FileVersions)
    async def list_file_versions(
        disk: Annotated[str, Query(max_length=1024)],
        path: PathOf,
        volume: Annotated[str | None, Query(max_length=1024, description="p2, lv/VG/LV")] = None,
        since: Annotated[str | None, Query(max_length=64, description="WHEN")] = None,
        until: Annotated[str | None, Query(max_length=64, description="WHEN; default: now.")] = None,
        page_size: PageSize = None,
        page_token: PageToken = None,
    ) -> Response:
        """The versions of a file over the points of a disk, oldest first; a page takes as long as its looks do."""
        if volume is not None:
            names.split_volume(f"d@latest/{volume}")
        entry = core.entry(disk)
        known = paging.read_token("versions", page_token, str, str, int)
        if known is None:
            # What is relative is made absolute, so that all pages are of the same span.
            now_ns = core.clock.now_ns()
            start, end, position = _absolute(since, now_ns), _absolute(until, now_ns), 0
            if not end:
                newest, _ = await core.thread(core.resolve, entry, Latest())
                end = names.format_when(Seq(newest.seq))
        else:
            start, end, position = str(known[0]), str(known[1]), int(known[2])
        asked = {
            "op": "page",
            "what": "history",
            "disk": disk,
            "path": path,
            "volume": volume,
            "since": start or None,
            "until": end,
            "position": position,
            "count": page_size or paging.DEFAULT_PAGE,
        }
        found = await browsing.ask(entry, WHOLE, asked)
        following = found["next"]
        token = None if following is None else paging.write_token("versions", (start, end, following))
        return await answers.one(
            {"items": found["items"], "next_page_token": token, "remarks": found["remarks"]}
        )

    @made.get("/v1/files:diff", response_model=models.FileDifferences)
    async def diff_files(
        point: PointText,
        other: PointText,
        path: PathOf,
        page_size: PageSize = None,
        page_token: PageToken = None,
    ) -> Response:
        """What was added, removed or changed below a path from one point to another."""
        known = paging.read_token("differences", page_token, int, int, int)
        seqs = [None, None] if known is None else [int(known[0]), int(known[1])]
        entry, seq, volume = await browsing.place(point, at=seqs[0])
        entry2, seq2, volume2 = await browsing.place(other, at=seqs[1])
        first, second = absolute(entry, seq, volume), absolute(entry2, seq2, volume2)
        position = 0 if known is None else int(known[2])
        count = page_size or paging.DEFAULT_PAGE
        found = await browsing.ask(
            entry,
            WHOLE,
            {"op": "page", "what": "diff", "point": first, "other": second, "path": path}
            | {"position": position, "count": count},
        )
        following = found["next"]
        return await answers.one(
            {
                "items": found["items"],
                "next_page_token": None
                if following is None
                else paging.write_token("differences", (seq, seq2, following)),
                "point": first,
                "other": second,
                "remarks": found["remarks"],
            }
        )

    return made


def _absolute(text: str | None, now_ns: int) -> str:
    match names.parse_when(text) if text is not None else None:
        case names.Ago(delta_ns):
            return names.format_time(max(0, now_ns - delta_ns))
        case Latest():
            return ""
    return text or ""

"""The routes of disks, forks, points and base points."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from cdpserver.errors import UsageError
from cdpserver.names import full_name
from cdpserver.point import KINDS
from cdpserver.service.api import models, paging, together
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.jobs import ACCEPTED, Long, Prefer
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.basepoints import BasePoints
from cdpserver.service.disks import Disks
from cdpserver.service.forks import Forks
from cdpserver.service.instants import Instants

DISK = "/v1/disks/{name:path}"


def verbs(
    answers: Answers, long: Long, disks: Disks, instants: Instants, base_points: BasePoints
) -> APIRouter:
    """What is asked of, or done to, the history of a disk or fork."""
    routes = APIRouter()

    @routes.post(f"{DISK}:synced", tags=["disks"], response_model=models.Disk, responses=ACCEPTED)
    async def say_synced(name: str, body: models.Synced | None = None, prefer: Prefer = None) -> Response:
        """Say that the first copy or a resync is complete. The first time, base point 0 is published on return."""
        said = body or models.Synced()

        async def work() -> dict[str, Any]:
            await base_points.synced(name, said.session, write_blocking=said.write_blocking)
            return await disks.show(name)

        return await long.answer(prefer, "disk.synced", name, work)

    @routes.get(
        f"{DISK}:points",
        tags=["points"],
        response_model=list[models.Point] | models.Page[models.Point] | list[models.VmPoint],
    )
    async def list_points(
        name: str,
        since: str | None = None,
        until: str | None = None,
        kind: str | None = None,
        limit: Annotated[int | None, Query(description="Only the newest so many.", lt=1 << 63)] = None,
        page_size: PageSize = None,
        page_token: PageToken = None,
    ) -> Response:
        """Points in [since, until], oldest first; of a VM or group those that all its disks have, whole."""
        if not paging.is_paged(page_size, page_token):
            found = await instants.points(name, since=since, until=until, kind=kind, limit=limit)
            return await answers.many(found)
        if limit is not None:
            raise UsageError("limit is for whole lists", hint="leave out limit, or page_size and page_token")
        key = paging.read_token("points", page_token, int, int, int)
        size = page_size or paging.DEFAULT_PAGE
        after = (int(key[0]), int(key[1]), int(key[2])) if key is not None else None
        left = await instants.points_after(name, after, since=since, until=until, kind=kind, count=size + 1)
        return await paging.answer_page(
            answers,
            "points",
            left,
            lambda point: (point["time_ns"], point["seq"], KINDS.index(point["kind"])),
            size,
        )

    @routes.get(f"{DISK}:uri", tags=["disks"], response_model=models.DiskUri)
    async def show_disk_uri(name: str) -> Response:
        """Where a mirror of your own writes to. Over TCP with TLS the name in it holds the disk's secret."""
        return await answers.one(await disks.uris(name))

    @routes.post(f"{DISK}:cut", tags=["base points"], response_model=models.BasePoint, responses=ACCEPTED)
    async def cut_base_point(name: str, prefer: Prefer = None) -> Response:
        """Cut a base point; its file is published on return. The cut stays when the job is cancelled: it is published later."""
        return await long.answer(prefer, "basepoint.cut", name, partial(base_points.cut, name))

    @routes.post(f"{DISK}:rebuild", tags=["base points"], response_model=models.BasePoint, responses=ACCEPTED)
    async def rebuild_base_point(name: str, body: models.Rebuild, prefer: Prefer = None) -> Response:
        """Make the file of a damaged or lost base point anew from the journal."""
        work = partial(base_points.rebuild, name, body.number)
        return await long.answer(prefer, "basepoint.rebuild", name, work)

    @routes.get(
        f"{DISK}:basepoints",
        tags=["base points"],
        response_model=list[models.BasePoint] | models.Page[models.BasePoint],
    )
    async def list_base_points(
        name: str, page_size: PageSize = None, page_token: PageToken = None
    ) -> Response:
        """The published base points, oldest first."""
        found = await base_points.list_published(name)
        return await paging.answer_list(
            answers, "basepoints", found, "number", (page_size, page_token), of=int
        )

    return routes


def disks(answers: Answers, long: Long, disks: Disks) -> APIRouter:
    """The disks; a fork is one, too."""
    routes = APIRouter(tags=["disks"])

    @routes.post("/v1/disks", response_model=models.Disk, responses=ACCEPTED)
    async def add_disk(body: models.AddDisk, prefer: Prefer = None) -> Response:
        """Protect a disk, empty or on a base image; durable on return."""
        work = partial(disks.add, body.name, body.size, vm=body.vm, base=body.base)
        return await long.answer(prefer, "disk.add", full_name(body.name, body.vm), work)

    @routes.get("/v1/disks", response_model=list[models.Disk] | models.Page[models.Disk])
    async def list_disks(page_size: PageSize = None, page_token: PageToken = None) -> Response:
        """Every disk and fork, by name."""
        found = await disks.list_disks()
        return await paging.answer_list(answers, "disks", found, "name", (page_size, page_token))

    @routes.get(DISK, response_model=models.Disk)
    async def show_disk(name: str) -> Response:
        """One disk or fork."""
        return await answers.one(await disks.show(name))

    @routes.post(f"{DISK}:resize", response_model=models.Disk)
    async def resize_disk(name: str, body: models.Resize) -> Response:
        """Let a disk grow, as its source has. Points before this keep their size; to shrink is refused."""
        return await answers.one(await disks.resize(name, body.size))

    @routes.delete(DISK, response_model=models.Removed, responses=ACCEPTED)
    async def remove_disk(name: str, prefer: Prefer = None) -> Response:
        """Remove a disk or fork with its history. Refused while something stands on it or has it open."""
        return await long.answer(prefer, "disk.remove", name, partial(disks.remove, name))

    return routes


def forks(answers: Answers, long: Long, disks: Disks, several: Forks) -> APIRouter:
    """The forks."""
    routes = APIRouter(tags=["forks"])

    @routes.post("/v1/forks", response_model=models.Disk | together.SeveralForks)
    async def add_fork(body: models.AddFork) -> Response:
        """A writable disk on top of a point, which is made durable first; of a VM or group one for each disk, or none."""
        return await answers.one(await several.add(body.point, body.name))

    @routes.get("/v1/forks", response_model=list[models.Disk] | models.Page[models.Disk])
    async def list_forks(page_size: PageSize = None, page_token: PageToken = None) -> Response:
        """Every fork, by name."""
        found = await disks.forks()
        return await paging.answer_list(answers, "forks", found, "name", (page_size, page_token))

    @routes.get("/v1/forks/{name:path}", response_model=models.Disk)
    async def show_fork(name: str) -> Response:
        """One fork."""
        return await answers.one(await disks.show_fork(name))

    @routes.delete("/v1/forks/{name:path}", response_model=models.Removed, responses=ACCEPTED)
    async def remove_fork(name: str, prefer: Prefer = None) -> Response:
        """Remove a fork with what was written to it."""
        return await long.answer(prefer, "fork.remove", name, partial(disks.remove, name, fork=True))

    return routes

"""The routes of VMs and groups: what several disks have in common."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from cdpserver.service.api import models, paging, together
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.groups import Groups
from cdpserver.service.marks import Marks
from cdpserver.service.vms import Vms


def routes(answers: Answers, vms: Vms) -> APIRouter:
    """A VM is the disks named VM/DISK; a group is VMs and disks."""
    routes = APIRouter(tags=["points"])

    @routes.get("/v1/vms/{name}:points", response_model=list[models.VmPoint])
    async def list_vm_points(
        name: str,
        since: str | None = None,
        until: str | None = None,
        kind: str | None = None,
        limit: Annotated[int | None, Query(description="Only the newest so many.", lt=1 << 63)] = None,
    ) -> Response:
        """Instants in [since, until] at which every disk of the VM or group is good, oldest first."""
        found = await vms.points(name, since=since, until=until, kind=kind, limit=limit)
        return await answers.many(found)

    return routes


def groups_routes(answers: Answers, groups: Groups) -> APIRouter:
    """Groups: VMs and disks that are cut at one instant."""
    routes = APIRouter(tags=["groups"])

    @routes.get("/v1/groups", response_model=list[together.Group] | models.Page[together.Group])
    async def list_groups(page_size: PageSize = None, page_token: PageToken = None) -> Response:
        """Every group, by name."""
        found = await groups.list_groups()
        return await paging.answer_list(answers, "groups", found, "name", (page_size, page_token))

    @routes.put("/v1/groups/{name}", response_model=together.Group)
    async def add_group(name: str, body: together.Members) -> Response:
        """Make a group, or add members to it; durable on return."""
        return await answers.one(await groups.add(name, body.members))

    @routes.get("/v1/groups/{name}", response_model=together.Group)
    async def show_group(name: str) -> Response:
        """One group, and the disks that it means now."""
        return await answers.one(await groups.show(name))

    @routes.delete("/v1/groups/{name}", response_model=together.Group)
    async def remove_group(name: str, body: together.Members | None = None) -> Response:
        """Take members out of a group, or take the group away. Its disks are not touched."""
        return await answers.one(await groups.remove(name, body.members if body else []))

    return routes


def marks_routes(answers: Answers, marks: Marks) -> APIRouter:
    """Bookmarks, of whatever has points."""
    routes = APIRouter(tags=["points"])

    @routes.post("/v1/disks/{name:path}:mark", response_model=models.Point | together.Marked)
    async def set_bookmark(name: str, body: models.Mark) -> Response:
        """Give the newest instant a name; of a VM or group the same instant of all its disks, its guests frozen or not."""
        return await answers.one(
            await marks.mark(name, body.name, freeze=body.freeze, or_crash=body.or_crash)
        )

    return routes

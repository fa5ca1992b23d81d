"""The routes of VMs."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from cdpserver.service.api import models
from cdpserver.service.api.answers import Answers
from cdpserver.service.vms import Vms


def routes(answers: Answers, vms: Vms) -> APIRouter:
    """A VM is the disks named VM/DISK."""
    routes = APIRouter(tags=["points"])

    @routes.get("/v1/vms/{name}:points", response_model=list[models.VmPoint])
    async def list_vm_points(
        name: str,
        since: str | None = None,
        until: str | None = None,
        limit: Annotated[int | None, Query(description="Only the newest so many.", lt=1 << 63)] = None,
    ) -> Response:
        """Instants in [since, until] at which every disk of the VM is good, oldest first."""
        return await answers.many(await vms.points(name, since=since, until=until, limit=limit))

    return routes

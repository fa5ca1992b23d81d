"""The routes of locks on points."""

from fastapi import APIRouter
from starlette.responses import Response

from cdpserver.service.api import models, paging
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.locks import Locks


def routes(answers: Answers, locks: Locks) -> APIRouter:
    """A lock holds one point of one disk."""
    routes = APIRouter(tags=["locks"])

    @routes.post("/v1/locks", response_model=models.Lock)
    async def add_lock(body: models.AddLock) -> Response:
        """Lock a point, which is made durable first; durable on return. A locked point gets the new terms."""
        return await answers.one(
            await locks.add(body.point, until=body.until, reason=body.reason, immutable=body.immutable)
        )

    @routes.get("/v1/locks", response_model=list[models.Lock] | models.Page[models.Lock])
    async def list_locks(
        disk: str | None = None, page_size: PageSize = None, page_token: PageToken = None
    ) -> Response:
        """Every lock, or those of one disk."""
        found = await locks.list_locks(disk)
        return await paging.answer_list(answers, "locks", found, "id", (page_size, page_token))

    @routes.delete("/v1/locks/{lock:path}", response_model=models.Lock)
    async def remove_lock(lock: str) -> Response:
        """Take a lock back, by its id or by DISK@WHEN. An immutable one stays until its time has come."""
        return await answers.one(await locks.remove(lock))

    return routes

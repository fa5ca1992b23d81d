"""The routes of locks on points."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from cdpserver.service.api import models, paging, together
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.locks import Locks


def _age(lock: dict[str, Any]) -> paging.Key:
    """Ids are random: the list goes by age."""
    return lock["created_ns"], lock["id"]


def routes(answers: Answers, locks: Locks) -> APIRouter:
    """A lock holds one point of one disk; those of a VM or group are set and taken back together."""
    routes = APIRouter(tags=["locks"])

    @routes.post("/v1/locks", response_model=models.Lock | together.SeveralLocks)
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
        if not paging.is_paged(page_size, page_token):
            return await answers.many(found)
        after = paging.read_token("locks", page_token, int, str)
        left = [lock for lock in found if after is None or _age(lock) > after]
        return await paging.answer_page(answers, "locks", left, _age, page_size)

    @routes.delete("/v1/locks/{lock:path}", response_model=models.Lock | together.SeveralLocks)
    async def remove_lock(lock: str) -> Response:
        """Take a lock back, by its id or by DISK@WHEN. An immutable one stays until its time has come."""
        return await answers.one(await locks.remove(lock))

    return routes

"""The routes of pruning."""

from fastapi import APIRouter
from starlette.responses import Response

from cdpserver.service.api import models
from cdpserver.service.api.answers import Answers
from cdpserver.service.pruning import Pruning


def routes(answers: Answers, pruning: Pruning) -> APIRouter:
    """What no policy keeps."""
    routes = APIRouter(tags=["policies"])

    @routes.get("/v1/prune", response_model=list[models.Dropped])
    async def plan_prune(disk: str | None = None) -> Response:
        """What a pass would drop now, and why. Nothing is changed."""
        return await answers.many(await pruning.run(disk, dry_run=True))

    @routes.post("/v1/prune", response_model=list[models.Dropped])
    async def prune(body: models.Prune | None = None) -> Response:
        """Drop what no policy keeps, which the service also does by itself; what was dropped, and why."""
        disk = None if body is None else body.disk
        return await answers.many(await pruning.run(disk, dry_run=False))

    return routes

"""The routes that show how the service is doing."""

from fastapi import APIRouter
from starlette.responses import Response

from cdpserver.service.api import models
from cdpserver.service.api.answers import Answers
from cdpserver.service.overview import Overview


def routes(answers: Answers, overview: Overview) -> APIRouter:
    """The overview."""
    made = APIRouter()

    @made.get("/v1/overview", tags=["service"], response_model=models.Overview)
    async def show_overview() -> Response:
        """The service, its processes, the store and every disk with its lags: what `cdp status` shows."""
        return await answers.one(await overview.look())

    return made

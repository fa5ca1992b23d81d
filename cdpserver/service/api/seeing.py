"""The routes that show how the service is doing."""

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from cdpserver.service import metrics
from cdpserver.service.api import models
from cdpserver.service.api.answers import Answers
from cdpserver.service.core import Core
from cdpserver.service.overview import Overview


def routes(core: Core, answers: Answers, overview: Overview) -> APIRouter:
    """The overview, and the same as metrics."""
    made = APIRouter()

    @made.get("/v1/overview", tags=["service"], response_model=models.Overview)
    async def show_overview() -> Response:
        """The service, its processes, the store and every disk with its lags: what `cdp status` shows."""
        return await answers.one(await overview.look())

    @made.get("/v1/metrics", tags=["service"], response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """The overview in Prometheus's text format; docs/metrics.md says what each means."""
        found = await overview.look()
        return Response(await core.thread(metrics.text, found), media_type=metrics.CONTENT_TYPE)

    return made

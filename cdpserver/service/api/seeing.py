"""The routes that show how the service is doing."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import PlainTextResponse, Response

from cdpserver.service import metrics
from cdpserver.service.api import models, together
from cdpserver.service.api.answers import Answers
from cdpserver.service.core import Core
from cdpserver.service.overview import Overview
from cdpserver.service.sampler import Sampler


def routes(core: Core, answers: Answers, overview: Overview, sampler: Sampler) -> APIRouter:
    """The overview, and the same as metrics."""
    made = APIRouter()

    @made.get("/v1/overview", tags=["service"], response_model=models.Overview)
    async def show_overview() -> Response:
        """The service, its processes, the store and every disk with its lags: what `cdp status` shows."""
        return await answers.one(await overview.look())

    async def scraped() -> Response:
        found = await overview.look()
        return Response(await core.thread(metrics.text, found), media_type=metrics.CONTENT_TYPE)

    @made.get("/v1/metrics", tags=["service"], response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """The overview in Prometheus's text format; docs/metrics.md says what each means."""
        return await scraped()

    @made.get("/metrics", tags=["service"], response_class=PlainTextResponse)
    async def scrape() -> Response:
        """The same, where Prometheus looks by itself."""
        return await scraped()

    @made.get("/v1/rpo/{name:path}", tags=["service"], response_model=list[together.Rpo])
    async def list_rpo(
        name: str,
        at: str | None = None,
        since: str | None = None,
        until: str | None = None,
        limit: Annotated[int | None, Query(description="Only the newest so many of each disk.", ge=0)] = None,
    ) -> Response:
        """What could have been lost of a disk, or of each disk of a VM or group: by second, by minute before; or at a time."""
        return await answers.many(await sampler.show(name, at=at, since=since, until=until, limit=limit))

    return made

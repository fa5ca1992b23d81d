"""The routes of room: what history takes, and what another policy would need."""

from fastapi import APIRouter
from starlette.responses import Response

from cdpserver.service.api import capacity_models as models
from cdpserver.service.api.answers import Answers
from cdpserver.service.capacity import Capacity


def routes(answers: Answers, capacity: Capacity) -> APIRouter:
    """Usage and forecast."""
    routes = APIRouter(tags=["policies"])

    @routes.get("/v1/usage", response_model=models.Usage)
    async def usage(disk: str | None = None) -> Response:
        """Bytes by disk and kind, growth an hour, and when a cap is reached."""
        return await answers.one(await capacity.usage(disk))

    @routes.get("/v1/forecast", response_model=models.Forecast)
    async def forecast(
        disk: str, keep: str | None = None, keep_bp: str | None = None, bp_every: str | None = None
    ) -> Response:
        """What another policy would need on a disk: what is not given is as its own policy says. Nothing is changed."""
        asked = {"keep_rp": keep, "keep_bp": keep_bp, "bp_every": bp_every}
        return await answers.one(await capacity.forecast(disk, asked))

    return routes

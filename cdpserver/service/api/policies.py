"""The routes of policies."""

from fastapi import APIRouter
from starlette.responses import Response

from cdpserver.service.api import models
from cdpserver.service.api.answers import Answers
from cdpserver.service.policies import Policies

POLICY = "/v1/policies/{name:path}"


def routes(answers: Answers, policies: Policies) -> APIRouter:
    """A policy is that of a disk, or of a VM."""
    routes = APIRouter(tags=["policies"])

    @routes.get(POLICY, response_model=models.Policy)
    async def show_policy(name: str) -> Response:
        """The policy of a disk as it works, and where each value comes from; or what a VM gives its disks."""
        return await answers.one(await policies.show(name))

    @routes.patch(POLICY, response_model=models.Policy)
    async def set_policy(name: str, body: models.SetPolicy) -> Response:
        """Change values of a disk's or VM's own; durable, and in effect, on return."""
        return await answers.one(await policies.set(name, body.model_dump(exclude_none=True)))

    @routes.delete(POLICY, response_model=models.Policy)
    async def clear_policy(name: str) -> Response:
        """Take back all values of a disk's or VM's own."""
        return await answers.one(await policies.clear(name))

    return routes

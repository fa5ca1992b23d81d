"""The routes of policies."""

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from cdpserver.service.api.answers import Answers
from cdpserver.service.api.models import Answer, Body, Text
from cdpserver.service.policies import Policies

POLICY = "/v1/policies/{name:path}"


class SetPolicy(Body):
    """PATCH /v1/policies/NAME: values as `cdp policy set` takes them; those left out stay."""

    rp_every: Text | None = Field(None, examples=["1s"])
    bp_every: Text | None = Field(None, examples=["20m"])
    keep_rp: Text | None = Field(None, examples=["24h"])
    keep_bp: Text | None = Field(None, examples=["48h 7d 4w 12m"])
    max_chain: Text | None = Field(None, examples=["128"])
    size_cap: Text | None = Field(None, examples=["500G"])
    at_cap: Text | None = Field(None, examples=["shorten"])
    mark_every: Text | None = Field(None, examples=["1h"])
    freeze: Text | None = Field(None, examples=["yes"])
    drill: Text | None = Field(None, examples=["03:00"])
    drill_command: Text | None = Field(None, examples=["/etc/cdp/web.qemu"])
    drill_marker: Text | None = Field(None, examples=["login:"])
    drill_check: Text | None = Field(None, examples=["/etc/cdp/web-check"])
    backup: Text | None = Field(None, examples=["daily 02:00 keep 7d 4w 12m"])
    backup_to: Text | None = Field(None, examples=["/mnt/nas/backups"])
    backup_copy: Text | None = Field(None, examples=["/mnt/vault/backups"])


class Policy(Answer):
    """A policy: its values as an operator writes them, and where each comes from."""

    name: str
    rp_every: str
    bp_every: str
    keep_rp: str
    keep_bp: str
    max_chain: str
    size_cap: str
    at_cap: str
    mark_every: str
    freeze: str
    drill: str
    drill_command: str
    drill_marker: str
    drill_check: str
    backup: str
    backup_to: str
    backup_copy: str
    sources: dict[str, str] = Field(description="default, configuration, VM NAME, or disk.")
    problem: str | None = Field(description="Why the values do not go together; nothing is pruned then.")


def routes(answers: Answers, policies: Policies) -> APIRouter:
    """A policy is that of a disk, or of a VM."""
    routes = APIRouter(tags=["policies"])

    @routes.get(POLICY, response_model=Policy)
    async def show_policy(name: str) -> Response:
        """The policy of a disk as it works, and where each value comes from; or what a VM gives its disks."""
        return await answers.one(await policies.show(name))

    @routes.patch(POLICY, response_model=Policy)
    async def set_policy(name: str, body: SetPolicy) -> Response:
        """Change values of a disk's or VM's own; durable, and in effect, on return."""
        return await answers.one(await policies.set(name, body.model_dump(exclude_none=True)))

    @routes.delete(POLICY, response_model=Policy)
    async def clear_policy(name: str) -> Response:
        """Take back all values of a disk's or VM's own."""
        return await answers.one(await policies.clear(name))

    return routes

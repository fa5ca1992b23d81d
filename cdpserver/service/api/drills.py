"""The routes of drills and of what is lent to programs."""

from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as Asked
from pydantic import Field
from starlette.responses import Response

from cdpserver import names
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.jobs import ACCEPTED, Long, Prefer
from cdpserver.service.api.models import Answer, Body, Count, Natural, Text
from cdpserver.service.drills import Drills, Request
from cdpserver.service.roles import Role, Roles


class StartDrill(Body):
    """POST /v1/drills"""

    point: Text = Field(description="DISK@WHEN, or VM@WHEN for all disks of a VM.", examples=["web@latest"])
    vm_command: Text | None = Field(None, description="The absolute path of a QEMU command line; for admins.")
    marker: Text | None = Field(None, description="A regular expression for a line of the serial port.")
    agent: bool = Field(False, description="Wait for the guest agent; also without marker and check.")
    check: Text | None = Field(None, description="The absolute path of a program; for admins.")
    within: Text = Field("5m", description="How long it may take.")
    accel: Literal["tcg", "kvm", "auto"] | None = None
    force: bool = Field(False, description="Also a point that is unordered.")


class Drill(Answer):
    """A point that was booted apart from everything, and what came of it."""

    id: str
    what: str
    time: str = Field(description="The instant.")
    state: Literal["running", "passed", "failed"]
    rto_ms: Count | None = Field(description="From the request until what was waited for had come.")
    export_ms: Count | None = Field(description="Until the disks could be opened.")
    process_ms: Count | None = Field(description="Until QEMU's monitor listened.")
    read_ms: Count | None = Field(description="Until the guest's first read was served.")
    write_ms: Count | None = Field(description="Until the guest's first write was acknowledged.")
    waited_for: str
    reason: str = Field(description="Why it failed.")
    scheduled: bool
    disks: list[dict[str, Any]]


class StartProbe(Body):
    """POST /v1/probes"""

    point: Text = Field(description="DISK@WHEN, or VM@WHEN for all disks of a VM.")
    pid: Natural = Field(
        description="The process that needs them, on the server's host: they go when it ends."
    )
    force: bool = False


class Probe(Answer):
    """Forks that are lent to a program."""

    id: str
    time: str
    disks: list[dict[str, Any]] = Field(description="`point`, `fork` and `uri` of each.")


def check_programs(asked: Asked, roles: Roles, *paths: str | None) -> None:
    """ForbiddenError unless an admin names programs: they run as the service does."""
    if any(path is not None for path in paths):
        roles.check(asked.scope["state"]["role"], Role.ADMIN, "naming a program that the service runs")


def routes(answers: Answers, long: Long, drills: Drills, roles: Roles) -> APIRouter:
    """Drilling, and lending."""
    routes, trials = APIRouter(tags=["drills"]), drills.trials

    @routes.post("/v1/drills", response_model=Drill, responses=ACCEPTED)
    async def drill_point(asked: Asked, body: StartDrill, prefer: Prefer = None) -> Response:
        """Boot a point isolated and wait; a drill that fails is a result. It is a job, which goes on without its client."""
        check_programs(asked, roles, body.vm_command, body.check)
        given = body.model_dump(exclude={"within"})
        request = Request(**given, within_ns=names.parse_duration(body.within))
        return await long.answer_job(prefer, "drill", body.point, lambda: drills.run(request))

    @routes.get("/v1/drills", response_model=list[Drill])
    async def list_drills(name: str | None = None) -> Response:
        """Drills, oldest first, of a VM or disk or of all: the newest 30 of each are kept."""
        return await answers.many(await drills.list_drills(name))

    @routes.post("/v1/probes", response_model=Probe)
    async def lend_forks(body: StartProbe) -> Response:
        """Forks of a point for a program."""
        return await answers.one(await trials.lend(body.point, body.pid, force=body.force))

    @routes.delete("/v1/probes/{probe}", response_model=Answer)
    async def return_forks(probe: str) -> Response:
        """The program needs them no more; they are gone on return."""
        await trials.give_back(probe)
        return await answers.one({"id": probe})

    return routes

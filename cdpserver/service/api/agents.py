"""The routes of agents: controllers of VMs on other hosts."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from cdpserver.service.agents import Agents
from cdpserver.service.api import agent_models, vm_models
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.protection import connection_of
from cdpserver.vm.target import At, SeenJob

AGENT = "/v1/agents/{agent}"


def routes(answers: Answers, agents: Agents) -> APIRouter:
    """An agent asks what it is to protect, and says what it sees."""
    routes = APIRouter(tags=["vms"])

    def own(asked: Request, disk: str) -> None:
        agents.check_own(asked.scope["state"].get("agent"), disk)

    @routes.post(f"{AGENT}:report", response_model=agent_models.Taken)
    async def report(agent: str, body: agent_models.Report) -> Response:
        """What an agent sees of its VMs, and events to put on record."""
        said: dict[str, Any] = body.model_dump()
        return await answers.one(agents.report(agent, said["vms"], said["events"], said["coming"]))

    @routes.get(f"{AGENT}/vms", response_model=list[agent_models.WantedVm])
    async def list_agent_vms(agent: str) -> Response:
        """The VMs that an agent is to protect."""
        return await answers.many(agents.wanted(agent))

    @routes.put(f"{AGENT}/vms/{{name}}", response_model=vm_models.Vm)
    async def protect_agent_vm(agent: str, name: str, body: agent_models.ProtectThere) -> Response:
        """Let an agent protect a VM, whose disks were found on its host. They are registered on return."""
        disks = [disk.model_dump() for disk in body.disks]
        how = {"wait": body.wait, "drive_mirror": body.drive_mirror, "waits": body.waits}
        connection = connection_of(name, body.qmp, body.libvirt, body.domain)
        return await answers.one(await agents.protect(agent, name, connection, disks=disks, **how))

    @routes.post(f"{AGENT}/vms/{{name}}:arrived", response_model=agent_models.ArrivedVm)
    async def say_agent_vm_arrived(agent: str, name: str) -> Response:
        """A VM that an agent waited for runs on its host. From here on it is the agent's."""
        return await answers.one(await agents.arrived(agent, name))

    @routes.get("/v1/mirror", response_model=agent_models.MirrorSide)
    async def show_mirror(asked: Request, disk: Annotated[str, Query()]) -> Response:
        """Who a disk is, where its mirror writes to, and what its worker says."""
        own(asked, disk)
        return await answers.one(await agents.mirror(disk))

    @routes.post("/v1/mirror:synced", response_model=agent_models.Done)
    async def say_mirror_synced(asked: Request, body: agent_models.SyncedMirror) -> Response:
        """The mirror of this session is in sync and write-blocking; with `bitmap`: anchored to that."""
        own(asked, body.disk)
        seen = None if body.seen is None else SeenJob(**body.seen.model_dump(), by="agent")
        await agents.target.synced(body.disk, body.session, body.bitmap, seen=seen)
        return await answers.one({"disk": body.disk})

    @routes.post("/v1/mirror:holds", response_model=agent_models.Held)
    async def ask_mirror_holds(asked: Request, body: agent_models.HeldPlace) -> Response:
        """Is a place that its worker said earlier in the history of the disk?"""
        own(asked, body.disk)
        return await answers.one({"holds": await agents.target.holds(body.disk, body.place)})

    @routes.post("/v1/mirror:lost", response_model=agent_models.Done)
    async def say_mirror_lost(asked: Request, body: agent_models.LostMirror) -> Response:
        """Writes of the guest did not arrive."""
        own(asked, body.disk)
        at = At(body.whole_ns, body.freed_ns)
        await agents.target.lost_at(body.disk, body.session, body.reason, at=at)
        return await answers.one({"disk": body.disk})

    @routes.post("/v1/mirror:size", response_model=agent_models.Done)
    async def say_mirror_size(asked: Request, body: agent_models.SizedMirror) -> Response:
        """The source has this size: the disk grows with it."""
        own(asked, body.disk)
        await agents.target.check_size(body.disk, body.size)
        return await answers.one({"disk": body.disk})

    return routes

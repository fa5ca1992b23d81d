"""The routes of backups that policies ask for, and of the running VMs that have no points here."""

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from cdpserver.service.api.answers import Answers
from cdpserver.service.api.jobs import ACCEPTED, Long, Prefer
from cdpserver.service.api.models import Answer, Body, Text
from cdpserver.service.backups import Backups
from cdpserver.service.sources import Sources


class SourceBody(Body):
    """PUT /v1/backup-sources/{vm}"""

    qmp: Text | None = Field(None, description="The socket of a QMP monitor of its QEMU, on the server.")
    libvirt: Text | None = Field(None, description="The same by the libvirt that owns the monitor.")
    domain: Text | None = Field(None, description="Its domain, if its name is not the VM's.")
    disks: list[Text] = Field(
        [], description="Those that are named; else all that the guest has.", max_length=64
    )
    freeze: bool = Field(False, description="With the guest's file systems frozen, by its agent.")
    agent: Text | None = Field(None, description="The socket of its guest agent; else libvirt's.")
    or_crash: bool = Field(False, description="Also if the guest cannot be frozen.")


class Source(Answer):
    """A running VM that has no points here, and that the server backs up as its policy says."""

    vm: str
    qmp: str | None
    libvirt: str | None
    domain: str | None
    disks: list[str]
    freeze: bool
    agent: str | None
    or_crash: bool


class RunBackup(Body):
    """POST /v1/backups:run"""

    name: Text = Field(description="A VM or disk whose policy asks for backups.", examples=["web"])


class MadeBackup(Answer):
    """A backup that was made."""

    id: str
    kind: str
    reason: str
    read_bytes: int
    new_bytes: int
    stored_bytes: int
    seconds: float
    removed: int = Field(description="Older ones that the policy's rule does not keep.")


def routes(answers: Answers, long: Long, sources: Sources, backups: Backups) -> APIRouter:
    """Sources, and backups out of their turn."""
    routes = APIRouter(tags=["backups"])

    @routes.put("/v1/backup-sources/{vm}", response_model=Source)
    async def add_source(vm: str, body: SourceBody) -> Response:
        """Name a running VM that has no points here, or say where it is now; its policy says when it is backed up."""
        return await answers.one(await sources.add(vm, body.model_dump()))

    @routes.get("/v1/backup-sources", response_model=list[Source])
    async def list_sources() -> Response:
        """Those that were named."""
        return await answers.many(await sources.list_sources())

    @routes.delete("/v1/backup-sources/{vm}", response_model=Source)
    async def remove_source(vm: str) -> Response:
        """Forget one, and its policy; its backups stay."""
        return await answers.one(await sources.remove(vm))

    @routes.post("/v1/backups:run", response_model=MadeBackup, responses=ACCEPTED)
    async def run_backup(body: RunBackup, prefer: Prefer = None) -> Response:
        """Make the backup that a policy asks for now; its times stay as they are. A job, which goes on without its client."""
        return await long.answer_job(prefer, "backup", body.name, lambda: backups.run_now(body.name))

    return routes

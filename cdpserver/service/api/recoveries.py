"""The routes of recoveries."""

from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as Asked
from pydantic import Field
from starlette.responses import Response

from cdpserver.service.api import paging
from cdpserver.service.api.answers import Answers
from cdpserver.service.api.drills import check_programs
from cdpserver.service.api.models import Answer, Body, Count, Page, Text
from cdpserver.service.api.paging import PageSize, PageToken
from cdpserver.service.planned import Request
from cdpserver.service.recoveries import Recoveries
from cdpserver.service.roles import Roles

RECOVERY = "/v1/recoveries/{recovery}"


class StartRecovery(Body):
    """POST /v1/recoveries"""

    point: Text = Field(description="DISK@WHEN, or VM@WHEN for all disks of a VM.", examples=["web@-90s"])
    to: Text | None = Field(
        None, description="The absolute path of a directory, a file or a block device on primary storage."
    )
    targets: dict[str, str] = Field(
        default_factory=dict, description="The same for one disk, by its name without its VM."
    )
    mode: Literal["mirror", "stream"] = Field(
        "mirror",
        description="mirror: the VM runs on forks until all is copied. stream: it runs at home from the start, and reads from the"
        " point what is not there yet.",
    )
    qmp: Text | None = Field(
        None, description="The absolute path of QEMU's monitor: -qmp unix:PATH,server=on,wait=off"
    )
    attach: Literal["virtio-blk", "virtio-scsi", "nodes"] | None = Field(
        None,
        description="Hand the disks to the QEMU at `qmp`, which is there already: as devices of this kind, after which one that"
        " was started with -S begins, or as block nodes alone, which somebody makes devices of.",
    )
    vm_command: Text | None = Field(
        None, description="Or the absolute path of a QEMU command line that the service starts; for admins."
    )
    libvirt: Text | None = Field(
        None,
        description="Or the URI of a libvirt that the service starts the VM in; vm_command is then a domain's XML, or none.",
    )
    domain: Text | None = Field(None, description="What it is called there; by default as the recovered VM.")
    accel: Literal["tcg", "kvm", "auto"] | None = None
    isolated: bool = Field(False, description="Only a look: without a network, and nothing of it stays.")
    name: Text | None = Field(None, description="The recovered VM's name: its forks are NAME/DISK.")
    format: Literal["qcow2", "raw"] | None = Field(
        None,
        description="At home; by default qcow2, and raw for a block device or a file named .raw or .img.",
    )
    shape: Literal["image", "chain"] = Field(
        "image",
        description="image: one file. chain: the file at home on an image of the point, on a base image.",
    )
    base: Text | None = Field(
        None,
        description="Of a chain: an image on primary storage; what it holds of the point is not copied. By default the image that"
        " the disk was made from, if that is still there.",
    )
    overwrite: bool = Field(
        False,
        description="Replace the old VM's disks, which are kept until the commit, and go on with their history.",
    )
    protect: bool = Field(True, description="Protect the VM again when it is home.")
    force: bool = Field(
        False, description="Also a point that is unordered, or next to a gap; also onto a block device."
    )


class Undo(Body):
    """POST /v1/recoveries/RECOVERY:undo"""

    discard: bool = Field(False, description="Let go of what the VM wrote since the pivot; it must not run.")


class Recovery(Answer):
    """A VM that runs from a point while its disks move home."""

    id: str
    name: str
    mode: Literal["mirror", "stream"]
    vm: str = Field(description="The VM that it makes, or overwrites.")
    overwrites: bool
    protected: bool = Field(description="It is home, and protected again.")
    state: Literal["running", "copying", "pivoting", "done", "failed", "aborted"]
    phase: str
    uri: str | None = Field(
        description="Of the first disk: the fork that the VM is started on; when streaming, the point that its file stands on."
    )
    rto_ms: Count = Field(description="From the request until the disks could be opened.")
    copied_bytes: Count
    total_bytes: Count
    reason: str = Field(description="Why it failed.")
    waits: str = Field(
        "", description="Why nothing goes on, while that is for somebody to change; it is not kept."
    )
    events: list[dict[str, Any]] = Field(description="The newest, oldest of them first.")
    disks: list[dict[str, Any]] = Field(
        description="`blockdev` of each: the words of QEMU's command line for it; a device has drive=recovered0, and so on."
        " `base`: the image that a chain stands on."
    )


def routes(answers: Answers, recoveries: Recoveries, roles: Roles) -> APIRouter:
    """Starting, watching, ending. The verbs come first: an id or name is one word."""
    routes = APIRouter(tags=["recoveries"])

    @routes.post(f"{RECOVERY}:abort", response_model=Recovery)
    async def abort_recovery(recovery: str) -> Response:
        """End the migration: the VM goes on where it is. Refused once it has pivoted."""
        return await answers.one(await recoveries.abort(recovery))

    @routes.post(f"{RECOVERY}:retry", response_model=Recovery)
    async def retry_recovery(recovery: str) -> Response:
        """Begin one that failed or was aborted again, on the same forks."""
        return await answers.one(await recoveries.retry(recovery))

    @routes.post(f"{RECOVERY}:commit", response_model=Recovery)
    async def commit_recovery(recovery: str) -> Response:
        """Say that the VM stays at home."""
        return await answers.one(await recoveries.commit(recovery))

    @routes.post(f"{RECOVERY}:undo", response_model=Recovery)
    async def undo_recovery(recovery: str, body: Undo | None = None) -> Response:
        """Move the VM back onto its forks, with what it wrote since."""
        return await answers.one(await recoveries.undo(recovery, discard=body is not None and body.discard))

    @routes.post("/v1/recoveries", response_model=Recovery)
    async def start_recovery(asked: Asked, body: StartRecovery) -> Response:
        """Make writable disks of a point at once, and move them home while the VM runs. They can be opened on return."""
        check_programs(asked, roles, body.vm_command, body.libvirt)
        return await answers.one(await recoveries.start(Request(**body.model_dump())))

    @routes.get("/v1/recoveries", response_model=list[Recovery] | Page[Recovery])
    async def list_recoveries(page_size: PageSize = None, page_token: PageToken = None) -> Response:
        """Every recovery, by id when in pages."""
        found = await recoveries.list_recoveries()
        if paging.is_paged(page_size, page_token):
            found.sort(key=lambda one: str(one["id"]))
        return await paging.answer_list(answers, "recoveries", found, "id", (page_size, page_token))

    @routes.get(RECOVERY, response_model=Recovery)
    async def show_recovery(recovery: str) -> Response:
        """One recovery, by its id or name."""
        return await answers.one(await recoveries.show(recovery))

    return routes
